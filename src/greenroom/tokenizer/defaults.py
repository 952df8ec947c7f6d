"""Chat templates for files that carry none, by what their vocabulary and architecture say.

Written here from the published formats; each is used only where the family is certain.
"""

from greenroom.tokenizer.vocabulary import Vocabulary

_SYSTEM_INTO_FIRST_USER = """\
{%- if messages[0].role == 'system' -%}
    {%- set lead = messages[0].content ~ '\\n\\n' -%}
    {%- set turns = messages[1:] -%}
{%- else -%}
    {%- set lead = '' -%}
    {%- set turns = messages -%}
{%- endif -%}
"""

CHATML = """\
{%- for m in messages -%}
    {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""

LLAMA_3 = """\
{{- bos_token -}}
{%- for m in messages -%}
    {{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' -}}
    {{- m.content | trim + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
{%- endif -%}
"""

PHI_3 = """\
{%- for m in messages -%}
    {{- '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>\\n' -}}{%- endif -%}
"""

MISTRAL = (
    _SYSTEM_INTO_FIRST_USER
    + """\
{{- bos_token -}}
{%- for m in turns -%}
    {%- if m.role == 'user' -%}
        {{- '[INST] ' + (lead if loop.first else '') + m.content + ' [/INST]' -}}
    {%- else -%}
        {{- ' ' + m.content + eos_token -}}
    {%- endif -%}
{%- endfor -%}
"""
)

DEEPSEEK = """\
{{- bos_token -}}
{%- for m in messages -%}
    {%- if m.role == 'user' -%}
        {{- 'User: ' + m.content + '\\n\\n' -}}
    {%- elif m.role == 'assistant' -%}
        {{- 'Assistant: ' + m.content + eos_token -}}
    {%- else -%}
        {{- m.content + '\\n\\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'Assistant:' -}}{%- endif -%}
"""

# (tokens that must exist, architectures or None for any, name, template); first match wins.
_FAMILIES: tuple[tuple[tuple[str, ...], frozenset[str] | None, str, str], ...] = (
    (("<|im_start|>", "<|im_end|>"), None, "chatml", CHATML),
    (("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), None, "llama-3", LLAMA_3),
    (("<|user|>", "<|assistant|>", "<|end|>"), frozenset({"phi3", "phimoe"}), "phi-3", PHI_3),
    ((), frozenset({"deepseek"}), "deepseek", DEEPSEEK),
)


def default_template(
    architecture: str, vocabulary: Vocabulary, has_experts: bool
) -> tuple[str, str] | None:
    """(name, template) for a file without one, or None where the family is not certain.

    A `llama` file with experts and a SentencePiece vocabulary is a Mixtral.
    """
    for tokens, architectures, name, template in _FAMILIES:
        known = all(vocabulary.id_of(text) is not None for text in tokens)
        if known and (architectures is None or architecture in architectures):
            return name, template
    if architecture == "llama" and has_experts and vocabulary.model == "llama":
        return "mistral", MISTRAL
    return None

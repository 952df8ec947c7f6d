"""Tokenizers in the files HF's repositories have them in, small: trained on a few lines, but with
each publisher's normaliser, pre-tokenizer, special tokens, flags and kind of chat template."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..tokenizer.templates import TEMPLATES
from .checkpoints import LINES

SIZE = 432  # tokens with the special ones; models have a few rows more
HARMONY = """\
<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.
Knowledge cutoff: 2024-06
Current date: {{ current_date }}

Reasoning: medium

# Valid channels: analysis, commentary, final. Channel must be included for every message.<|end|>\
{%- if messages[0].role == 'system' %}<|start|>developer<|message|># Instructions

{{ messages[0].content }}<|end|>{%- set messages = messages[1:] %}{%- endif %}
{%- for message in messages %}<|start|>{{ message.role }}\
{%- if message.role == 'assistant' %}<|channel|>final{%- endif %}<|message|>\
{{- message.content }}<|end|>{%- endfor %}<|start|>assistant"""
DEEPSEEK = """\
{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}\
{{ 'User: ' + message['content'] + '\n\n' }}{% elif message['role'] == 'assistant' %}\
{{ 'Assistant: ' + message['content'] + eos_token }}{% else %}\
{{ message['content'] + '\n\n' }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"""
ROLES = """\
{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + \
message['content'] }}{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}\
{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"""
GRANITE = """\
{% for message in messages %}{{ '<|start_of_role|>' + message['role'] + '<|end_of_role|>' + \
message['content'] + '<|end_of_text|>\n' }}{% endfor %}{% if add_generation_prompt %}\
{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}"""


@dataclass(frozen=True)
class Publisher:
    """One publisher's tokenizer.

    Attributes:
        pre: expressions by their GGUF name, or None for SentencePiece.
        special: tokens that are control tokens.
        added: (text, special, rstrip) of further ones.
        config: of tokenizer_config.json.
        template: for chats.
        normaliser: of tokenizer.json.
        begins: texts begin with the BOS token.
        template_file: the template is in chat_template.jinja.
        end: of SentencePiece: whether </s> is special, and whether white space behind it goes.
        files: of SentencePiece: which are published.
    """

    config: dict[str, Any]
    template: str
    pre: str | None = None
    special: Sequence[str] = ()
    added: Sequence[tuple[str, bool, bool]] = ()
    normaliser: str | None = None
    ignore_merges: bool = False
    begins: bool = False
    template_file: bool = False
    end: tuple[bool, bool] = (True, False)
    files: Sequence[str] = field(default=("tokenizer.json", "tokenizer.model"))

    def write(self, folder: Path) -> None:
        """Writes the tokenizer's files into a checkpoint's folder."""
        if self.pre is None:
            self._sentencepiece(folder)
        else:
            self._byte_level(folder)
        config = dict(self.config)
        if self.template_file:
            (folder / "chat_template.jinja").write_text(self.template)
        else:
            config["chat_template"] = self.template
        (folder / "tokenizer_config.json").write_text(json.dumps(config))

    def _byte_level(self, folder: Path) -> None:
        from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, processors
        from tokenizers import pre_tokenizers as pre
        from tokenizers.trainers import BpeTrainer

        from greenroom.tokenizer.pretokenizers import pre_tokenizer

        tokenizer = Tokenizer(models.BPE(ignore_merges=self.ignore_merges))
        if self.normaliser == "NFC":
            tokenizer.normalizer = normalizers.NFC()
        alphabet = pre.ByteLevel(add_prefix_space=False, use_regex=self.pre == "gpt-2")
        splits: list[Any] = []
        if self.pre == "refact":  # as it is published
            splits = [pre.Digits(individual_digits=True)]
            alphabet = pre.ByteLevel(add_prefix_space=False, use_regex=True)
        elif self.pre != "gpt-2":
            assert self.pre is not None
            expressions = pre_tokenizer(self.pre).expressions
            splits = [pre.Split(Regex(text), behavior="isolated") for text in expressions]
        tokenizer.pre_tokenizer = pre.Sequence([*splits, alphabet])
        count = len(self.special) + len(self.added)
        trainer = BpeTrainer(
            vocab_size=SIZE - count,
            initial_alphabet=pre.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(LINES, trainer)
        tokenizer.add_special_tokens(
            [AddedToken(text, special=True, normalized=False) for text in self.special]
        )
        for text, special, rstrip in self.added:
            token = AddedToken(text, special=special, rstrip=rstrip, normalized=False)
            tokenizer.add_special_tokens([token]) if special else tokenizer.add_tokens([token])
        if self.begins:
            bos = self.special[0]
            tokenizer.post_processor = processors.TemplateProcessing(
                single=f"{bos} $A",
                pair=f"{bos} $A {bos}:1 $B:1",
                special_tokens=[(bos, tokenizer.token_to_id(bos))],
            )
        tokenizer.save(str(folder / "tokenizer.json"))

    def _sentencepiece(self, folder: Path) -> None:
        """tokenizer.model, and the tokenizer.json that the publishers' library made of it."""
        import sentencepiece
        from transformers import LlamaTokenizer

        size = SIZE - len(self.added)
        with (folder / "tokenizer.model").open("wb") as out:
            sentencepiece.SentencePieceTrainer.Train(
                sentence_iterator=iter(LINES),
                model_writer=out,
                vocab_size=size,
                model_type="bpe",
                byte_fallback=True,
                character_coverage=0.99,
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                split_digits=True,
                minloglevel=2,
            )
        rows = [("<unk>", 0, True, False), ("<s>", 1, True, False), ("</s>", 2, *self.end)]
        rows += [(text, size + i, *flags) for i, (text, *flags) in enumerate(self.added)]
        items = [
            {"id": token, "content": text, "special": special, "rstrip": rstrip}
            | dict.fromkeys(("lstrip", "normalized", "single_word"), False)
            for text, token, special, rstrip in rows
        ]
        if "tokenizer.json" in self.files:
            found = LlamaTokenizer.from_pretrained(folder).backend_tokenizer
            description = json.loads(found.to_str())
            description["added_tokens"] = items
            description["normalizer"] = {
                "type": "Sequence",
                "normalizers": [
                    {"type": "Prepend", "prepend": "▁"},
                    {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
                ],
            }
            description["pre_tokenizer"] = None
            before = [{"SpecialToken": {"id": "<s>", "type_id": 0}}] if self.begins else []
            description["post_processor"] = {
                "type": "TemplateProcessing",
                "single": [*before, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"],
                "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
            }
            (folder / "tokenizer.json").write_text(json.dumps(description))
        if "tokenizer.model" not in self.files:
            (folder / "tokenizer.model").unlink()
        self.config["added_tokens_decoder"] = {
            str(item["id"]): {k: v for k, v in item.items() if k != "id"} for item in items
        }


_LLAMA = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_PHI = Publisher(
    {
        **_LLAMA,
        "add_bos_token": False,
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "legacy": False,
        "tokenizer_class": "LlamaTokenizer",
    },
    TEMPLATES["phi"],
    added=[
        ("<|endoftext|>", True, False),
        *((f"<|{name}|>", True, True) for name in ("assistant", "system", "end", "user")),
    ],
    end=(False, True),
)
_QWEN = Publisher(
    {
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "add_bos_token": False,
        "tokenizer_class": "Qwen2Tokenizer",
    },
    TEMPLATES["qwen3"],
    "qwen2",
    ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    [("<tool_call>", False, False), ("<think>", False, False), ("</think>", False, False)],
    normaliser="NFC",
)
PUBLISHERS: dict[str, Publisher] = {
    "GptOss": Publisher(
        {
            "bos_token": "<|startoftext|>",
            "eos_token": "<|return|>",
            "pad_token": "<|endoftext|>",
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
        HARMONY,
        "gpt-4o",
        [
            *("<|startoftext|>", "<|endoftext|>", "<|return|>", "<|constrain|>", "<|channel|>"),
            *("<|start|>", "<|end|>", "<|message|>", "<|call|>"),
        ],
        template_file=True,
    ),
    "Phi": _PHI,
    "Mixtral": Publisher(
        {**_LLAMA, "add_bos_token": True, "legacy": True, "tokenizer_class": "LlamaTokenizer"},
        TEMPLATES["mistral"],
        begins=True,
    ),
    "Llama 2": Publisher(
        {**_LLAMA, "add_bos_token": True, "legacy": True, "tokenizer_class": "LlamaTokenizer"},
        TEMPLATES["mistral"],
        begins=True,
        files=("tokenizer.json",),
    ),
    "Llama 3": Publisher(
        {
            "bos_token": "<|begin_of_text|>",
            "eos_token": "<|eot_id|>",
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
        TEMPLATES["llama-3"],
        "llama-bpe",
        [
            *("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"),
            "<|eot_id|>",
        ],
        ignore_merges=True,
        begins=True,
    ),
    "DeepSeek": Publisher(
        {
            "add_bos_token": True,
            "add_eos_token": False,
            "bos_token": "<｜begin▁of▁sentence｜>",
            "eos_token": "<｜end▁of▁sentence｜>",
            "tokenizer_class": "LlamaTokenizerFast",
        },
        DEEPSEEK,
        "deepseek-llm",
        ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"],
        begins=True,
    ),
    "Qwen": _QWEN,
    "OLMoE": Publisher(
        {
            "add_bos_token": False,
            "add_eos_token": False,
            "bos_token": "<|endoftext|>",
            "eos_token": "<|endoftext|>",
            "pad_token": "<|padding|>",
            "tokenizer_class": "GPTNeoXTokenizer",
        },
        ROLES,
        "gpt-2",
        ["<|endoftext|>", "<|padding|>"],
        [("   ", False, False), ("  ", False, False), ("|||IP_ADDRESS|||", False, False)],
        normaliser="NFC",
    ),
    "Granite": Publisher(
        {
            "bos_token": "<|end_of_text|>",
            "eos_token": "<|end_of_text|>",
            "pad_token": "<|end_of_text|>",
            "unk_token": "<|end_of_text|>",
            "add_bos_token": False,
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
        GRANITE,
        "refact",
        ["<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>", "<|tool_call|>"],
    ),
}
# Whose tokenizer a class's checkpoints have.
OF_CLASS = {
    "GptOss": "GptOss",
    "GptOss BF16": "GptOss",
    "GptOss MXFP4": "GptOss",
    "GptOss OpenAI": "GptOss",
    "GptOss OpenAI BF16": "GptOss",
    "PhiMoE": "Phi",
    "PhiMoE window": "Phi",
    "GRIN-MoE": "Phi",
    "Deepseek": "DeepSeek",
    "Mixtral": "Mixtral",
    "Qwen2Moe": "Qwen",
    "Qwen3Moe": "Qwen",
    "Olmoe": "OLMoE",
    "GraniteMoe": "Granite",
    "GraniteMoeShared": "Granite",
    "Llama": "Llama 3",
    "Llama plain": "Llama 2",
    "Qwen3": "Qwen",
    "Qwen2": "Qwen",
}

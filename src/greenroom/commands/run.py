"""`greenroom run`: one prompt, one answer, and a table of what it took."""

import json
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from greenroom.commands import options
from greenroom.errors import RequestError

if TYPE_CHECKING:
    from greenroom.engine import LLM, SamplingParams

DEFAULT_TOKENS = 1024  # or what fits: a model that never ends should not run for hours

Prompt = Annotated[str | None, Argument(help="The prompt; '-' or a pipe: standard input.")]
Raw = Annotated[bool, Option("--raw", help="Do not apply the model's chat template.")]
Stop = Annotated[list[str] | None, Option(help="End at this text; may be given repeatedly.")]
Trace = Annotated[str | None, Option(help="Recorded routes whose experts start in VRAM.")]
Json = Annotated[bool, Option("--json", help="Print one JSON document instead of text.")]


def run(
    model: options.Model,
    prompt: Prompt = None,
    system: options.System = None,
    raw: Raw = False,
    max_tokens: options.MaxTokens = None,
    temperature: options.Temperature = 0.7,
    top_k: options.TopK = 0,
    top_p: options.TopP = 0.95,
    min_p: options.MinP = 0.0,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    seed: options.Seed = None,
    stop: Stop = None,
    threads: options.Threads = None,
    context: options.Context = None,
    vram: options.Vram = None,
    ram: options.Ram = None,
    trace: Trace = None,
    mmap: options.Mmap = False,
    reference: options.Reference = False,
    explain: options.Explain = False,
    as_json: Json = False,
) -> int:
    """Generate text from a prompt, and say how fast.

    The model's chat template is applied if it has one, unless --raw is given. Without
    --max-tokens an answer has at most 1024.
    """
    params = options.sampling(
        max_tokens, temperature, top_k, top_p, min_p, repetition_penalty, seed, tuple(stop or ())
    )
    text = _prompt(prompt)
    from greenroom.commands.console import loaded, show_placement
    from greenroom.commands.explain import explained

    settings = options.engine(threads, context, vram, mmap, reference, ram)
    opened = loaded(model, max_sequences=1, trace=trace, **settings)
    with opened as llm, explained(llm, model, explain) as found:
        show_placement(llm, trace)
        tokens, parser = _tokens(llm, text, system, raw)
        if max_tokens is None:
            params = _bounded(params, llm.engine.config.context_length - len(tokens))
        status, figures = _answer(llm, tokens, parser, params, as_json)
        found |= figures
        return status


def _bounded(params: "SamplingParams", room: int) -> "SamplingParams":
    return replace(params, max_tokens=max(1, min(DEFAULT_TOKENS, room)))


def _prompt(prompt: str | None) -> str:
    if prompt is None and sys.stdin.isatty():
        raise typer.BadParameter("give a prompt, or pipe one into standard input")
    text = options.read_text(sys.stdin.read) if prompt in (None, "-") else str(prompt)
    if not text.strip():
        raise RequestError("the prompt is empty; give one, or talk with 'greenroom chat'", "prompt")
    return text


def _tokens(llm: "LLM", text: str, system: str | None, raw: bool) -> tuple[list[int], Any]:
    """Token ids of the prompt, and what parses the answer (None: it is plain text)."""
    chat = llm.engine.chat
    if raw or chat is None or chat.source == "none":
        if system is not None:
            raise typer.BadParameter("--system needs a chat template, which is not in use here")
        return llm.encode(text), None
    messages = [{"role": "user", "content": text}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    tokens: list[int] = chat.render(messages)
    return tokens, chat.parser(tokens, [])


def _answer(
    llm: "LLM", tokens: list[int], parser: Any, params: "SamplingParams", as_json: bool
) -> tuple[int, dict[str, Any]]:
    from greenroom.commands.console import Measured, Writer, awaited, errors, show_figures

    writer, measured, status = Writer(parser, quiet=as_json), Measured(len(tokens)), 0
    try:
        for output in awaited(llm.stream(tokens, params)):
            measured.note(output)
            writer.push(output)
    except KeyboardInterrupt:
        status = 130
    writer.finish()
    memory = llm.engine.stats()["memory"]
    if as_json:
        print(json.dumps({"text": writer.content, **measured.figures(), "memory_bytes": memory}))
    else:
        show_figures(measured.figures(), memory)
    if measured.finish_reason == "length" and errors.is_terminal:
        errors.print("The answer was cut off; --max-tokens and --context allow more.", style="dim")
    return status, measured.figures()

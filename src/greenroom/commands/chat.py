"""`greenroom chat`: a conversation in the terminal. Later turns reuse the cache of earlier
ones, so that only what is new is computed.
"""

import contextlib
import sys
from typing import TYPE_CHECKING, Any

from greenroom.commands import options
from greenroom.errors import ChatTemplateError, RequestError

if TYPE_CHECKING:
    from greenroom.engine import LLM, SamplingParams

HELP = "/reset starts over, /bye leaves (or Ctrl-D), Ctrl-C stops an answer."
LEAVE = ("/bye", "/exit", "/quit")


def chat(
    model: options.Model,
    system: options.System = None,
    max_tokens: options.MaxTokens = None,
    temperature: options.Temperature = 0.7,
    top_k: options.TopK = 0,
    top_p: options.TopP = 0.95,
    min_p: options.MinP = 0.0,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    seed: options.Seed = None,
    threads: options.Threads = None,
    context: options.Context = None,
    vram: options.Vram = None,
    ram: options.Ram = None,
    mmap: options.Mmap = False,
    reference: options.Reference = False,
    explain: options.Explain = False,
) -> None:
    """Talk with a model. /reset starts over, /bye leaves, Ctrl-C stops an answer."""
    params = options.sampling(
        max_tokens, temperature, top_k, top_p, min_p, repetition_penalty, seed
    )
    from greenroom.commands.console import errors, loaded, show_placement
    from greenroom.commands.explain import explained

    settings = options.engine(threads, context, vram, mmap, reference, ram)
    with (
        loaded(model, max_sequences=1, **settings) as llm,
        explained(llm, model, explain) as figures,
    ):
        if llm.engine.chat.source == "none":
            raise ChatTemplateError(
                f"{model.name} has no chat template; use 'greenroom run --raw' instead"
            )
        show_placement(llm)
        if errors.is_terminal:
            errors.print(HELP, style="dim")
        Conversation(llm, params, system, figures).loop()


class Conversation:
    """Turns of a user and a model.

    Args:
        llm: the model.
        params: of every answer.
        system: the system message, or None.
        figures: is given those of the last answer.
    """

    def __init__(
        self,
        llm: "LLM",
        params: "SamplingParams",
        system: str | None,
        figures: dict[str, Any] | None = None,
    ) -> None:
        self.llm = llm
        self.params = params
        self.start = [] if system is None else [{"role": "system", "content": system}]
        self.messages = list(self.start)
        self.figures = {} if figures is None else figures

    def loop(self) -> None:
        """Reads and answers until /bye or the end of the input."""
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  gives input() line editing and history
        while True:
            try:
                text = options.read_text(lambda: input("> " if sys.stdin.isatty() else "")).strip()
            except EOFError:
                return
            except KeyboardInterrupt:
                print()
                continue
            if text in LEAVE:
                return
            if text == "/reset":
                self.messages = list(self.start)
                print("starting over", file=sys.stderr)
            elif text.startswith("/"):
                print(HELP, file=sys.stderr)
            elif text:
                self.turn(text)

    def turn(self, text: str) -> None:
        """One question and its answer; an answer that was stopped counts as it stands."""
        from greenroom.commands.console import Measured, Writer, awaited, show_figures

        self.messages.append({"role": "user", "content": text})
        try:
            tokens = self.llm.engine.chat.render(self.messages)
            stream = self.llm.stream(tokens, self.params)
        except RequestError as error:  # the conversation no longer fits
            self.messages.pop()
            problem = options.in_flags(str(error))
            print(f"greenroom: {problem}; or start over with /reset", file=sys.stderr)
            return
        writer = Writer(self.llm.engine.chat.parser(tokens, []))
        measured = Measured(len(tokens))
        with contextlib.suppress(KeyboardInterrupt):
            for output in awaited(stream):
                measured.note(output)
                writer.push(output)
        writer.finish()
        self.messages.append({"role": "assistant", "content": writer.content})
        self.figures.update(measured.figures())
        if sys.stderr.isatty():
            show_figures(measured.figures(), {})

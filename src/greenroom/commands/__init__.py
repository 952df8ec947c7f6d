"""The command line: `greenroom VERB ...`, one module per verb.

A module has a function of the verb's name with typer annotations; it is imported when its
verb is used, so that `greenroom --help` stays fast. What a user can cause ends in one line.
"""

import difflib
import functools
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from greenroom import __version__
from greenroom.commands.interrupt import after_imports
from greenroom.errors import GreenroomError

# verb: its module, and what it does in a few words
COMMANDS: dict[str, tuple[str, str]] = {
    "run": ("greenroom.commands.run", "Generate text from a prompt, and say how fast."),
    "chat": ("greenroom.commands.chat", "Talk with a model."),
    "serve": ("greenroom.commands.serve", "Serve models over HTTP, and a page to chat."),
    # Its module hides the builtin in this file once it is imported.
    "list": ("greenroom.commands.list", "List the models on this machine."),
    "pull": ("greenroom.commands.pull", "Download a model."),
    "show": ("greenroom.commands.show", "Show what a model is."),
    "rm": ("greenroom.commands.rm", "Delete a model."),
    "ps": ("greenroom.commands.ps", "Show what a server has loaded."),
    "demo": ("greenroom.commands.demo", "Build a small real model and let it answer."),
    "doctor": ("greenroom.commands.doctor", "Look at this machine, measure it, name problems."),
    "plan": ("greenroom.commands.plan", "Predict placement and speed from a model's header."),
    "matrix": ("greenroom.commands.matrix", "Measure several published shapes: one table."),
    "compare": ("greenroom.commands.compare", "Put two benchmark results side by side."),
    "bench": ("greenroom.commands.bench", "Measure a model: speed, memory, energy, baseline."),
    "sweep": ("greenroom.commands.sweep", "Measure a model under one VRAM budget after another."),
    "bench-kernels": (
        "greenroom.commands.bench_kernels",
        "Measure the CPU kernels against the machine's limits.",
    ),
    "eval": ("greenroom.commands.eval", "Measure how well a model predicts a text."),
    "profile": ("greenroom.commands.profile", "Record which experts a text uses."),
    "stress": ("greenroom.commands.stress", "Treat the engine badly, with a verdict per check."),
    "convert": ("greenroom.commands.convert", "Convert a checkpoint to a GGUF file."),
    "inspect": ("greenroom.commands.inspect", "Say what a model file holds and needs."),
    "tokenize": ("greenroom.commands.tokenize", "Print token ids and pieces of a text."),
    "quantize": ("greenroom.commands.quantize", "Write a model in other block formats."),
    "card": ("greenroom.commands.card", "Write a model card from measured results."),
    "publish": ("greenroom.commands.publish", "Upload a folder of models to the hub."),
    "synth": ("greenroom.commands.synth", "Write a model file of published shapes, to measure."),
    "upcycle": ("greenroom.commands.upcycle", "Turn a dense model into one with experts."),
    "completion": ("greenroom.commands.completion", "Print a script for the shell's completion."),
}


_SERVER = ("fastapi", "llguidance", "prometheus_client", "starlette", "uvicorn")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        arguments: verb first; None takes those of the process.

    Returns:
        The exit status: 0, 1 after an error, 2 for a wrong call, 130 after Ctrl-C.
    """
    verb, *rest = (sys.argv[1:] if arguments is None else [*arguments]) or ["--help"]
    if verb in ("-h", "--help"):
        print(_help())
        return 0
    if verb == "--version":
        print(f"greenroom {__version__}")
        return 0
    if verb not in COMMANDS:
        near = difflib.get_close_matches(verb, COMMANDS, 1)
        hint = f"did you mean '{near[0]}'?" if near else "see 'greenroom --help'"
        return _complain(f"there is no command '{verb}'; {hint}", 2)
    with after_imports():
        status = guarded(lambda: _run(verb, rest))()
    return status if isinstance(status, int) else 0


def _help() -> str:
    width = max(map(len, COMMANDS)) + 2
    verbs = [f"  {name:{width}}{summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join(
        [
            "Usage: greenroom COMMAND ...",
            "",
            "Run Mixture-of-Experts language models far larger than the GPU.",
            "",
            *verbs,
            "",
            "'greenroom COMMAND --help' tells more; 'greenroom --version' prints the version.",
        ]
    )


def _run(verb: str, arguments: list[str]) -> int:
    import typer

    app = typer.Typer(
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,  # boxes for a screen's width, and it takes [default: ...] for markup
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    def as_exit(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapped(*args: Any, **options: Any) -> None:
            status = guarded(function)(*args, **options)
            raise typer.Exit(status if isinstance(status, int) else 0)

        return wrapped

    function = getattr(import_module(COMMANDS[verb][0]), verb.replace("-", "_"))
    app.command(verb)(as_exit(function))
    wrong_call: Any = typer.BadParameter.__bases__[0]  # typer does not export UsageError
    try:
        status = app(args=arguments, prog_name=f"greenroom {verb}", standalone_mode=False)
    except typer.Abort:  # a question was not answered
        return _complain("aborted", 1)
    except wrong_call as error:
        what = error.format_message().removeprefix("Invalid value: ").rstrip(".")
        return _complain(
            f"{verb}: {what[:1].lower()}{what[1:]}; 'greenroom {verb} --help' tells more", 2
        )
    return status if isinstance(status, int) else 0


def guarded(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, with every error that a user can cause turned into one line and a status."""

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        try:
            result = function(*args, **options)
            sys.stdout.flush()
            return result
        except KeyboardInterrupt:
            return _complain("interrupted", 130)
        except BrokenPipeError:
            # The reader has gone. Python would complain again when it flushes at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except GreenroomError as error:
            from greenroom.commands.options import in_flags  # it needs typer

            return _complain(in_flags(str(error)), 1)
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            return _complain(f"{where}{error.strerror or error}", 1)
        except ModuleNotFoundError as error:
            if error.name not in _SERVER:
                raise
            return _complain(
                f"the server needs {error.name}, which is not installed; "
                "pip install 'greenroom[server]' brings it",
                1,
            )
        except MemoryError:
            return _complain("out of memory; choose a smaller model or context", 1)

    return call


def _complain(message: str, status: int) -> int:
    print(f"greenroom: {' '.join(message.split())}", file=sys.stderr)
    return status

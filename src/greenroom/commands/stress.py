"""`greenroom stress`: parses, runs the checks, prints; see `greenroom.bench.stress`."""

import json
from typing import TYPE_CHECKING, Annotated

from typer import Option

from greenroom.commands import options

if TYPE_CHECKING:
    from greenroom.bench.stress import Verdict

_TIMED = 3  # checks that take as long as they are given
_QUICK = 4.0  # seconds for each of them

Minutes = Annotated[float, Option(help="For the checks that last, all together.", min=0.05)]
Quick = Annotated[bool, Option("--quick", help="Seconds instead of minutes.")]
Context = Annotated[int, Option(help="Context in tokens.", min=32)]
Seed = Annotated[int | None, Option(help="The same seed makes the same requests.", min=0)]
Json = Annotated[bool, Option("--json", help="Print one JSON document.")]
STATUS = {"passed": 0, "failed": 1, "interrupted": 130}


def stress(
    model: options.Model,
    minutes: Minutes = 1.0,
    quick: Quick = False,
    context: Context = 256,
    threads: options.Threads = None,
    vram: options.Vram = None,
    seed: Seed = None,
    as_json: Json = False,
) -> int:
    """Treat the engine badly and see whether it keeps its promises.

    A verdict per check; the exit status is 1 if one fails. Ctrl-C ends it with the verdicts so
    far.
    """
    from greenroom.bench.stress import Subject, run_checks
    from greenroom.bench.stress_checks import CHECKS
    from greenroom.engine.config import EngineConfig
    from greenroom.gguf import GGUFFile

    EngineConfig(threads=threads, vram=vram)  # a wrong option is no failure of the engine
    GGUFFile(model).close()
    subject = Subject(
        path=model,
        settings={"threads": threads, "vram": vram},
        seconds=_QUICK if quick else minutes * 60 / _TIMED,
        context=context,
        seed=seed or 0,
    )
    document = run_checks(subject, CHECKS, lambda verdict: _tell(verdict, as_json))
    if as_json:
        print(json.dumps(document))
    else:
        print(f"{document['status']}: {document['model']}")
    return STATUS[document["status"]]


def _tell(verdict: "Verdict", quiet: bool) -> None:
    from greenroom.commands.console import errors

    line = f"{verdict.status:15} {verdict.name:16} {verdict.detail} ({verdict.seconds:.1f} s)"
    if quiet:
        errors.print(line, style="dim", markup=False, soft_wrap=True)
    else:
        print(line, flush=True)

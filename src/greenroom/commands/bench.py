"""`greenroom bench`: ceilings, speed, memory and energy of a model, and against a baseline."""

import json
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from greenroom.commands import options

if TYPE_CHECKING:
    from greenroom.bench.session import Job
    from greenroom.placement.machine import Machine

Lengths = Annotated[str, Option(help="Prompt lengths, which are the decode depths too.")]
Batches = Annotated[str, Option(help="Sequences at once.")]
Generate = Annotated[int, Option(help="Tokens generated per sequence.", min=2)]
Runs = Annotated[int, Option(help="Timed runs of each case.", min=1, max=1000)]
Baseline = Annotated[
    bool, Option("--baseline", help="Also all that fits in VRAM (or the CPU alone), in turn.")
]
Against = Annotated[str | None, Option(help="Also another engine: llama.cpp (on the CPU).")]
Report = Annotated[Path | None, Option(help="Folder for report.md, report.json and plots.")]
Cold = Annotated[bool, Option("--cold/--no-cold", help="Also load with an empty page cache.")]
Ceilings = Annotated[bool, Option("--ceilings/--no-ceilings", help="Measure the machine first.")]


def bench(
    model: options.Model,
    lengths: Lengths = "512,2048",
    batches: Batches = "1,4",
    generate: Generate = 64,
    runs: Runs = 5,
    baseline: Baseline = False,
    against: Against = None,
    report: Report = None,
    cold: Cold = True,
    ceilings: Ceilings = True,
    threads: options.Threads = None,
    context: options.Context = None,
    vram: options.Vram = None,
    mmap: options.Mmap = False,
    explain: options.Explain = False,
) -> None:
    """Measure a model here; the last line of standard output is one JSON document.

    Each engine runs in a process of its own; with --baseline they take turns. Times are those
    of the tokens, rates are medians over the runs.
    """
    from greenroom.bench.session import Job
    from greenroom.bench.speed import Schedule, cases, model_facts
    from greenroom.placement.machine import machine

    wide, long = _numbers("batches", batches), _numbers("lengths", lengths)
    _check(against)
    settings = {
        "threads": threads,
        "context_length": context or max(long) + generate + 64,
        "max_sequences": max(wide),
        "prefix_cache": False,
    }
    jobs = [Job("greenroom", model, settings | {"vram": vram, "mmap": mmap}, cold, explain)]
    here = machine([model.resolve().parent])
    if baseline:
        # All on the GPU if there is one, all on the CPU otherwise.
        jobs.append(Job("baseline", model, settings | {"vram": "max" if here.gpus else None}))
    schedule = Schedule(cases(long, wide, generate), runs)
    document = _measured(jobs, schedule, model_facts(model), here, ceilings)
    if against is not None:
        document["against"] = _against(model, here, min(long), generate, runs, threads)
    _show(document, report)
    print(json.dumps(document), flush=True)


def _numbers(field: str, text: str) -> list[int]:
    from greenroom.errors import RequestError

    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise RequestError(f"--{field} must be numbers from 1 on, like 1,4, not {text!r}", field)
    return found


def _check(against: str | None) -> None:
    import importlib.util

    from greenroom.errors import RequestError

    if against not in (None, "llama.cpp"):
        raise RequestError(f"--against knows llama.cpp, not {against!r}", "against")
    if against is not None and importlib.util.find_spec("xllamacpp") is None:
        raise RequestError("--against llama.cpp needs it: pip install xllamacpp", "against")


def _measured(
    jobs: "list[Job]", schedule: Any, facts: dict[str, Any], here: "Machine", ceilings: bool
) -> dict[str, Any]:
    from greenroom.bench.prediction import add_predictions, profile_of, work_of
    from greenroom.bench.session import Remote
    from greenroom.bench.speed import document, measure
    from greenroom.commands.console import errors

    limits: dict[str, Any] = {}
    with ExitStack() as stack:
        status = stack.enter_context(errors.status("measuring the machine"))
        if ceilings:
            limits = _ceilings(jobs[0], here)
        sessions = {job.name: Remote(job) for job in jobs}
        for remote in sessions.values():
            stack.callback(remote.close)
        for name, remote in sessions.items():
            status.update(f"loading {jobs[0].path.name} ({name})")
            remote.load()
        found = measure(sessions, schedule, status.update)
        whole = {**document(facts, here, schedule, sessions, found), "ceilings": limits}
    if limits:
        add_predictions(whole, work_of(jobs[0].path), profile_of(limits, here))
    return whole


def _ceilings(job: "Job", here: "Machine") -> dict[str, Any]:
    """The machine's rates now, for the formats of the model."""
    from dataclasses import replace

    import torch

    from greenroom.bench.ceilings import effort, gpu_rates, processor_rates
    from greenroom.bench.prediction import host_seconds, profile_of, work_of
    from greenroom.commands.doctor import small_models

    threads = job.settings["threads"] or here.processor.threads
    work, much = work_of(job.path), effort(True, here)
    known = effort(False, here).formats
    needed = {*work.dense, *work.experts, "Q8_0", "F32"}  # these are of the small models
    formats = tuple(name for name in known if name in needed)
    limits = processor_rates(threads, replace(much, formats=formats or much.formats))
    with small_models() as small:
        limits |= host_seconds(small, replace(profile_of(limits, here), threads=threads))
    if torch.cuda.is_available():
        limits |= gpu_rates(3)
        torch.cuda.empty_cache()
    return limits


def _against(
    model: Path, here: "Machine", prompt: int, generate: int, runs: int, threads: int | None
) -> dict[str, Any]:
    from dataclasses import asdict

    from greenroom.bench import peer

    workload = peer.Workload(prompt, generate, runs)
    rates = peer.compare(model, threads or here.processor.threads, workload)
    return {engine: asdict(rate) for engine, rate in rates.items()}


def _show(document: dict[str, Any], report: Path | None) -> None:
    from rich.console import Console
    from rich.table import Table

    from greenroom.bench import speed_report as shown
    from greenroom.commands.console import errors
    from greenroom.commands.explain import show_layers

    ours = document["results"]["greenroom"]
    if ours["layers"]:
        show_layers(ours["layers"], ours["experts"] or {}, errors)
    console = Console(highlight=False)
    for line in shown.ceiling_lines(document):
        console.print(line)
    for head, body in (
        (shown.HEAD, shown.rows(document)),
        (shown.MEMORY_HEAD, shown.memory_rows(document)),
    ):
        table = Table(*head, box=None, padding=(0, 2, 0, 0))
        for row in body:
            table.add_row(*row)
        console.print(table)
    for line in shown.baseline_lines(document):
        console.print(line)
    for line in shown.peer_lines(document):
        console.print(line)
    if report is not None:
        files = shown.write_report(document, report)
        if not any(name.endswith(".png") for name in files):
            errors.print("matplotlib is missing, so no plots were drawn")

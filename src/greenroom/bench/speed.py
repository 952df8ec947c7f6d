"""The speed benchmark: ceilings, then every case several times, sessions in turn; one document.

Knows sessions only by `run` and `facts`, so that a test can give it known times.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from greenroom.bench import statistics
from greenroom.bench.workloads import Case, Run
from greenroom.placement.machine import Machine

KIND, VERSION = "bench", 1
Tell = Callable[[str], None]


class Measurable(Protocol):
    """What can be benchmarked; see `greenroom.bench.session.Session`."""

    def run(self, case: Case, seed: int) -> Run:
        """One run."""

    def facts(self) -> dict[str, Any]:
        """Load time, memory, hits."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """Cases and how often each is timed, after one run that warms up."""

    cases: tuple[Case, ...]
    runs: int = 5


def cases(
    lengths: Sequence[int], batches: Sequence[int], generate: int, context: int | None = None
) -> tuple[Case, ...]:
    """One sequence at every prompt length; every batch size at the shortest."""
    single = [Case(length, 1, generate) for length in sorted(set(lengths))]
    several = [Case(min(lengths), batch, generate) for batch in sorted(set(batches)) if batch > 1]
    fitting = [c for c in single + several if context is None or c.prompt + generate <= context]
    return tuple(fitting)


def measure(
    sessions: Mapping[str, Measurable], schedule: Schedule, tell: Tell = lambda _: None
) -> dict[str, dict[str, list[Run]]]:
    """Runs by session and case; the sessions take turns, so that both see the same machine."""
    found: dict[str, dict[str, list[Run]]] = {name: {} for name in sessions}
    for case in schedule.cases:
        for seed in range(schedule.runs + 1):
            order = list(sessions)[:: 1 if seed % 2 else -1]
            for name in order:
                tell(f"{name}: {case.name}, run {seed} of {schedule.runs}")
                run = sessions[name].run(case, seed)
                if seed:
                    found[name].setdefault(case.name, []).append(run)
    return found


def summary(case: Case, runs: Sequence[Run]) -> dict[str, Any]:
    """The figures of one case over its runs, in tokens per second and seconds."""
    rates = [run.decode for run in runs if run.decode is not None]
    pauses = [gap for run in runs for gap in run.gaps]
    joules = [run.joules for run in runs if run.joules is not None]
    tokens = case.batch * case.generate
    return {
        **asdict(case),
        "prefill": statistics.summarise([run.prefill for run in runs]).json(),
        "first_token": statistics.summarise([t for run in runs for t in run.first]).json(),
        "decode": statistics.summarise(rates).json() if rates else None,
        "between_tokens": statistics.percentiles(pauses) if pauses else None,
        "curves": {
            "first_token": statistics.curve([t for run in runs for t in run.first]),
            "between_tokens": statistics.curve(pauses) if pauses else None,
        },
        "joules_per_token": statistics.summarise([j / tokens for j in joules]).json()
        if joules
        else None,
    }


def against(ours: Sequence[Run], base: Sequence[Run]) -> dict[str, Any]:
    """How much slower ours is than the baseline, as ratios of their rates, run by run."""
    pairs = {
        "prefill": ([r.prefill for r in ours], [r.prefill for r in base]),
        "decode": (
            [r.decode for r in ours if r.decode is not None],
            [r.decode for r in base if r.decode is not None],
        ),
    }
    return {
        name: statistics.paired_ratio(*pair).json()
        for name, pair in pairs.items()
        if pair[0] and len(pair[0]) == len(pair[1])
    }


def savings(ours: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, float]:
    """What share of the baseline's peak memory is saved, by tier."""
    return {
        tier: 1 - ours[tier] / base[tier]
        for tier in ("peak_vram", "peak_vram_torch", "peak_rss")
        if base.get(tier)
    }


def document(
    model: Mapping[str, Any],
    machine: Machine | None,
    schedule: Schedule,
    sessions: Mapping[str, Measurable],
    found: Mapping[str, Mapping[str, list[Run]]],
) -> dict[str, Any]:
    """Everything that was measured, ready for JSON."""
    by_name = {case.name: case for case in schedule.cases}
    results = {
        name: {
            **sessions[name].facts(),
            "cases": {key: summary(by_name[key], runs) for key, runs in of.items()},
        }
        for name, of in found.items()
    }
    whole: dict[str, Any] = {
        "kind": KIND,
        "version": VERSION,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command_line(),
        "machine": None if machine is None else public(machine),
        "model": dict(model),
        "runs": schedule.runs,
        "results": results,
    }
    if "baseline" in found and "greenroom" in found:
        ours, base = found["greenroom"], found["baseline"]
        whole["baseline"] = {
            "speed": {key: against(ours[key], base[key]) for key in ours},
            "saved": savings(results["greenroom"], results["baseline"]),
        }
    return whole


def command_line() -> str:
    """The call, with absolute paths cut to their names: reports are for others to read."""
    words = [Path(word).name if word.startswith("/") else word for word in sys.argv[1:]]
    return " ".join(["greenroom", *words])


def public(machine: Machine) -> dict[str, Any]:
    """Facts of the machine without the names of this user's folders."""
    facts = machine.json()
    for disk in facts["disks"]:
        disk["folder"] = Path(disk["folder"]).name
    return facts


def model_facts(path: Path) -> dict[str, Any]:
    """Name, bytes and a digest of the header (metadata and tensor table, not the weights)."""
    import hashlib

    from greenroom.gguf import GGUFFile

    with GGUFFile(path) as file:
        table = [f"{t.name} {t.type.name} {t.ne}" for t in file.tensors.values()]
        name = file.metadata.get("general.name")
        kind = file.metadata.get("general.architecture")
        size = file.nbytes
    digest = hashlib.sha256("\n".join([str(kind), str(name), *table]).encode()).hexdigest()
    return {"file": path.name, "name": name, "architecture": kind, "bytes": size, "header": digest}

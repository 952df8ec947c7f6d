"""What the planner predicts for a benchmark's cases, beside what was measured, and the times of a
step that do not depend on a model's size. Knows engines and rates; knows no tables.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from greenroom.bench.statistics import relative_error
from greenroom.bench.workloads import Case, run_case
from greenroom.gguf import GGUFFile
from greenroom.models.registry import read_config
from greenroom.placement import predict
from greenroom.placement.calibrate import MachineProfile
from greenroom.placement.placement import Placement

_CASE = Case(prompt=16, batch=1, generate=96)
_ON_THE_CPU = Placement(backend="native", reason="")


def work_of(path: Path) -> predict.Work:
    """What computing a token takes of a file."""
    with GGUFFile(path) as file:
        return predict.Work.of(file.tensors, read_config(file))


def line(small: tuple[int, float], large: tuple[int, float]) -> tuple[float, float]:
    """Start and slope of the line through (matrices, seconds) twice; neither is negative."""
    slope = max(0.0, (large[1] - small[1]) / (large[0] - small[0]))
    return max(0.0, small[1] - slope * small[0]), slope


def host_seconds(models: Sequence[Path], profile: MachineProfile) -> dict[str, float]:
    """`step_seconds` and `matrix_seconds` of a profile, from decode steps of two small models, one
    of few layers, one of many; what their weights and attention take is taken off.
    """
    from greenroom.engine import LLM

    points: list[tuple[int, float]] = []
    settings: dict[str, Any] = {"vram": "0", "context_length": 256, "max_sequences": 1}
    for path in models:
        with LLM(path, threads=profile.threads, **settings) as llm:
            pauses = [gap for seed in range(4) for gap in run_case(llm, _CASE, seed).gaps]
        work = work_of(path)
        known = sum(predict.decode(work, _ON_THE_CPU, profile, _CASE.prompt).parts.values())
        points.append((work.matrices, max(0.0, statistics.median(pauses) - known)))
    start, slope = line(points[0], points[1])
    return {"step_seconds": start, "matrix_seconds": slope}


def add_predictions(document: dict[str, Any], work: predict.Work, profile: MachineProfile) -> None:
    """Puts "predicted" into every case: rates by the profile, and their error relative to the
    measured medians (0.1: predicted 10 % too high).
    """
    for result in document["results"].values():
        place = Placement(**result["placement"]) if result["placement"] else None
        for case in result["cases"].values():
            case["predicted"] = None if place is None else _of_case(case, place, work, profile)


def _of_case(
    case: Mapping[str, Any], place: Placement, work: predict.Work, profile: MachineProfile
) -> dict[str, Any]:
    asked = Case(case["prompt"], case["batch"], case["generate"])
    depth = asked.prompt + asked.generate // 2
    rates = {
        "prefill": predict.prefill(work, place, profile, asked.prompt, asked.batch).rate,
        "decode": predict.decode(work, place, profile, depth, asked.batch).rate,
    }
    return {
        name: {"rate": rate, "error": relative_error(rate, case[name]["median"])}
        for name, rate in rates.items()
        if case[name] and case[name]["median"]
    }


def profile_of(ceilings: Mapping[str, Any], place: Any) -> MachineProfile:
    """Ceilings measured just now as a profile; `place` is the machine they are of."""
    ram = place.memory
    gpu = place.gpus[0] if place.gpus else None
    empty = MachineProfile(
        fingerprint=place.fingerprint,
        name=place.processor.name,
        date="now",
        threads=place.processor.threads,
        ram=min(ram.total, ram.limit or ram.total),
        gpu=gpu.name if gpu else None,
        vram_total=gpu.total if gpu else 0,
    )
    return replace(empty, **ceilings)

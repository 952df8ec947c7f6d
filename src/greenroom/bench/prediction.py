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
from greenroom.placement.work import Work

# Steps of one sequence and of several; prompts.
_ONE, _MANY, _SHORT, _LONG = Case(16, 1, 96), Case(16, 8, 32), Case(32, 1, 2), Case(384, 1, 2)
_ON_THE_CPU = Placement(backend="native", reason="")


def work_of(path: Path) -> Work:
    """What computing a token takes of a file."""
    with GGUFFile(path) as file:
        return Work.of(file.tensors, read_config(file))


def line(small: tuple[int, float], large: tuple[int, float]) -> tuple[float, float]:
    """Start and slope of the line through (matrices, seconds) twice; neither is negative."""
    slope = max(0.0, (large[1] - small[1]) / (large[0] - small[0]))
    return max(0.0, small[1] - slope * small[0]), slope


def host_seconds(models: Sequence[Path], profile: MachineProfile) -> dict[str, float]:
    """`step_seconds` and the like of a profile, from steps of two small models, one of few layers
    and one of many; what their weights and attention take is taken off.
    """
    from greenroom.engine import LLM

    points: list[tuple[int, float]] = []
    found: dict[str, float] = {}
    settings: dict[str, Any] = {"vram": "0", "context_length": 512, "max_sequences": _MANY.batch}
    for path in models:
        work = work_of(path)
        with LLM(path, threads=profile.threads, **settings) as llm:
            points.append((work.matrices, _beside(llm, _ONE, work, profile)))
            if not found:  # from the smaller one
                many = _beside(llm, _MANY, work, profile) - points[0][1]
                short, long = (
                    (case.prompt, _beside(llm, case, work, profile, "prefill") - points[0][1])
                    for case in (_SHORT, _LONG)
                )
                found["sequence_seconds"] = max(0.0, many / (_MANY.batch - 1))
                found["prompt_seconds"], found["token_seconds"] = line(short, long)
    start, slope = line(points[0], points[1])
    return found | {"step_seconds": start, "matrix_seconds": slope}


def _beside(
    llm: Any, case: Case, work: Work, profile: MachineProfile, part: str = "decode"
) -> float:
    """Seconds of a step beside what weights and attention take."""
    runs = [run_case(llm, case, seed) for seed in range(5)][1:]
    if part == "prefill":
        known = predict.prefill(work, _ON_THE_CPU, profile, case.prompt)
        taken = [case.prompt / run.prefill for run in runs]
    else:
        depth = case.prompt + case.generate // 2
        known = predict.decode(work, _ON_THE_CPU, profile, depth, case.batch)
        taken = [gap for run in runs for gap in run.gaps]
    return max(0.0, statistics.median(taken) - sum(known.parts.values()))


def add_predictions(document: dict[str, Any], work: Work, profile: MachineProfile) -> None:
    """Puts "predicted" into every case: rates by the profile, and their error relative to the
    measured medians (0.1: predicted 10 % too high).
    """
    for result in document["results"].values():
        place = Placement(**result["placement"]) if result["placement"] else None
        for case in result["cases"].values():
            case["predicted"] = None if place is None else _of_case(case, place, work, profile)


def _of_case(
    case: Mapping[str, Any], place: Placement, work: Work, profile: MachineProfile
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

"""Speed against VRAM: one model under one budget after another, the largest first, so that every
other is compared with it in the same run. Knows engines only as `open_engine` gives them.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from greenroom.bench import statistics
from greenroom.bench.workloads import Case, run_case
from greenroom.errors import BudgetError
from greenroom.placement.budget import parse_size

KIND, VERSION = "sweep", 1
GIB = 2**30

# A step is compiled, recorded and replayed, and then clocks and residents settle.
_WARM_TOKENS, _WARM_SECONDS = 8, 1.0

HEAD = ("budget GiB", "peak GiB", "driver GiB", "experts in VRAM", "hits", "prefill tokens/s",
        "decode tokens/s", "of the largest budget's", "VRAM saved")  # fmt: skip

# Opens the model under a budget: the engine, and a function that tells what VRAM it took.
OpenEngine = Callable[[str], tuple[Any, Callable[[], "Memory"]]]


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of VRAM: what the allocator had at most, and what the driver has beside that for its
    context, programs and graphs.
    """

    peak: int = 0
    driver: int = 0


@dataclass(frozen=True, slots=True)
class Point:
    """What one budget gave.

    Attributes:
        budget: as it was asked for, and in bytes (None: max).
        refused: what the engine said if it could not run; the rest is then empty.
        memory: of VRAM; the allocator's peak is what the budget bounds.
        resident: share of the experts with a slot.
        hits: share of the routes that found one, None without slots.
        prefill, decode: tokens per second over the runs.
        same: the budget these figures are of, whose placement is the same; None for this one.
        seconds: opening, warming up and running took.
    """

    budget: str
    nbytes: int | None
    refused: str | None = None
    memory: Memory = Memory()
    resident: float = 0.0
    hits: float | None = None
    prefill: Mapping[str, float] | None = None
    decode: Mapping[str, float] | None = None
    same: str | None = None
    seconds: float = 0.0


def measure(
    budgets: Sequence[str], case: Case, runs: int, open_engine: OpenEngine,
    tell: Callable[[str], None] = lambda _: None,
    placed: Callable[[str], Any] = lambda budget: budget,
) -> Iterator[Point]:  # fmt: skip
    """One point per budget, as each is done.

    Args:
        budgets: as `--vram` takes them.
        case: what is asked; before that, with few tokens, to warm up.
        runs: timed ones.
        open_engine: opens the model.
        tell: is told what happens.
        placed: what would be placed where; equal placements are measured once.
    """
    done: list[tuple[Any, Point]] = []
    for budget in budgets:
        tell(f"VRAM {budget}")
        nbytes, place = parse_size(budget, "vram"), placed(budget)
        point = next((p for other, p in done if other == place and _fits(p, nbytes)), None)
        if point is None:
            begin = time.perf_counter()
            point = _point(budget, nbytes, case, runs, open_engine)
            point = replace(point, seconds=time.perf_counter() - begin)
            done.append((place, point))
        else:
            point = replace(point, budget=budget, nbytes=nbytes, same=point.budget, seconds=0.0)
        yield point


def _fits(point: Point, nbytes: int | None) -> bool:
    """Whether what was measured would have been possible with so many bytes, too."""
    return point.refused is None and (nbytes is None or point.memory.peak <= nbytes)


def _point(
    budget: str, nbytes: int | None, case: Case, runs: int, open_engine: OpenEngine
) -> Point:
    """One budget; the engine is gone when this returns."""
    try:
        llm, memory = open_engine(budget)
    except BudgetError as error:
        return Point(budget, nbytes, refused=str(error))
    with llm:
        _warm(llm, case)
        timed = [run_case(llm, case, seed) for seed in range(1, runs + 1)]
        experts = llm.engine.stats().get("experts") or {}
        return Point(
            budget,
            nbytes,
            memory=memory(),
            resident=_resident(llm.engine),
            hits=_share(experts.get("hits", 0), experts.get("misses", 0)),
            prefill=statistics.summarise([run.prefill for run in timed]).json(),
            decode=statistics.summarise([run.decode or 0.0 for run in timed]).json(),
        )


def _warm(llm: Any, case: Case) -> None:
    """A short run, which may have to compile, and as many more as fit into a second."""
    short = replace(case, generate=min(case.generate, _WARM_TOKENS))
    left, last = _WARM_SECONDS, 0.0
    while left > last:
        begin = time.perf_counter()
        run_case(llm, short, 0)
        last = time.perf_counter() - begin
        left -= last


def _resident(engine: Any) -> float:
    """Share of the model's experts that have a slot."""
    moe, place = engine.model_config.moe, engine.placement
    if moe is None or place is None:
        return 0.0
    layers = engine.model_config.layers - moe.dense_layers
    return float(place.slots / (layers * moe.experts))


def _share(hits: int, misses: int) -> float | None:
    return hits / (hits + misses) if hits + misses else None


def within(point: Point) -> bool:
    """Whether the peak stayed under the budget."""
    return point.nbytes is None or point.memory.peak <= point.nbytes


def rows(points: Sequence[Point]) -> list[tuple[str, ...]]:
    """One line per point; the first is what the others are compared with."""
    base = next((p for p in points if p.decode), None)
    lines = []
    for point in points:
        budget = point.budget if point.nbytes is None else f"{point.nbytes / GIB:g}"
        budget += f" (as {point.same})" * bool(point.same)
        if point.decode is None or point.prefill is None or base is None or base.decode is None:
            lines.append((budget, *"-----", point.refused or "-", "-", "-"))
            continue
        lines.append(
            (
                budget,
                f"{point.memory.peak / GIB:.2f}" + ("" if within(point) else " (OVER)"),
                f"{point.memory.driver / GIB:.2f}",
                f"{point.resident:.0%}",
                "-" if point.hits is None else f"{point.hits:.0%}",
                f"{point.prefill['median']:.0f}",
                f"{point.decode['median']:.1f} ({point.decode['iqr']:.1f})",
                f"{point.decode['median'] / base.decode['median']:.1%}",
                f"{1 - point.memory.peak / base.memory.peak:.1%}" if base.memory.peak else "-",
            )
        )
    return lines


def markdown(document: Mapping[str, Any], points: Sequence[Point]) -> str:
    """The report."""
    lines = [f"# Speed against VRAM: {document['model']}", ""]
    lines += [f"`{document['command']}`, {document['date']}.", ""]
    if document.get("gpus"):
        lines += [f"Machine: {', '.join(document['gpus'])}.", ""]
    lines += [
        f"{document['runs']} runs of {document['case']}; medians, interquartile range in brackets. "
        "The budget bounds the peak of what is allocated; the driver's own memory is beside it. "
        "Where a budget leads to the placement of one before, it has its figures, and says so. "
        "Packed experts stay in RAM from one budget to the next.",
        "",
    ]  # fmt: skip
    table = [HEAD, ("---",) * len(HEAD), *rows(points)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in table), ""])


def write_report(document: Mapping[str, Any], points: Sequence[Point], folder: Path) -> list[str]:
    """Writes sweep.json, sweep.md and, with matplotlib, sweep.png; the names written."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = {**document, "points": [asdict(point) for point in points]}
    (folder / "sweep.json").write_text(json.dumps(whole, indent=1) + "\n")
    (folder / "sweep.md").write_text(markdown(document, points))
    return ["sweep.json", "sweep.md", *plot(document, points, folder)]


def plot(document: Mapping[str, Any], points: Sequence[Point], folder: Path) -> list[str]:
    """Decode rate over peak VRAM, with quartiles; nothing where matplotlib is missing."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return []
    measured = [(p.memory.peak / GIB, p.decode, p.resident) for p in points if p.decode]
    drawn = sorted(measured, key=lambda point: point[0])
    figure, axis = pyplot.subplots(figsize=(6.4, 3.6))
    middle = [decode["median"] for _, decode, _ in drawn]
    down = [decode["median"] - decode["q1"] for _, decode, _ in drawn]
    up = [decode["q3"] - decode["median"] for _, decode, _ in drawn]
    axis.errorbar([at for at, _, _ in drawn], middle, yerr=[down, up], marker="o", capsize=3)
    for at, decode, resident in drawn:
        axis.annotate(f"{resident:.0%}", (at, decode["median"]), (4, -11), fontsize=7,
                      textcoords="offset points")  # fmt: skip
    axis.set_xlabel("peak VRAM, GiB (labels: experts in VRAM)")
    axis.set_ylabel("decode, tokens/s")
    axis.set_title(str(document["model"]), fontsize=10)
    axis.set_ylim(bottom=0)
    figure.tight_layout()
    figure.savefig(folder / "sweep.png", dpi=100)
    pyplot.close(figure)
    return ["sweep.png"]

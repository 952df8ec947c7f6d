"""The table over several models: each written with random weights, measured, and deleted again.

Knows how to make, measure and evaluate one file; every cell is measured or says why not. The
weights are random, so routing is nearly uniform, which is the worst case for a cache of experts.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from greenroom.bench import speed
from greenroom.bench.prediction import work_of
from greenroom.bench.quality_report import Evaluation, run_evaluation
from greenroom.bench.session import Job, Remote
from greenroom.bench.workloads import Case
from greenroom.engine.llm import plan
from greenroom.errors import BudgetError, GreenroomError
from greenroom.gguf import GGUFFile
from greenroom.models.registry import read_config
from greenroom.placement import predict
from greenroom.placement.placement import Placement

SHAPES = (
    *("gpt-oss-20b", "phi-3.5-moe", "deepseek-moe-16b"),
    *("mixtral-8x7b", "grin-moe", "qwen3-30b-a3b"),
)
KIND, VERSION = "matrix", 1
_CONTEXT = 128
_TEXT = "The old house on the hill had a green door. Nobody had opened it for forty years. " * 12

HEAD = ("model", "architecture", "layers", "GiB", "parameters", "experts", "VRAM GiB", "RAM GiB",
        "load s", "first token s", "decode tokens/s", "VRAM saved", "RAM saved", "speed kept",
        "mean KL", "same next token")  # fmt: skip
_MOST_MIB = 4096  # of a tiny shape's budget


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How each file is measured: budget, threads, tokens, runs; quality is that of the "whole"
    file, of its "tiny" shape or of "none".
    """

    vram: str | None
    threads: int | None
    prompt: int
    generate: int
    runs: int
    quality: str


def measured(path: Path, how: Plan, gpu: bool, tell: Callable[[str], None]) -> dict[str, Any]:
    """One file under the budget and, in turn, all on the GPU (or all in RAM without one)."""
    settings = {
        "threads": how.threads,
        "context_length": how.prompt + how.generate + 64,
        "max_sequences": 1,
        "prefix_cache": False,
    }
    jobs = [
        Job("baseline", path, settings | {"vram": "max" if gpu else None}),
        Job("greenroom", path, settings | {"vram": how.vram, "mmap": not gpu}),
    ]
    schedule = speed.Schedule((Case(how.prompt, 1, how.generate),), how.runs)
    with ExitStack() as stack:
        sessions = {job.name: Remote(job) for job in jobs}
        for remote in sessions.values():
            stack.callback(remote.close)
        for name, remote in sessions.items():
            tell(f"loading {path.name} ({name})")
            remote.load()
        found = speed.measure(sessions, schedule, tell)
        return speed.document(speed.model_facts(path), None, schedule, sessions, found)


def quality(path: Path, vram: str | None, threads: int | None, tell: Callable[[str], None]) -> Any:
    """Divergence from the float32 path on a short text, or why there is none."""
    text = path.with_name("text.txt")
    text.write_text(_TEXT)
    job = Evaluation(
        model=path, text=text, reference="float32", vram=(vram,) if vram else (),
        context=_CONTEXT, max_tokens=256, threads=threads,
    )  # fmt: skip
    try:
        return run_evaluation(job, tell)["placements"][0]
    except (GreenroomError, RuntimeError) as error:  # the rest of the row is worth having
        return {"problem": str(error)}
    finally:
        text.unlink()


def budget_like(share: float, path: Path) -> str | None:
    """The least budget that places all layers and `share` of a small file's experts in VRAM."""

    def enough(size: int) -> bool:
        try:
            found = plan(path, vram=f"{size}MiB", context_length=_CONTEXT, max_sequences=1)
        except BudgetError:
            return False
        whole = found.layers_on_gpu == found.layers and found.head_on_gpu
        return whole and found.slots >= share * count

    with GGUFFile(path) as file:
        config = read_config(file)
    assert config.moe is not None
    count = (config.layers - config.moe.dense_layers) * config.moe.experts
    size = bisect_left(range(_MOST_MIB), True, key=enough)
    return f"{size}MiB" if size < _MOST_MIB else None


def resident(path: Path, result: Mapping[str, Any]) -> float:
    """Share of a measured file's experts that had a place in VRAM under the budget."""
    place = result["results"]["greenroom"]["placement"]
    return predict.resident(Placement(**place), work_of(path)) if place else 0.0


def row(facts: Mapping[str, Any], result: Mapping[str, Any], judged: Any) -> dict[str, str]:
    """The table's cells of one model; `facts` are those of `greenroom inspect`."""
    ours = result["results"]["greenroom"]
    (case,) = ours["cases"].values()
    (ratios,) = result["baseline"]["speed"].values()
    saved, experts = result["baseline"]["saved"], facts["experts"]
    kept = ratios["decode"]
    cells = (
        facts["name"] or "?",
        facts["architecture"],
        str(facts["layers"]),
        f"{facts['bytes']['all'] / 2**30:.2f}",
        f"{facts['parameters'] / 1e9:.2f} billion",
        f"{experts['used']} of {experts['count']}" + (" + shared" * bool(experts["shared_width"])),
        f"{ours['peak_vram'] / 2**30:.2f}",
        f"{ours['peak_rss'] / 2**30:.2f}",
        f"{ours['load_seconds']['warm']:.2f}",
        f"{case['first_token']['median']:.3f}",
        f"{case['decode']['median']:.1f}",
        _percent(saved.get("peak_vram")),
        _percent(saved.get("peak_rss")),
        f"{kept['value']:.2f} ({kept['low']:.2f}-{kept['high']:.2f})",
        *_judged(judged),
    )
    return dict(zip(HEAD, cells, strict=True))


def _judged(judged: Any) -> tuple[str, str]:
    """Divergence and agreement, with the file they are of unless it is the measured one."""
    if not isinstance(judged, dict) or "kl_mean" not in judged:
        return "-", "-"
    where = f" ({judged['of']})" if judged.get("of") else ""
    return f"{judged['kl_mean']:.2e}{where}", f"{judged['top1_agreement']:.1%}{where}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def markdown(document: Mapping[str, Any]) -> str:
    """The table to paste, with what each column means."""
    lines = ["# Models side by side", "", f"`{document['command']}`, {document['date']}.", ""]
    lines += [
        "Random weights in published shapes; every cell is measured. Peaks are of the process; "
        "saved and kept are relative to all on the GPU, or to all in RAM where there is none; KL "
        "and agreement are against the float32 path on 254 positions. Where they are marked so, "
        "they are of a file of the same architecture in a few megabytes, with the same share of "
        "its experts in VRAM.",
        "",
    ]
    return "\n".join([*lines, *_table(document), ""])


def _table(document: Mapping[str, Any]) -> Iterator[str]:
    for cells in (HEAD, ("---",) * len(HEAD), *(r["row"].values() for r in document["models"])):
        yield "| " + " | ".join(cells) + " |"

"""The table over several models: each written with random weights, measured, and deleted again.

Knows how to make, measure and evaluate one file; every cell is measured or says why not. The
weights are random, so routing is nearly uniform, which is the worst case for a cache of experts.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from greenroom.bench import speed
from greenroom.bench.quality_report import Evaluation, run_evaluation
from greenroom.bench.session import Job, Remote
from greenroom.bench.workloads import Case
from greenroom.errors import GreenroomError

SHAPES = (
    *("gpt-oss-20b", "phi-3.5-moe", "deepseek-moe-16b"),
    *("mixtral-8x7b", "grin-moe", "qwen3-30b-a3b"),
)
KIND, VERSION = "matrix", 1
_TEXT = "The old house on the hill had a green door. Nobody had opened it for forty years. " * 12

HEAD = ("model", "architecture", "layers", "GiB", "parameters", "experts", "VRAM GiB", "RAM GiB",
        "load s", "first token s", "decode tokens/s", "VRAM saved", "RAM saved", "speed kept",
        "mean KL")  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How each file is measured: budget, threads, tokens, runs."""

    vram: str | None
    threads: int | None
    prompt: int
    generate: int
    runs: int
    quality: bool


def measured(path: Path, plan: Plan, gpu: bool, tell: Callable[[str], None]) -> dict[str, Any]:
    """One file under the budget and, in turn, all on the GPU (or all in RAM without one)."""
    settings = {
        "threads": plan.threads,
        "context_length": plan.prompt + plan.generate + 64,
        "max_sequences": 1,
        "prefix_cache": False,
    }
    jobs = [
        Job("baseline", path, settings | {"vram": "max" if gpu else None}),
        Job("greenroom", path, settings | {"vram": plan.vram, "mmap": not gpu}),
    ]
    schedule = speed.Schedule((Case(plan.prompt, 1, plan.generate),), plan.runs)
    with ExitStack() as stack:
        sessions = {}
        for job in jobs:
            tell(f"loading {path.name} ({job.name})")
            sessions[job.name] = remote = Remote(job)
            stack.callback(remote.close)
        found = speed.measure(sessions, schedule, tell)
        return speed.document(speed.model_facts(path), None, schedule, sessions, found)


def quality(path: Path, plan: Plan, folder: Path, tell: Callable[[str], None]) -> Any:
    """Divergence from the float32 path on a short text, or why there is none."""
    text = folder / "text.txt"
    text.write_text(_TEXT)
    job = Evaluation(
        model=path, text=text, reference="float32", vram=(plan.vram,) if plan.vram else (),
        context=128, max_tokens=256, threads=plan.threads,
    )  # fmt: skip
    try:
        return run_evaluation(job, tell)["placements"][0]
    except GreenroomError as error:
        return {"problem": str(error)}
    finally:
        text.unlink()


def row(facts: Mapping[str, Any], result: Mapping[str, Any], judged: Any) -> dict[str, str]:
    """The table's cells of one model; `facts` are those of `greenroom inspect`."""
    ours = result["results"]["greenroom"]
    (case,) = ours["cases"].values()
    (ratios,) = result["baseline"]["speed"].values()
    saved, experts = result["baseline"]["saved"], facts["experts"]
    kept = ratios["decode"]
    divergence = _divergence(judged)
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
        "-" if divergence is None else f"{divergence:.2e}",
    )
    return dict(zip(HEAD, cells, strict=True))


def _divergence(judged: Any) -> float | None:
    found = judged.get("kl_mean") if isinstance(judged, dict) else None
    return float(found) if isinstance(found, int | float) else None


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def markdown(document: Mapping[str, Any]) -> str:
    """The table to paste, with what each column means."""
    lines = ["# Models side by side", "", f"`{document['command']}`, {document['date']}.", ""]
    lines += [
        "Random weights in published shapes; every cell is measured. Peaks are of the process; "
        "saved and kept are relative to all on the GPU, or to all in RAM where there is none; KL "
        "is against the float32 path.",
        "",
    ]
    return "\n".join([*lines, *_table(document), ""])


def _table(document: Mapping[str, Any]) -> Iterator[str]:
    for cells in (HEAD, ("---",) * len(HEAD), *(r["row"].values() for r in document["models"])):
        yield "| " + " | ".join(cells) + " |"

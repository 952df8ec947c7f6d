"""The evaluation as a whole: one model under several placements against one reference, and the
files that tell of it. Loads one engine at a time. Knows documents and plots, not the figures'
definitions.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from greenroom import __version__, native
from greenroom.bench.kernels import processor
from greenroom.bench.quality import Progress, Spool, Windows, evaluate, read_text, windows_of
from greenroom.engine.config import available_memory
from greenroom.errors import BudgetError, RequestError
from greenroom.gguf import GGUFFile

if TYPE_CHECKING:
    from greenroom.engine import LLM

FLOAT32 = "float32"


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What to evaluate.

    Attributes:
        model: a GGUF file.
        text: a UTF-8 file.
        reference: another GGUF file with the same vocabulary, "float32", or None: the first of
            several placements.
        vram: budgets to run under; empty for the engine's own choice.
        context: tokens of a window.
        max_tokens: most tokens of the text.
        threads: None for the engine's own choice.
    """

    model: Path
    text: Path
    reference: str | None = None
    vram: tuple[str, ...] = ()
    context: int = 512
    max_tokens: int = 4096
    threads: int | None = None

    def runs(self) -> "list[Run]":
        """What is loaded, one after another; the first is the reference if there is one."""
        runs = [
            Run(f"vram {vram}" if vram is not None else "default", self.model, {"vram": vram})
            for vram in self.vram or (None,)
        ]
        if self.reference == FLOAT32:
            runs.insert(0, Run(FLOAT32, self.model, {"backend": "reference"}))
        elif self.reference is not None:
            path = Path(self.reference)
            runs.insert(0, Run(path.name, path, {}))
        return runs


@dataclass(frozen=True, slots=True)
class Run:
    """One way of running a model: a name, a file and fields of EngineConfig."""

    name: str
    path: Path
    settings: dict[str, Any] = field(default_factory=dict)


@contextmanager
def _open(run: Run, job: Evaluation) -> "Iterator[LLM]":
    from greenroom.engine import LLM

    if run.name == FLOAT32:
        _check_float32(run.path)
    llm = LLM(
        run.path,
        max_sequences=1,
        context_length=job.context,
        prefix_cache=False,
        threads=job.threads,
        **run.settings,
    )
    try:
        yield llm
    finally:
        llm.close()


def _check_float32(path: Path) -> None:
    """The float32 path holds every weight in four bytes; better refused than killed."""
    with GGUFFile(path) as file:
        need = 4 * sum(prod(tensor.shape) for tensor in file.tensors.values())
    have = available_memory()
    if need > have:
        raise BudgetError(
            f"{path.name}: the float32 path needs {need / 2**30:.1f} GiB of RAM, but only "
            f"{have / 2**30:.1f} GiB are free; compare with a Q8_0 or F16 file instead"
        )


def run_evaluation(
    job: Evaluation, say: Callable[[str], None], progress: Progress | None = None
) -> dict[str, Any]:
    """Evaluates; returns one JSON-serialisable document of kind "eval".

    Raises:
        RequestError: the text or an option is of no use, or the vocabularies differ.
        GreenroomError: a model cannot be loaded.
    """
    text, runs = read_text(job.text), job.runs()
    spool: Spool | None = None
    windows: Windows | None = None
    base, results, curves = None, [], {}
    try:
        for index, run in enumerate(runs):
            say(f"{run.name}: scoring {job.text.name}")
            with _open(run, job) as llm:
                found = windows_of(llm.tokenizer, text, job.context, job.max_tokens)
                if windows is not None and found != windows:
                    raise RequestError(
                        f"{run.path.name} and {runs[0].path.name} cut the text into different "
                        "tokens; a reference needs the same vocabulary",
                        "reference",
                    )
                windows, keep = found, None
                if index == 0 and len(runs) > 1:
                    keep = spool = Spool(windows, llm.engine.model_config.vocabulary_size)
                known = spool if index else None
                scores = evaluate(llm, windows, known, keep, progress)
                results.append(_result(run, llm) | scores.summary(base))
            if index == 0:
                base = np.concatenate(scores.nll)
            else:
                curves[run.name] = np.quantile(np.concatenate(scores.kl), np.linspace(0, 1, 101))
    finally:
        if spool is not None:
            spool.close()
    assert windows is not None
    return _document(job, windows, results, curves)


def _result(run: Run, llm: "LLM") -> dict[str, Any]:
    return {
        "name": run.name,
        "file": run.path.name,
        "backend": llm.engine.config.backend,
        "memory_bytes": llm.engine.stats()["memory"],
    }


def _document(
    job: Evaluation, windows: Windows, results: list[dict[str, Any]], curves: dict[str, Any]
) -> dict[str, Any]:
    compared = len(results) > 1
    return {
        "kind": "eval",
        "version": __version__,
        "model": {"file": job.model.name, "bytes": job.model.stat().st_size},
        "text": {
            "file": job.text.name,
            "windows": len(windows.tokens),
            "context": windows.context,
            "positions": windows.positions,
        },
        "machine": {"processor": processor(), "native": native.usable_tiers()[-1]},
        "reference": results[0] if compared else None,
        "placements": results[1:] if compared else results,
        "kl_percentiles": {name: curve.tolist() for name, curve in curves.items()},
    }


def markdown(document: dict[str, Any]) -> str:
    """The document as a table to paste."""
    text, model = document["text"], document["model"]
    lines = [
        f"# Quality of {model['file']}",
        "",
        f"{text['file']}: {text['positions']} predicted tokens in {text['windows']} windows of "
        f"{text['context']}. {document['machine']['processor']}, "
        f"{document['machine']['native']} kernels, Greenroom {document['version']}.",
        "± is the standard error, positions taken as independent.",
        "",
        "| run | backend | perplexity | ratio | mean KL | median | 99 % | same top-1 "
        "| largest logit difference |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    reference = document["reference"]
    rows = ([reference | {"name": reference["name"] + " (reference)"}] if reference else []) + (
        document["placements"]
    )
    return "\n".join(lines + [_row(row) for row in rows]) + "\n"


def _row(row: dict[str, Any]) -> str:
    start = (
        f"| {row['name']} | {row['backend']} "
        f"| {row['perplexity']:.3f} ± {row['perplexity_error']:.3f} "
    )
    if "kl_mean" not in row:
        return start + "| - | - | - | - | - | - |"
    return start + (
        f"| {row['perplexity_ratio']:.5f} ± {row['perplexity_ratio_error']:.5f} "
        f"| {row['kl_mean']:.2e} ± {row['kl_mean_error']:.1e} | {row['kl_median']:.2e} "
        f"| {row['kl_99']:.2e} | {row['top1_agreement']:.2%} ± {row['top1_agreement_error']:.2%} "
        f"| {row['largest_logit_difference']:.3g} |"
    )


def write_report(document: dict[str, Any], folder: Path) -> list[str]:
    """Writes report.md, report.json and, where there is a reference, kl.png.

    Returns:
        Lines about what could not be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(document, indent=1) + "\n")
    (folder / "report.md").write_text(markdown(document))
    curves = document["kl_percentiles"]
    if not curves:
        return []
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return ["kl.png left out: matplotlib is not installed (pip install 'greenroom[plots]')"]
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    for name, curve in curves.items():
        axes.semilogy(range(101), np.maximum(curve, 1e-9), label=name)
    axes.set(xlabel="percentile of positions", ylabel="KL divergence, nats")
    axes.legend()
    figure.savefig(folder / "kl.png", dpi=110)
    return []

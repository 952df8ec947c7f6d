"""`greenroom matrix`: the table over several published shapes, every cell measured here."""

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from greenroom.commands import options

if TYPE_CHECKING:
    from greenroom.bench.matrix import Plan
    from greenroom.convert.synth_shapes import Shape

Tell = Callable[[str], None]
Work = Annotated[Path, Option(help="Folder for the model files.")]
Shapes = Annotated[str | None, Option(help="Shapes of 'synth' to measure.  [default: six]")]
Tiny = Annotated[bool, Option("--tiny", help="The same architectures in a few megabytes.")]
Layers = Annotated[int | None, Option(help="Layers instead of the published ones.", min=1)]
Runs = Annotated[int, Option(help="Timed runs.", min=1, max=1000)]
Prompt = Annotated[int, Option(help="Tokens of the prompt.", min=1)]
Generate = Annotated[int, Option(help="Tokens generated.", min=2)]
Keep = Annotated[bool, Option("--keep", help="Keep the model files.")]
Quality = Annotated[bool, Option("--quality/--no-quality", help="Also compare with float32.")]
Small = Annotated[
    bool, Option("--quality-tiny", help="That of the tiny shape: float32 of a large one is slow.")
]
Report = Annotated[Path | None, Option(help="Folder for matrix.md and matrix.json.")]


def matrix(
    work: Work,
    shapes: Shapes = None,
    tiny: Tiny = False,
    layers: Layers = None,
    vram: options.Vram = None,
    threads: options.Threads = None,
    runs: Runs = 5,
    prompt: Prompt = 128,
    generate: Generate = 32,
    keep: Keep = False,
    quality: Quality = True,
    quality_tiny: Small = False,
    report: Report = None,
) -> None:
    """Write, measure and delete one model after another; print one table.

    Size, structure, memory, load time, first token, speed, savings and quality of each. Without a
    GPU the budgeted side computes from the mapped file. The last line of standard output is JSON.
    """
    from greenroom.bench import matrix as table
    from greenroom.bench.speed import command_line, public
    from greenroom.commands.console import errors
    from greenroom.convert.synth_shapes import shape_of
    from greenroom.placement.machine import machine

    names = [name.strip() for name in shapes.split(",")] if shapes else list(table.SHAPES)
    wanted = [shape_of(name + "-tiny" * tiny, layers) for name in names]
    work.mkdir(parents=True, exist_ok=True)
    here = machine([work])
    judge = ("tiny" if quality_tiny else "whole") if quality else "none"
    plan = table.Plan(
        vram=vram, threads=threads, prompt=prompt, generate=generate, runs=runs, quality=judge
    )
    models = []
    with errors.status("measuring") as status:
        for shape in wanted:
            models.append(_one(shape, work, plan, bool(here.gpus), keep, status.update))
    document = {
        "kind": table.KIND, "version": table.VERSION,
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "command": command_line(),
        "machine": public(here), "models": models,
    }  # fmt: skip
    _show(document, report)


def _show(document: dict[str, Any], report: Path | None) -> None:
    from greenroom.bench import matrix as table

    print(table.markdown(document))
    if report is not None:
        report.mkdir(parents=True, exist_ok=True)
        (report / "matrix.md").write_text(table.markdown(document))
        (report / "matrix.json").write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document), flush=True)


def _judged(shape: "Shape", path: Path, result: Any, plan: "Plan", tell: Tell) -> Any:
    """Quality of the measured file, or of its tiny shape with as many experts in VRAM."""
    from greenroom.bench import matrix as table
    from greenroom.convert.synth import Synthesis, write_synthetic
    from greenroom.convert.synth_shapes import shape_of

    if plan.quality == "none":
        return None
    if plan.quality == "whole":
        return table.quality(path, plan.vram, plan.threads, tell)
    small = shape_of(shape.name.removesuffix("-tiny") + "-tiny")
    tiny = path.with_name(f"{small.name}.gguf")
    try:
        write_synthetic(Synthesis(small), tiny)
        share = table.resident(path, result)
        vram = None if plan.vram is None else table.budget_like(share, tiny)
        return table.quality(tiny, vram, plan.threads, tell) | {"of": "tiny"}
    finally:
        tiny.unlink(missing_ok=True)


def _one(
    shape: "Shape", work: Path, plan: "Plan", gpu: bool, keep: bool, tell: Tell
) -> dict[str, Any]:
    """Everything of one shape; its file is gone afterwards unless it is to be kept."""
    from greenroom.bench import matrix as table
    from greenroom.commands.inspect import describe
    from greenroom.convert.synth import Synthesis, write_synthetic
    from greenroom.gguf import GGUFFile

    path = work / f"{shape.name}-{shape.layers}.gguf"
    try:
        if not path.exists():
            tell(f"writing {path.name}")
            write_synthetic(Synthesis(shape), path)
        with GGUFFile(path) as file:
            facts = describe(file)
        result = table.measured(path, plan, gpu, tell)
        judged = _judged(shape, path, result, plan, tell)
    finally:
        if not keep:
            path.unlink(missing_ok=True)
    return {
        "shape": shape.name,
        "row": table.row(facts, result, judged),
        "bench": result,
        "quality": judged,
    }

"""`greenroom synth`: a file with a published model's shapes and random weights."""

from pathlib import Path
from typing import Annotated

import typer


def synth(
    shape: Annotated[str, typer.Argument(help="Published model, e.g. gpt-oss-20b.")],
    out: Annotated[Path, typer.Argument(help="The GGUF file to write.")],
    layers: Annotated[
        int | None, typer.Option(help="Layers instead of the published ones.")
    ] = None,
    type: Annotated[str | None, typer.Option(help="Mix or block format of the weights.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the random weights.", min=0)] = 0,
    skew: Annotated[
        float,
        typer.Option(
            help="How uneven the routing is; at 0.5 half of it goes to a quarter of 32 experts.",
            min=0,
            max=4,
        ),
    ] = 0.0,
) -> None:
    """Write a model file of exact published shapes with random weights, to measure with.

    Shapes: gpt-oss-20b, gpt-oss-120b, phi-3.5-moe, grin-moe, deepseek-moe-16b, mixtral-8x7b,
    qwen3-30b-a3b; each also with -tiny behind it.
    """
    from greenroom.commands.console import size
    from greenroom.commands.progress import bytes_progress
    from greenroom.convert.synth import Synthesis, write_synthetic
    from greenroom.convert.synth_shapes import shape_of

    job = Synthesis(shape_of(shape, layers), mix=type, seed=seed, skew=skew)
    with bytes_progress(f"writing {out.name}") as progress:
        write_synthetic(job, out, progress)
    typer.echo(f"{out}: {size(job.nbytes())} of tensors, {job.shape.layers} layers")

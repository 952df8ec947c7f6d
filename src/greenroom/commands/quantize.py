"""`greenroom quantize`: the same model in other types."""

from pathlib import Path
from typing import Annotated

import typer


def quantize(
    source: Annotated[Path, typer.Argument(help="A GGUF file, best in F32, F16 or BF16.")],
    out: Annotated[Path, typer.Argument(help="The GGUF file to write.")],
    type: Annotated[str, typer.Option(help="Mix, e.g. Q4_K_M, Q8_0, MXFP4.")] = "Q4_K_M",
    tensor_type: Annotated[
        list[str] | None, typer.Option(help="REGEX=TYPE for single tensors; may be repeated.")
    ] = None,
    imatrix: Annotated[Path | None, typer.Option(help="Importance matrix of the columns.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of the quantisers.", min=1)] = None,
) -> None:
    """Write a model in other block formats, by llama.cpp's rules of which tensor gets which.

    Norms, biases and routers stay in float32. Rows that are no whole blocks of a type get the
    nearest one that fits.
    """
    from greenroom.commands.progress import bytes_progress
    from greenroom.convert.quantise import Quantisation, quantise_file

    job = Quantisation(source, type, tensor_type or (), imatrix, threads)
    with bytes_progress(f"writing {out.name}") as progress:
        quantise_file(job, out, progress)
    before, after = (path.stat().st_size / 2**30 for path in (source, out))
    typer.echo(f"{out}: {after:.2f} GiB, was {before:.2f} GiB")

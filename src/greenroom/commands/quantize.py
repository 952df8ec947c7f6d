"""`greenroom quantize`: the same model in other types."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from greenroom.convert.heat import Heat

Source = Annotated[Path, typer.Argument(help="A GGUF file, best in F32, F16 or BF16.")]
Out = Annotated[Path, typer.Argument(help="The GGUF file to write.")]
Type = Annotated[str | None, typer.Option(help="Mix, e.g. Q4_K_M (the default), Q8_0, MXFP4.")]
Rules = Annotated[
    list[str] | None, typer.Option(help="REGEX=TYPE for single tensors; may be repeated.")
]
Imatrix = Annotated[Path | None, typer.Option(help="Importance matrix of the columns.")]
Threads = Annotated[int | None, typer.Option(help="Threads of the quantisers.", min=1)]
Trace = Annotated[
    Path | None,
    typer.Option(help="Trace of 'greenroom profile --sensitivity': a type for every expert."),
]
HotType = Annotated[str, typer.Option(help="Mix of the hot experts.")]
ColdType = Annotated[str, typer.Option(help="Mix of the cold experts.")]
Size = Annotated[str | None, typer.Option(help="Size of the file; bytes go where they save most.")]
Share = Annotated[float | None, typer.Option(help="Share of hot experts.", min=0, max=1)]


def quantize(
    source: Source,
    out: Out,
    type: Type = None,
    tensor_type: Rules = None,
    imatrix: Imatrix = None,
    threads: Threads = None,
    hot_experts: Trace = None,
    hot_type: HotType = "Q8_0",
    cold_type: ColdType = "Q3_K",
    target_size: Size = None,
    hot_share: Share = None,
) -> None:
    """Write a model in other block formats, by llama.cpp's rules of which tensor gets which.

    Norms, biases and routers stay in float32. Rows that are no whole blocks of a type get the
    nearest one that fits. With --hot-experts, experts whose errors matter most (by the trace's
    sensitivity, else by how often they are routed to) get --hot-type, the others --cold-type,
    and with --target-size types between; --type (by default the hot one) is for everything else.
    Only Greenroom reads such files; quantised again without --hot-experts they are plain ones.
    """
    from greenroom.commands.progress import resumable, say_resumed
    from greenroom.convert.quantise import Quantisation, quantise_file

    heat = _heat(hot_experts, (hot_type, cold_type), target_size, hot_share)
    mix = type or (hot_type if heat is not None else "Q4_K_M")
    job = Quantisation(source, mix, tensor_type or (), imatrix, threads, heat)
    with resumable(out) as progress:
        found = quantise_file(job, out, progress)
    say_resumed(found)
    before, after = (path.stat().st_size / 2**30 for path in (source, out))
    typer.echo(f"{out}: {after:.2f} GiB, was {before:.2f} GiB")


def _heat(
    trace: Path | None, types: tuple[str, str], size: str | None, share: float | None
) -> "Heat | None":
    from greenroom.convert.heat import Heat
    from greenroom.errors import RequestError
    from greenroom.placement.budget import parse_size

    if trace is not None:
        room = None if size is None else parse_size(size, "target_size")
        return Heat(trace, *types, share, room)
    if size is not None or share is not None:
        raise RequestError("--target-size and --hot-share need --hot-experts TRACE", "hot_experts")
    return None

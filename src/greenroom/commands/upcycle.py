"""`greenroom upcycle`: a Mixture-of-Experts model from a dense one."""

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

Dense = Annotated[Path, Argument(help="A dense GGUF file of architecture llama.")]
Out = Annotated[Path, Argument(help="The GGUF file to write.")]
Exact = Annotated[
    bool, Option("--exact", help="Cut the FFN into experts that are all active: same logits.")
]
Experts = Annotated[int, Option(help="With --exact: how many experts.")]
Deltas = Annotated[Path | None, Option(help="File of learned deltas: a sparse model.")]
Active = Annotated[float, Option(help="With --deltas: percent of the FFN active per token.")]


def upcycle(
    dense: Dense,
    out: Out,
    exact: Exact = False,
    experts: Experts = 8,
    deltas: Deltas = None,
    active: Active = 75,
) -> None:
    """Turn a dense model into a Mixture-of-Experts one.

    --exact keeps logits and weights as they are; --deltas FILE makes a sparse model with what
    tools/distil_demo learned for this very dense model.
    """
    if exact == (deltas is not None):
        raise typer.BadParameter("give either --exact or --deltas FILE")
    from greenroom.commands.console import size
    from greenroom.commands.progress import bytes_progress
    from greenroom.convert.upcycle import upcycle_exact, upcycle_sparse

    with bytes_progress(f"writing {out.name}") as progress:
        if deltas is None:
            upcycle_exact(dense, out, experts, progress)
        else:
            upcycle_sparse(dense, out, deltas, active, progress)
    typer.echo(f"{out}: {size(out.stat().st_size)}")

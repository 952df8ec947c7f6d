"""`greenroom pull`: download a model from Hugging Face."""

from typing import Annotated

import typer
from typer import Argument

Reference = Annotated[str, Argument(help="owner/repo or owner/repo:quant, as in ...:Q4_K_M.")]


def pull(reference: Reference) -> None:
    """Download a GGUF model; an interrupted download goes on where it stopped."""
    from greenroom.server.hub import pull

    path = pull(reference, lambda line: typer.echo(line, err=True))
    typer.echo(path)

"""`greenroom rm`: delete a downloaded model."""

from typing import Annotated

import typer
from typer import Argument, Option

Name = Annotated[str, Argument(help="A name from 'greenroom list'.")]
Yes = Annotated[bool, Option("--yes", "-y", help="Do not ask.")]


def rm(name: Name, yes: Yes = False) -> None:
    """Delete a model's files from the store it is in."""
    from greenroom.server.hub import remove
    from greenroom.server.stores import find

    source = find(name)
    if not yes:
        size = source.size / 2**30
        typer.confirm(f"delete {source.name} ({size:.2f} GiB, {source.path})?", abort=True)
    typer.echo(f"freed {remove(source) / 2**30:.2f} GiB")

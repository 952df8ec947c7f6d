"""`greenroom publish`: upload a folder to the hub; by default only shows what would go."""

from pathlib import Path
from typing import Annotated

import typer


def publish(
    folder: Annotated[Path, typer.Argument(help="Folder with .gguf files and a README.md.")],
    repository: Annotated[str, typer.Argument(help="owner/name on the hub.")],
    dry_run: Annotated[
        bool, typer.Option(help="Only show what would go; ask nobody.", show_default=True)
    ] = True,
    private: Annotated[bool, typer.Option(help="Make a new repository private.")] = False,
) -> None:
    """Upload a folder of models to the hub, with checksums.

    Files that are there already with the same checksum are left out, so an upload that broke off
    goes on. The token is the one of 'hf auth login' or HF_TOKEN.
    """
    from greenroom.commands.console import size
    from greenroom.convert.hub import Upload, plan
    from greenroom.convert.hub import publish as run

    if dry_run:
        uploads = plan(folder, repository)
        for upload in uploads:
            typer.echo(f"{upload.sha256}  {size(upload.size):>10}  {upload.name}")
        total = size(sum(upload.size for upload in uploads))
        typer.echo(f"{total} would go to {repository}; add --no-dry-run to upload")
        return
    from huggingface_hub import HfApi

    def show(upload: Upload) -> None:
        typer.echo(f"{upload.name}: {'was there' if upload.present else 'uploaded'}")

    api = HfApi()
    run(folder, repository, plan(folder, repository, api), api, private, show)

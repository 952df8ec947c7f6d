"""`greenroom list`: the models on this machine."""

import builtins
import json
from pathlib import Path
from typing import Annotated

from typer import Option

Folders = Annotated[
    builtins.list[Path] | None,
    Option("--models-dir", help="A further folder to look into.", envvar="GREENROOM_MODELS_DIR"),
]
Json = Annotated[bool, Option("--json", help="Print JSON.")]


def list(models_dir: Folders = None, as_json: Json = False) -> None:
    """List the GGUF models in Hugging Face's cache, Ollama's and LM Studio's stores."""
    from rich.console import Console
    from rich.table import Table

    from greenroom.server.stores import discover

    found = discover(models_dir or ())
    if as_json:
        rows = [
            {"name": s.name, "bytes": s.size, "store": s.origin, "path": str(s.path)} for s in found
        ]
        print(json.dumps(rows, indent=2))
        return
    if not found:
        print("no models yet; 'greenroom pull owner/repo' downloads one")
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("NAME", overflow="fold")
    table.add_column("SIZE", justify="right")
    table.add_column("STORE")
    for source in found:
        table.add_row(source.name, f"{source.size / 2**30:.2f} GiB", source.origin)
    Console().print(table)

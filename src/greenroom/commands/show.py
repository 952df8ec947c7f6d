"""`greenroom show`: what a model is."""

import json
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

Name = Annotated[str, Argument(help="A name from 'greenroom list', or a file.")]
Json = Annotated[bool, Option("--json", help="Print JSON, with all scalar metadata.")]
Template = Annotated[bool, Option("--template", help="Print the chat template only.")]


def show(name: Name, as_json: Json = False, template: Template = False) -> None:
    """Show a model's architecture, size, quantisation and context."""
    from greenroom.errors import ModelFileError
    from greenroom.server.describe import read_description
    from greenroom.server.stores import select

    (source, *_) = select([name])
    found = read_description(source)
    if found.problem:
        raise ModelFileError(found.problem)
    if template:
        print(found.template)
        return
    context = found.metadata.get(f"{found.architecture}.context_length")
    rows = {
        "name": source.name,
        "path": str(Path(source.path or "")),
        "store": source.origin,
        "bytes": source.size,
        "architecture": found.architecture,
        "parameters": found.parameters,
        "quantization": found.quantization,
        "context_length": context,
        "license": found.license or None,
        "chat_template": bool(found.template),
    }
    if as_json:
        print(json.dumps(rows | {"metadata": found.metadata}, indent=2))
        return
    for key, value in rows.items():
        print(f"{key.replace('_', ' '):16} {'-' if value is None else value}")

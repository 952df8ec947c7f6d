"""`greenroom compare`: two results of `greenroom bench`, side by side."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

Before = Annotated[Path, Argument(help="report.json, or what bench printed last.")]
After = Annotated[Path, Argument(help="Another one.")]
Force = Annotated[bool, Option("--force", help="Compare different models all the same.")]
Json = Annotated[bool, Option("--json", help="Print one JSON document instead of a table.")]


def compare(before: Before, after: After, force: Force = False, as_json: Json = False) -> None:
    """Print every figure of two results and their ratio, with the range the quartiles allow."""
    from rich.console import Console
    from rich.table import Table

    from greenroom.bench.compare import changes, check, read_document

    a, b = read_document(before), read_document(after)
    check(a, b, force)
    found = list(changes(a, b))
    if as_json:
        document = {"kind": "compare", "version": 1, "changes": [asdict(c) for c in found]}
        print(json.dumps(document, indent=1))
        return
    table = Table("engine", "case", "figure", "A", "B", "B / A", "range", box=None)
    for c in found:
        row = (f"{c.before:.4g}", f"{c.after:.4g}", f"{c.ratio:.3f}", f"{c.low:.3f}-{c.high:.3f}")
        table.add_row(c.engine, c.case, c.figure, *row)
    Console(highlight=False).print(table)

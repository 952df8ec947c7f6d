"""`greenroom card`: a model card from the file's facts and measured results."""

from pathlib import Path
from typing import Annotated

import typer

from greenroom.commands import options


def card(
    model: options.Model,
    results: Annotated[
        Path | None, typer.Option(help="Folder with JSON results of bench, eval, profile, stress.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="File to write; by default printed.")] = None,
    license: Annotated[str | None, typer.Option(help="Licence as the hub spells it.")] = None,
    base_model: Annotated[str | None, typer.Option(help="owner/name of the original.")] = None,
) -> None:
    """Write a model card in the hub's form.

    Every figure is the file's own or from a results file, which is named beside it; what was not
    measured is left out.
    """
    from greenroom.commands.inspect import describe
    from greenroom.convert.card import Subject, read_results
    from greenroom.convert.card import card as compose
    from greenroom.convert.hub import sha256_of
    from greenroom.gguf import GGUFFile

    with GGUFFile(model) as file:
        facts = describe(file)
        facts.pop("placement", None)  # of the machine this runs on, not of the model
        subject = Subject(
            facts=facts,
            metadata=dict(file.metadata),
            files=[(path.name, path.stat().st_size, sha256_of(path)) for path in file.paths],
            tensors=[(t.name, t.type.name, t.shape, t.nbytes) for t in file.tensors.values()],
            license=license,
            base_model=base_model,
        )
    text = compose(subject, read_results(results))
    if out is None:
        typer.echo(text, nl=False)
    else:
        out.write_text(text)
        typer.echo(f"{out}: {text.count(chr(10))} lines")

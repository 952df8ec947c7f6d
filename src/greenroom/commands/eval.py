"""`greenroom eval`: parses, evaluates, prints; see `greenroom.bench.quality`."""

import json
from pathlib import Path
from typing import Annotated

from typer import Option

from greenroom.commands import options

Text = Annotated[Path, Option(help="UTF-8 text to predict.")]
Reference = Annotated[
    str | None, Option(help="Another GGUF file of the same vocabulary, or float32.")
]
Vram = Annotated[
    list[str] | None, Option(help="GPU budget; repeat to compare placements with the first.")
]
Context = Annotated[int, Option(help="Tokens of a window.", min=16)]
MaxTokens = Annotated[int, Option(help="Most tokens of the text.", min=2)]
Json = Annotated[bool, Option("--json", help="Print one JSON document.")]
Report = Annotated[Path | None, Option(help="Folder for report.md, report.json and a plot.")]


def eval(
    model: options.Model,
    text: Text,
    reference: Reference = None,
    vram: Vram = None,
    context: Context = 512,
    max_tokens: MaxTokens = 4096,
    threads: options.Threads = None,
    as_json: Json = False,
    report: Report = None,
) -> None:
    """Measure how well a model predicts a text, and what a placement or a file changes.

    With a reference, or several --vram, it tells the Kullback-Leibler divergence, how often the
    likeliest token is the same, and the largest difference of a logit.
    """
    from greenroom.bench.quality_report import Evaluation, markdown, run_evaluation, write_report
    from greenroom.commands.console import errors, tell
    from greenroom.commands.progress import count_progress

    job = Evaluation(
        model=model,
        text=text,
        reference=reference,
        vram=tuple(vram or ()),
        context=context,
        max_tokens=max_tokens,
        threads=threads,
    )
    with count_progress("tokens") as progress:
        document = run_evaluation(job, tell, progress)
    if report is not None:
        for line in write_report(document, report):
            errors.print(line)
    print(json.dumps(document) if as_json else markdown(document))

"""`greenroom profile`: parses, records, prints; see `greenroom.bench.routing`."""

import json
from pathlib import Path
from typing import Annotated

from typer import Option

from greenroom.commands import options

Text = Annotated[Path, Option(help="UTF-8 text to run through the model.")]
Out = Annotated[Path, Option(help="Folder for the trace, the plots and the page.")]
Context = Annotated[int, Option(help="Tokens of a window.", min=16)]
MaxTokens = Annotated[int, Option(help="Most tokens of the text.", min=4)]
Imatrix = Annotated[
    Path | None, Option(help="Also write an importance matrix, for 'greenroom quantize'.")
]
Sensitivity = Annotated[
    bool, Option(help="Also measure what errors in each expert do: a pass for every layer.")
]
Json = Annotated[bool, Option("--json", help="Print one JSON document.")]


def profile(
    model: options.Model,
    text: Text,
    out: Out = Path("profile"),
    context: Context = 512,
    max_tokens: MaxTokens = 4096,
    imatrix: Imatrix = None,
    sensitivity: Sensitivity = False,
    threads: options.Threads = None,
    vram: options.Vram = None,
    as_json: Json = False,
) -> None:
    """Record which experts a text uses, and tell what a cache of experts would gain.

    Writes trace.npz (what 'run --trace' warms from), profile.json, profile.md, profile.html and
    PNG plots. An importance matrix is collected on the CPU, whatever --vram says. What
    --sensitivity measures goes into trace.npz; 'quantize --hot-experts' goes by it.
    """
    from dataclasses import replace

    from greenroom.bench.importance import Importance
    from greenroom.bench.quality import read_text, windows_of
    from greenroom.bench.routing_report import analyse, record, summary, write_profile
    from greenroom.bench.sensitivity import measure
    from greenroom.commands.console import errors, loaded, tell
    from greenroom.commands.progress import count_progress

    words = read_text(text)
    out.mkdir(parents=True, exist_ok=True)  # what cannot be written is said before the work
    settings = {"vram": "0" if imatrix else vram, "threads": threads, "context_length": context}
    with loaded(model, max_sequences=1, prefix_cache=False, **settings) as llm:
        windows = windows_of(llm.tokenizer, words, context, max_tokens)
        meter = Importance(llm.engine.model, model) if imatrix else None
        with count_progress("tokens") as progress:
            trace = record(llm, windows, model.name, progress)
        if meter is not None and imatrix is not None:
            meter.write(imatrix, text.name, windows)
        if sensitivity:
            with count_progress("tokens, layer by layer") as progress:
                trace = replace(trace, sensitivity=measure(llm, windows, progress))
    document = analyse(trace, tell)
    for line in write_profile(document, trace, out):
        errors.print(line)
    print(json.dumps(document) if as_json else summary(document))

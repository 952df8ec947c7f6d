"""Measured results as tables for people, and where they come from in a line. Knows the documents
of `bench`, `eval` and `plan`; what it does not know of a document is left to the reader of it.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Row = tuple[str, ...]
Table = tuple[Row, Sequence[Row]]  # heads, rows

TITLES = {
    "eval": "Quality",
    "bench": "Speed",
    "plan": "Memory by budget (predicted)",
    "profile": "How experts are used",
    "stress": "Stress test",
}


def provenance(document: Mapping[str, Any]) -> str:
    """What measured, when and by which command, as far as the document says; "" if it does not."""
    # A number is the version of the document's form, a text that of the program.
    version = document.get("version")
    program = document.get("machine", {}).get("versions", {}).get("greenroom")
    program = program or (version if isinstance(version, str) else None)
    parts = [f"Greenroom {program}"] if program else []
    if isinstance(date := document.get("date"), str):
        parts.append(date)
    if isinstance(command := document.get("command"), str):
        parts.append(f"`{command}`")
    return ", ".join(parts)


def tables(document: Mapping[str, Any]) -> Iterator[Table]:
    """The tables of a document; none for kinds that have none, or where it lacks the figures."""
    make = {"bench": _bench, "eval": _eval, "plan": _plan}.get(str(document.get("kind")))
    try:
        if make is not None:
            yield from list(make(document))
    except (KeyError, TypeError, AttributeError):
        return  # of another version: its figures are listed one by one


def _bench(document: Mapping[str, Any]) -> Iterator[Table]:
    rows = [
        (engine, case, *(_spread(figures[name]) for name in ("prefill", "first_token", "decode")))
        for engine, result in document["results"].items()
        for case, figures in result["cases"].items()
    ]
    heads = ("engine", "sequences x prompt + generated", "prefill, tokens/s")
    yield (*heads, "time to first token, s", "decode, tokens/s"), rows
    memory = [
        (engine, str(result["threads"]), _gib(result["peak_rss"]), _gib(result["peak_vram"]))
        for engine, result in document["results"].items()
    ]
    yield ("engine", "threads", "peak RAM, GiB", "peak VRAM, GiB"), memory


def _eval(document: Mapping[str, Any]) -> Iterator[Table]:
    rows = []
    for row in document["placements"]:
        kl = "-" if "kl_mean" not in row else f"{row['kl_mean']:.4f} ± {row['kl_mean_error']:.4f}"
        same = f"{100 * row['top1_agreement']:.1f} %" if "top1_agreement" in row else "-"
        perplexity = f"{row['perplexity']:.2f} ± {row['perplexity_error']:.2f}"
        rows.append((row["name"], str(row["positions"]), perplexity, kl, same))
    against = (document.get("reference") or {}).get("name", "a reference")
    heads = ("placement", "positions", "perplexity", f"mean KL from {against}")
    yield (*heads, "same next token"), rows


def _plan(document: Mapping[str, Any]) -> Iterator[Table]:
    rows = [
        (
            "all there is" if row["vram"] is None else _gib(row["vram"]),
            _gib(row["memory"]["vram"]),
            _gib(row["memory"]["ram"]),
            f"{100 * row['experts_in_vram']:.0f} %",
        )
        for row in document["sweep"] or [document["plan"]]
    ]
    yield ("VRAM budget, GiB", "VRAM, GiB", "RAM, GiB", "experts in VRAM"), rows


def _spread(figure: Mapping[str, float]) -> str:
    """Median and, in brackets, the distance of the quartiles."""
    return f"{figure['median']:.4g} ({figure['iqr']:.2g})"


def _gib(count: int | None) -> str:
    return "-" if count is None else f"{count / 2**30:.2f}"

"""Two documents of the speed benchmark, as ratios with their uncertainty. Measures nothing."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from greenroom.errors import RequestError

_LARGEST_FILE = 64 << 20


@dataclass(frozen=True, slots=True)
class Change:
    """A figure in both documents; `ratio` is B over A, between `low` and `high` as the
    quartiles allow.
    """

    engine: str
    case: str
    figure: str
    before: float
    after: float
    ratio: float
    low: float
    high: float


def read_document(path: Path) -> dict[str, Any]:
    """A benchmark's JSON; RequestError in one line if it is none."""
    try:
        if path.stat().st_size > _LARGEST_FILE:
            raise RequestError(f"{path}: too large for a benchmark's result")
        document = json.loads(path.read_text())
    except OSError as error:
        raise RequestError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError):
        raise RequestError(f"{path}: this is no JSON document") from None
    if not isinstance(document, dict) or "kind" not in document:
        raise RequestError(f"{path}: this is no benchmark's result; it has no kind")
    return document


def check(before: Mapping[str, Any], after: Mapping[str, Any], force: bool) -> None:
    """Raises RequestError if the two measure different things, unless forced."""
    for document in (before, after):
        if document["kind"] != "bench":
            raise RequestError(f"compare knows documents of the kind bench, not {document['kind']}")
        if document.get("version") != 1:
            raise RequestError(f"version {document.get('version')!r} of a result is not 1")
    models = [document.get("model", {}).get("header") for document in (before, after)]
    if models[0] != models[1] and not force:
        names = [document.get("model", {}).get("file") for document in (before, after)]
        raise RequestError(f"these are different models ({names[0]}, {names[1]}); --force compares")


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[Change]:
    """Every figure both documents have."""
    try:
        for engine, result in before["results"].items():
            others = after["results"].get(engine, {}).get("cases", {})
            for name, case in result["cases"].items():
                if name in others:
                    yield from _of_case(engine, name, case, others[name])
    except (KeyError, TypeError, AttributeError) as error:
        raise RequestError(f"a result lacks what a benchmark has: {error}") from None


def _of_case(
    engine: str, name: str, a: Mapping[str, Any], b: Mapping[str, Any]
) -> Iterator[Change]:
    for figure in ("prefill", "first_token", "decode", "joules_per_token"):
        x, y = a.get(figure), b.get(figure)
        if x and y and x["q1"] > 0:
            yield Change(
                engine, name, figure, x["median"], y["median"], y["median"] / x["median"],
                y["q1"] / x["q3"], y["q3"] / x["q1"],
            )  # fmt: skip

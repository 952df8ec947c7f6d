"""A model card in the hub's form, from a file's own facts and measured results.

Every figure comes from the model file or from a JSON document in the results folder, which is
named beside it; a section nothing was measured for is left out. Runs and measures nothing.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from greenroom.convert.card_tables import TITLES, provenance, tables
from greenroom.convert.card_text import LIMITATIONS, USAGE, citation
from greenroom.errors import ModelFileError, RequestError

Lines = Iterator[str]
_MOST_ROWS = 400  # of a document of a kind that has no table of its own


@dataclass(frozen=True, slots=True)
class Result:
    """One document: its file's name, the file's sum, and what it says."""

    name: str
    sha256: str
    document: Mapping[str, Any]

    @property
    def kind(self) -> str:
        """What was measured: "eval", "bench", "profile", ..."""
        return str(self.document.get("kind", "other"))

    @property
    def source(self) -> str:
        """Where its figures come from, in a line."""
        by = provenance(self.document)
        return f"Source: `{self.name}` (SHA-256 `{self.sha256}`)" + (f", {by}." if by else ".")


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What the card is of.

    Attributes:
        facts: what `greenroom inspect --json` says of the file.
        metadata: the file's keys.
        files: (name, bytes, SHA-256) of each file.
        tensors: (name, type, shape, bytes) of each tensor.
        license, base_model: as the hub spells them, or None to take the file's.
    """

    facts: Mapping[str, Any]
    metadata: Mapping[str, Any]
    files: Sequence[tuple[str, int, str]]
    tensors: Sequence[tuple[str, str, tuple[int, ...], int]]
    license: str | None = None
    base_model: str | None = None


def read_results(folder: Path | None) -> list[Result]:
    """The JSON documents of a folder, by name.

    Raises:
        ModelFileError: it is no folder, or a file is no JSON object.
    """
    if folder is None:
        return []
    if not folder.is_dir():
        raise ModelFileError(f"{folder}: this is no folder; give the one with the results")
    found = []
    for path in sorted(folder.rglob("*.json")):
        raw = path.read_bytes()
        try:
            document = json.loads(raw)
        except ValueError:
            raise ModelFileError(f"{path}: this is not JSON; remove it or measure again") from None
        if not isinstance(document, dict):
            raise ModelFileError(f"{path}: this is no results file; remove it")
        name = path.relative_to(folder).as_posix()
        found.append(Result(name, hashlib.sha256(raw).hexdigest(), document))
    return found


def card(subject: Subject, results: Sequence[Result]) -> str:
    """The whole card: YAML between two lines of dashes, then Markdown.

    Raises:
        RequestError: the hub's library refuses the metadata.
    """
    sections = [
        _summary(subject),
        _usage(subject),
        _architecture(subject),
        _storage(subject),
        *(_measured(result) for result in results),
        _limitations(subject),
        _citation(subject),
        _tensors(subject),
        _checksums(subject),
    ]
    body = "\n".join(line for section in sections for line in section)
    return f"---\n{front_matter(subject, results)}\n---\n\n{body}"


def front_matter(subject: Subject, results: Sequence[Result]) -> str:
    """The metadata as the hub's own library writes it."""
    from huggingface_hub import EvalResult, ModelCardData

    name = str(subject.facts["name"] or subject.files[0][0])
    evaluated = [
        EvalResult(
            task_type="text-generation",
            dataset_type="text",
            dataset_name=str(result.document["text"]["file"]),
            metric_type="perplexity",
            metric_name=f"Perplexity ({row['name']})",
            metric_value=float(row["perplexity"]),
        )
        for result in results
        if result.kind == "eval"
        for row in result.document.get("placements", [])
        if "perplexity" in row
    ]
    tags = ["gguf", "greenroom", str(subject.facts["architecture"])]
    if subject.facts.get("experts"):
        tags.insert(1, "mixture-of-experts")
    try:
        data = ModelCardData(
            model_name=name,
            library_name="greenroom",
            pipeline_tag="text-generation",
            license=subject.license or _text(subject, "general.license"),
            base_model=subject.base_model or _text(subject, "general.base_model.0.repo_url"),
            tags=tags,
            eval_results=evaluated or None,
        )
        return str(data.to_yaml()).strip()
    except (ValueError, TypeError) as error:
        raise RequestError(f"the hub's library refuses the card's metadata: {error}") from None


def _text(subject: Subject, key: str) -> str | None:
    value = subject.metadata.get(key)
    return value if isinstance(value, str) else None


def _table(rows: Sequence[Sequence[object]], *heads: str) -> Lines:
    yield "| " + " | ".join(heads) + " |"
    yield "|" + "---|" * len(heads)
    for row in rows:
        yield "| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |"
    yield ""


def _summary(subject: Subject) -> Lines:
    facts = subject.facts
    yield f"# {facts['name'] or subject.files[0][0]}"
    yield ""
    experts = facts.get("experts")
    kind = "dense language model"
    if experts:
        kind = (
            f"Mixture-of-Experts language model: {experts['count']} experts in each of "
            f"{experts['layers']} layers, {experts['used']} of them per token"
        )
    yield f"A {kind}, architecture `{facts['architecture']}`, "
    yield f"{facts['parameters'] / 1e9:.2f} billion parameters, {facts['bytes']['all']:,} bytes"
    yield "of tensors in GGUF. This card describes the file; the model is the work of its authors,"
    yield "see the citation."
    yield ""


def _usage(subject: Subject) -> Lines:
    plain = not (subject.facts.get("experts") or {}).get("classes")
    yield from USAGE.format(file=subject.files[0][0]).splitlines()
    yield ""
    yield "### llama.cpp"
    yield ""
    if plain:
        yield f"`llama-cli -m {subject.files[0][0]}`, where llama.cpp knows the architecture."
    else:
        yield "This file has experts of mixed precision, which llama.cpp does not read;"
        yield "`greenroom quantize FILE PLAIN.gguf --type Q8_0` makes one it does."
    yield ""


def _architecture(subject: Subject) -> Lines:
    yield "## Architecture"
    yield ""
    rows = [
        (key, value)
        for key, value in flatten(subject.facts)
        if not key.startswith(("files", "bytes", "placement", "types", "problem", "runs"))
    ]
    yield from _table(rows, "fact", "value")
    yield "From the file's metadata:"
    yield ""
    keys = [
        (f"`{key}`", value)
        for key, value in subject.metadata.items()
        if not key.startswith("tokenizer.") and isinstance(value, str | int | float | bool)
    ]
    yield from _table(keys, "key", "value")


def _storage(subject: Subject) -> Lines:
    facts = subject.facts
    yield "## Size and memory"
    yield ""
    types = [(name, t["tensors"], f"{t['bytes']:,}") for name, t in facts["types"].items()]
    yield from _table(types, "type", "tensors", "bytes")
    parts = [(name, f"{count:,}") for name, count in facts["bytes"].items()]
    yield from _table(parts, "part", "bytes in the file")
    for title, key in (("weights read", "bytes_per_token"), ("key-value cache", "kv_cache")):
        rows = [(name, f"{count:,}") for name, count in facts.get(key, {}).items()]
        if rows:
            yield from _table(rows, title, "bytes")


def _measured(result: Result) -> Lines:
    yield f"## {TITLES.get(result.kind, 'Results')}: {result.name}"
    yield ""
    yield result.source
    yield ""
    for heads, lines in tables(result.document):
        yield from _table(lines, *heads)
    yield "All figures of the document:"
    yield ""
    rows = [(f"`{key}`", value) for key, value in flatten(result.document)]
    yield from _table(rows[:_MOST_ROWS], "figure", "value")
    if len(rows) > _MOST_ROWS:
        yield f"{len(rows) - _MOST_ROWS} more figures are in `{result.name}`."
        yield ""


def flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Leaves of a document as (path, text); long arrays of numbers are left in the file."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from flatten(inner, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list | tuple):
        if any(isinstance(inner, Mapping) for inner in value):
            for i, inner in enumerate(value):
                yield from flatten(inner, f"{prefix}[{i}]")
        elif len(value) <= 16:
            yield prefix, ", ".join(_plain(inner) for inner in value) or "none"
    elif value is not None:
        yield prefix, _plain(value)


def _plain(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _limitations(subject: Subject) -> Lines:
    yield from LIMITATIONS.splitlines()
    if (subject.facts.get("experts") or {}).get("classes"):
        yield "- Experts have types of their own by how often they are used on a sample text;"
        yield "  texts of another kind may use coarser experts more."
    yield ""


def _citation(subject: Subject) -> Lines:
    known = (subject.facts["name"], subject.base_model, subject.files[0][0])
    names = " ".join(str(name) for name in known if name)
    cited = citation(str(subject.facts["architecture"]), names)
    if cited is None:
        return
    yield "## Citation"
    yield ""
    yield from cited.splitlines()
    yield ""


def _tensors(subject: Subject) -> Lines:
    yield "## Tensors"
    yield ""
    yield "<details><summary>Every tensor of the file</summary>"
    yield ""
    rows = [
        (f"`{name}`", type, " × ".join(map(str, shape)), f"{nbytes:,}")
        for name, type, shape, nbytes in subject.tensors
    ]
    yield from _table(rows, "tensor", "type", "shape", "bytes")
    yield "</details>"
    yield ""


def _checksums(subject: Subject) -> Lines:
    yield "## Checksums"
    yield ""
    yield "```"
    for name, _, sha256 in subject.files:
        yield f"{sha256}  {name}"
    yield "```"
    yield ""

"""`greenroom inspect`: what a model file holds, what a token touches, where it would be placed.

Reads the header only, so a file of any size is described at once.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from greenroom.commands import options

if TYPE_CHECKING:
    from greenroom.gguf import GGUFFile, TensorInfo
    from greenroom.models import ModelConfig

Vram = Annotated[str | None, Option(help="Budget of a GPU to plan for, like 6GiB.  [default: max]")]
Context = Annotated[int | None, Option(help="Context to plan for, in tokens.")]
Json = Annotated[bool, Option("--json", help="Print one JSON document instead of tables.")]

_EXPERT = re.compile(
    r"blk\.(\d+)\.ffn_(gate_up|gate|up|down)(?:_exps(?:\.c\d+)?|\.(\d+))\.(?:weight|bias)"
)
_CLASS = re.compile(r"blk\.\d+\.ffn_gate_exps\.c(\d+)\.weight")
_RESERVE = 1 << 30  # bytes of RAM left to everything else


def inspect(
    model: options.Model, vram: Vram = None, context: Context = None, as_json: Json = False
) -> None:
    """Describe a model file: experts, types, bytes per token, placement on this machine.

    With --vram it says what that budget would hold, also of a GPU that is not here.
    """
    from greenroom.gguf import GGUFFile

    with GGUFFile(model) as file:
        facts = describe(file, vram, context)
    if as_json:
        print(json.dumps(facts, indent=1))
    else:
        _show(facts)


def describe(
    file: "GGUFFile", vram: str | None = None, context: int | None = None
) -> dict[str, Any]:
    """Everything the command prints, with bytes as integers, ready for JSON.

    Args:
        file: the model.
        vram, context: of the placement that is asked for.
    """
    from greenroom.errors import GreenroomError
    from greenroom.models import ModelConfig
    from greenroom.models.registry import place_of

    facts = _stored(file)
    try:
        place_of(file)
        config = ModelConfig.from_metadata(file.metadata, file.tensors)
    except GreenroomError as error:
        return facts | {"runs": False, "problem": str(error)}
    facts |= _sizes(config)
    facts["experts"] = _experts(_expert_tensors(file), config)
    facts["bytes_per_token"] = _touched(file, facts["bytes"], config)
    facts["kv_cache"] = _kv_cache(config)
    facts["placement"] = _placement(facts, config, context) | _plan(file, vram, context)
    return facts


def _plan(file: "GGUFFile", vram: str | None, context: int | None) -> dict[str, Any]:
    """What an engine would put where; a budget on a machine without a GPU supposes one."""
    from greenroom.engine.config import EngineConfig
    from greenroom.engine.planning import planned
    from greenroom.placement.budget import parse_size
    from greenroom.placement.hardware import Gpu, Hardware, probe

    config = EngineConfig(vram=vram, context_length=context, max_sequences=1)
    budget = None if vram is None else parse_size(vram, "vram")
    supposed = None
    if budget and probe().gpu is None:
        supposed = Hardware(Gpu(f"a GPU with {vram}", budget, budget))
    found = planned(file, config, supposed)
    parts = [{"part": p, "remark": remark, "bytes": n} for p, remark, n in found.table()]
    return {"backend": found.backend, "reason": found.reason, "vram": parts}


def _expert_tensors(file: "GGUFFile") -> "list[TensorInfo]":
    return [tensor for tensor in file.tensors.values() if _EXPERT.fullmatch(tensor.name)]


def _stored(file: "GGUFFile") -> dict[str, Any]:
    """What can be said of any file, whether the model can run or not."""
    metadata = file.metadata
    experts = sum(tensor.nbytes for tensor in _expert_tensors(file))
    return {
        "files": [str(path) for path in file.paths],
        "architecture": metadata.get("general.architecture"),
        "name": metadata.get("general.name"),
        "parameters": sum(_elements(tensor) for tensor in file.tensors.values()),
        "types": _types(file.tensors.values()),
        "bytes": {"experts": experts, "rest": file.nbytes - experts, "all": file.nbytes},
        "runs": True,
        "problem": None,
    }


def _elements(tensor: "TensorInfo") -> int:
    count = 1
    for dimension in tensor.ne:
        count *= dimension
    return count


def _types(tensors: "Iterable[TensorInfo]") -> dict[str, dict[str, int]]:
    """Tensors and bytes of each type, the type with most bytes first."""
    found: dict[str, dict[str, int]] = {}
    for tensor in tensors:
        entry = found.setdefault(tensor.type.name, {"tensors": 0, "bytes": 0})
        entry["tensors"] += 1
        entry["bytes"] += tensor.nbytes
    return dict(sorted(found.items(), key=lambda item: -item[1]["bytes"]))


def _sizes(config: "ModelConfig") -> dict[str, Any]:
    attention = config.attention
    return {
        "layers": config.layers,
        "hidden_size": config.hidden_size,
        "vocabulary": config.vocabulary_size,
        "context_length": config.context_length,
        "attention": {
            "heads": attention.heads,
            "kv_heads": attention.kv_heads,
            "head_size": attention.key_length,
            "windows": sorted({window for window in config.windows if window is not None}),
            "windowed_layers": sum(window is not None for window in config.windows),
        },
    }


def _experts(tensors: "list[TensorInfo]", config: "ModelConfig") -> dict[str, Any] | None:
    """The expert structure that was found; None for a dense model."""
    if config.moe is None or not tensors:
        return None
    moe = config.moe
    matches = [match for t in tensors if (match := _EXPERT.fullmatch(t.name))]
    bytes_of: dict[int, int] = {}
    for tensor, match in zip(tensors, matches, strict=True):
        layer = int(match[1])
        bytes_of[layer] = bytes_of.get(layer, 0) + tensor.nbytes
    split = any(match[3] for match in matches)
    fused = any(match[2] == "gate_up" for match in matches)
    return {
        "layers": len(bytes_of),
        "count": moe.experts,
        "used": moe.used,
        "width": moe.width,
        "shared_width": moe.shared_width,
        "stored": "one tensor per expert"
        if split
        else "stacked" + (", gate and up fused" if fused else ""),
        "classes": _classes(tensors),
        "bytes_per_expert": sorted({count // moe.experts for count in bytes_of.values()}),
    }


def _classes(tensors: "list[TensorInfo]") -> list[dict[str, Any]]:
    """Experts of each precision class over all layers; empty in uniform files."""
    found: dict[int, dict[str, Any]] = {}
    for tensor in tensors:
        if match := _CLASS.fullmatch(tensor.name):
            entry = found.setdefault(int(match[1]), {"type": tensor.type.name, "experts": 0})
            entry["experts"] += tensor.shape[0]
    return [found[number] for number in sorted(found)]


def _touched(file: "GGUFFile", stored: dict[str, int], config: "ModelConfig") -> dict[str, int]:
    """Weight bytes that computing one token reads: its experts, and the rest without the
    embedding table, of which it takes one row (unless that table is the head as well)."""
    moe = config.moe
    routed = stored["experts"] * moe.used // moe.experts if moe is not None else 0
    table = file.tensors["token_embd.weight"]
    unread = table.nbytes - table.row_bytes if "output.weight" in file.tensors else 0
    return {"experts": routed, "rest": stored["rest"] - unread}


def _kv_cache(config: "ModelConfig") -> dict[str, int]:
    """Bytes of keys and values in float16: per token, and for a full context."""
    return {
        "bytes_per_token": _kv_layer(config) * config.layers,
        "bytes_full_context": _kv_bytes(config, config.context_length),
    }


def _kv_layer(config: "ModelConfig") -> int:
    """Bytes of one token's keys and values in one layer, float16."""
    attention = config.attention
    return 2 * attention.kv_heads * (attention.key_length + attention.value_length)


def _kv_bytes(config: "ModelConfig", context: int) -> int:
    """Bytes for `context` tokens; a layer with a window keeps no more than that."""
    return _kv_layer(config) * sum(min(window or context, context) for window in config.windows)


def _placement(facts: dict[str, Any], config: "ModelConfig", asked: int | None) -> dict[str, Any]:
    """Where the engine would put each part here, and whether there is room."""
    import psutil

    context = asked or min(4096, config.context_length)
    needed = facts["bytes"]["all"] + _kv_bytes(config, context)
    available = psutil.virtual_memory().available
    return {
        "experts": "RAM" if facts["experts"] else None,
        "rest": "RAM",
        "kv_cache": "RAM",
        "context": context,
        "ram_needed": needed,
        "ram_available": available,
        "fits": needed + _RESERVE <= available,
    }


def _show(facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, text in _rows(facts):
        table.add_row(name, text)
    console.print(table)


def _rows(facts: dict[str, Any]) -> Iterable[tuple[str, str]]:
    """Names and texts of the table's rows."""
    from greenroom.commands.console import size

    stored = facts["bytes"]
    yield "model", f"{facts['name'] or Path(facts['files'][0]).name} ({facts['architecture']})"
    count = facts["parameters"]
    yield (
        "parameters",
        f"{count / 1e9:.2f} billion" if count >= 1e9 else f"{count / 1e6:.1f} million",
    )
    files = len(facts["files"])
    yield "tensors", f"{size(stored['all'])} in {'one file' if files == 1 else f'{files} files'}"
    for name, entry in facts["types"].items():
        yield f"  {name}", f"{entry['tensors']} tensors, {size(entry['bytes'])}"
    if not facts["runs"]:
        yield "cannot run", facts["problem"]
        return
    attention = facts["attention"]
    yield "layers", f"{facts['layers']} of hidden size {facts['hidden_size']}"
    windowed = attention["windowed_layers"]
    seen = f", {windowed} layers see {attention['windows'][0]} tokens" if windowed else ""
    yield (
        "attention",
        f"{attention['heads']} heads of {attention['head_size']}, {attention['kv_heads']} for "
        f"keys and values{seen}",
    )
    yield "vocabulary", f"{facts['vocabulary']} tokens"
    yield "context", f"{facts['context_length']} tokens"
    yield from _expert_rows(facts["experts"])
    yield from _byte_rows(facts)


def _byte_rows(facts: dict[str, Any]) -> Iterable[tuple[str, str]]:
    from greenroom.commands.console import size

    stored = facts["bytes"]
    yield "bytes of experts", size(stored["experts"])
    yield "bytes of the rest", size(stored["rest"])
    touched = facts["bytes_per_token"]
    yield (
        "read per token",
        f"{size(sum(touched.values()))}: experts {size(touched['experts'])}, "
        f"rest {size(touched['rest'])}",
    )
    cache = facts["kv_cache"]
    yield (
        "KV cache (f16)",
        f"{size(cache['bytes_per_token'])} per token, "
        f"{size(cache['bytes_full_context'])} for the full context",
    )
    place = facts["placement"]
    yield "placement", place["reason"]
    for row in place["vram"]:
        yield f"  VRAM: {row['part']}", f"{size(row['bytes'])}  {row['remark']}"
    verdict = "fits" if place["fits"] else "does not fit; --mmap reads from the file instead"
    yield (
        "without a GPU",
        f"everything in RAM: {size(place['ram_needed'])} with {place['context']} tokens of "
        f"context, {size(place['ram_available'])} available: {verdict}",
    )


def _expert_rows(experts: dict[str, Any] | None) -> Iterable[tuple[str, str]]:
    from greenroom.commands.console import size

    if experts is None:
        yield "experts", "none: a dense model"
        return
    yield (
        "experts",
        f"{experts['count']} in each of {experts['layers']} layers, {experts['used']} per token; "
        f"width {experts['width']}, {experts['stored']}",
    )
    if experts["shared_width"]:
        yield "shared expert", f"width {experts['shared_width']}, for every token"
    if experts["classes"]:
        parts = [f"{entry['experts']} in {entry['type']}" for entry in experts["classes"]]
        yield "mixed precision", f"{', '.join(parts)}; the bytes of one expert are an average"
    yield "one expert", " or ".join(size(count) for count in experts["bytes_per_expert"])

"""What `--explain` shows: where the time of an answer went, layer by layer, and how near its
speed came to what the machine's measured rates allow. Knows statistics and rates; measures
nothing.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

if TYPE_CHECKING:
    from rich.console import Console

    from greenroom.engine import LLM
    from greenroom.placement.placement import Placement
    from greenroom.placement.predict import Prediction

HEAD = ("layer", "short steps", "ms", "MiB", "GB/s", "hits", "long steps", "ms")


@contextmanager
def explained(llm: "LLM", path: Path, wanted: bool) -> Iterator[dict[str, Any]]:
    """If `wanted`, times the layers and explains at the end, provided that the dictionary was
    filled with the `figures` of an answer."""
    if wanted:
        llm.engine.meter()
    figures: dict[str, Any] = {}
    yield figures
    if wanted and figures:
        show_explanation(llm, path, figures)


def show_explanation(llm: "LLM", path: Path, figures: dict[str, Any]) -> None:
    """Prints it on standard error, for an answer with these `figures` of `Measured`."""
    from greenroom.commands.console import errors

    stats = llm.engine.stats()
    show_layers(stats.get("layers") or (), stats.get("experts") or {}, errors)
    context = figures["prompt_tokens"] + figures["generated_tokens"]
    found = llm.engine.placement
    for line in rooflines(path, found, stats, figures, context) if found is not None else ():
        errors.print(line)


def show_layers(layers: Any, experts: dict[str, Any], console: "Console") -> None:
    """A row per layer: in how many steps its experts were asked of the CPU, what they cost it per
    such step, and how many had a slot. The last row sums what a step costs; its rates, GB/s and
    hits, are those of the layers together."""
    if not layers:
        console.print("No layer's experts were computed by the CPU where it could be timed.")
        return
    table = Table(*HEAD, box=None, padding=(0, 2, 0, 0))
    for column in table.columns:
        column.justify = "right"
    hits = dict(enumerate(zip(*_uses(experts, len(layers)), strict=True)))
    for index, layer in enumerate(layers):
        short, long = layer["short"], layer["long"]
        cells = row(_per_step(short), _per_step(long), hits.get(index))
        steps = str(short["calls"]), str(long["calls"])
        table.add_row(str(layer["layer"]), steps[0], *cells[:4], steps[1], cells[4])
    short, long = (_sum([_per_step(layer[kind]) for layer in layers]) for kind in ("short", "long"))
    cells = row(short, long, _sum(list(hits.values())))
    table.add_row("all", "", *cells[:4], "", cells[4])
    console.print(table)
    if "bus" in experts:
        console.print(f"Short steps: {experts['bus']}.")


def _uses(experts: dict[str, Any], layers: int) -> tuple[list[int], list[int]]:
    """Routes that found a slot, and all routes, of each layer; empty if that is not known."""
    hits, routes = experts.get("layer_hits", []), experts.get("layer_routes", [])
    return (hits, routes) if len(hits) == len(routes) == layers else ([], [])


def _per_step(part: dict[str, Any]) -> tuple[float, float]:
    """Seconds and bytes of one of the steps in which the CPU was asked."""
    calls = max(1, part["calls"])
    return part["seconds"] / calls, part["nbytes"] / calls


def _sum(pairs: list[tuple[Any, Any]]) -> tuple[Any, Any]:
    """Of both."""
    return sum(first for first, _ in pairs), sum(second for _, second in pairs)


def row(short: tuple[float, float], long: tuple[float, float], uses: Any) -> list[str]:
    """Cells: a short step's ms, MiB and GB/s, hits, a long step's ms; of one layer or of several
    together.

    Args:
        short, long: seconds and bytes.
        uses: routes that found a slot, and all routes; None if that is not known.
    """
    seconds, nbytes = short
    return [
        f"{1e3 * seconds:.3f}",
        f"{nbytes / 2**20:.1f}",
        f"{nbytes / seconds / 1e9:.1f}" if seconds else "-",
        f"{uses[0] / uses[1]:.1%}" if uses and uses[1] else "-",
        f"{1e3 * long[0]:.2f}",
    ]


def rooflines(
    path: Path, placement: "Placement", stats: dict[str, Any], figures: dict[str, Any], context: int
) -> list[str]:
    """Lines that hold the measured rates against the bound of the machine's rates."""
    from greenroom.gguf import GGUFFile
    from greenroom.models.registry import read_config
    from greenroom.placement import predict
    from greenroom.placement.calibrate import saved_profile
    from greenroom.placement.machine import machine
    from greenroom.placement.work import Work

    profile = saved_profile(machine().fingerprint)
    if profile is None:
        return [
            "How near that is to the machine's limit: measure it with 'greenroom doctor' first."
        ]
    with GGUFFile(path) as file:
        work = Work.of(file.tensors, read_config(file))
    experts = stats.get("experts") or {}
    routes = experts.get("hits", 0) + experts.get("misses", 0)
    hits = experts["hits"] / routes if routes else predict.resident(placement, work)
    fresh = max(1, figures["prompt_tokens"] - figures["cached_tokens"])
    bounds = {
        "prompt": predict.prefill(work, placement, profile, fresh),
        "generation": predict.decode(work, placement, profile, context, hits=hits),
    }
    lines = [
        compared(name, figures[f"{name}_tokens_per_s"], bound)
        for name, bound in bounds.items()
        if figures[f"{name}_tokens_per_s"]
    ]
    return [*lines, f"Routes whose expert was in VRAM: {hits:.1%}."] if placement.slots else lines


def compared(name: str, rate: float, bound: "Prediction") -> str:
    """One rate beside its bound."""
    share = f"{rate / bound.rate:.0%} of" if bound.rate else "no bound known, not"
    return f"{name}: {rate:.1f} tokens/s, {share} {bound.rate:.1f}, limited by {bound.bound}"

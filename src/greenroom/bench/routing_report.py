"""A profile of a model's routing: recorded with an engine, told as a document, plots and one page
of HTML that needs nothing from elsewhere. Knows how to show statistics, not how they are made.
"""

import base64
import html
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from greenroom import __version__
from greenroom.bench import routing
from greenroom.bench.quality import Progress, Windows
from greenroom.errors import RequestError
from greenroom.experts.trace import Trace, TraceRecorder

if TYPE_CHECKING:
    from greenroom.engine import LLM

OURS = "residency"
_SIMULATED = 1024  # tokens of the trace the caches are simulated on
_OURS_SIZES = 9


def record(llm: "LLM", windows: Windows, name: str, progress: Progress | None = None) -> Trace:
    """Runs the text through the model and returns its routes.

    Raises:
        RequestError: the model has no experts.
    """
    model: Any = llm.engine.model
    if not model.moe_layers:
        raise RequestError(f"{name}: this model has no routed experts to profile", "model")
    recorder = TraceRecorder(model.moe_layers, llm.engine.model_config.moe.experts)
    done = 0
    model.record(recorder)
    try:
        for window in windows.tokens:
            llm.embed(window)  # every position passes all layers, but not the head
            done += len(window)
            if progress is not None:
                progress(done, windows.positions + len(windows.tokens))
    finally:
        model.record(None)
    return recorder.trace(name)


def analyse(trace: Trace, say: Callable[[str], None]) -> dict[str, Any]:
    """All statistics as one JSON-serialisable document of kind "profile"."""
    routes, experts = routing.complete(trace), trace.experts
    if len(routes) < 4:
        raise RequestError("the text is too short to profile; give at least 4 tokens", "text")
    counts = trace.counts()
    say("co-activation and reuse")
    pairs = routing.coactivation(routes, experts)
    distances = routing.reuse_distances(routes, experts)
    lifts = routing.lift(pairs, len(routes))
    strongest = int(lifts.std((1, 2)).argmax())
    return {
        "kind": "profile",
        "version": __version__,
        "model": trace.model,
        "tokens": trace.tokens,
        "layers": list(trace.layers),
        "experts": experts,
        "selected": trace.selected,
        "counts": counts.tolist(),
        "balance": {name: row.tolist() for name, row in routing.imbalance(counts).items()},
        "coactivation": _pairs(trace, lifts, pairs),
        "coactivation_map": {
            "layer": trace.layers[strongest],
            "lift": lifts[strongest].round(3).tolist(),
        },
        "reuse_distance": distances.sum(0).tolist(),
        **_caches(routes[:_SIMULATED], experts, say),
    }


def _pairs(trace: Trace, lifts: Any, pairs: Any, most: int = 20) -> list[dict[str, Any]]:
    """The pairs that meet most above chance, of those with at least 10 meetings."""
    upper = np.triu(np.ones(lifts.shape[1:], bool), 1)
    strength = np.where(upper & (pairs >= 10), lifts, 0).ravel()
    found = []
    for flat in np.argsort(-strength, kind="stable")[:most]:
        layer, a, b = np.unravel_index(flat, lifts.shape)
        if strength[flat] > 0:
            found.append(
                {
                    "layer": trace.layers[layer],
                    "experts": [int(a), int(b)],
                    "tokens": int(pairs[layer, a, b]),
                    "lift": float(strength[flat]),
                }
            )
    return found


def _caches(routes: Any, experts: int, say: Callable[[str], None]) -> dict[str, Any]:
    layers = routes.shape[1]
    sizes = routing.cache_sizes(experts)
    rates = {}
    for name, policy in routing.POLICIES.items():
        say(f"caches of every size: {name}")
        rates[name] = routing.hit_rates(routes, experts, sizes, policy).tolist()
    few = routing.cache_sizes(experts, _OURS_SIZES)
    say(f"caches: {OURS}, cold and warm")
    ours, gains = [], []
    for size in few:
        ours.append(float(routing.simulate(routes, experts, size * layers)[0].mean()))
        gain = routing.warm_gain(routes, experts, size * layers)
        gains.append({name: getattr(gain, name) for name in gain.__slots__})
    return {
        "simulated_tokens": len(routes),
        "hit_rates": {
            **{name: {"slots_per_layer": sizes, "rate": rate} for name, rate in rates.items()},
            OURS: {"slots_per_layer": few, "rate": ours},
        },
        "warm_start": gains,
    }


def summary(document: dict[str, Any]) -> str:
    """The document in a few lines of Markdown."""
    balance = {name: np.array(row) for name, row in document["balance"].items()}
    lines = [
        f"# Routing of {document['model']}",
        "",
        f"{document['tokens']} tokens, {len(document['layers'])} MoE layers of "
        f"{document['experts']} experts, {document['selected']} per token.",
        "",
        "| per layer | mean | worst |",
        "|---|---|---|",
        *(
            f"| {name.replace('_', ' ')} | {row.mean():.3f} "
            f"| {(row.min() if name.startswith('entropy') else row.max()):.3f} |"
            for name, row in balance.items()
        ),
        "",
        f"Hit rates, {document['simulated_tokens']} tokens one by one; slots as a share of all "
        "experts:",
        "",
        "| slots | " + " | ".join(document["hit_rates"]) + " | warm start |",
        "|---|" + "---|" * (len(document["hit_rates"]) + 1),
    ]
    for size, gain in zip(
        document["hit_rates"][OURS]["slots_per_layer"], document["warm_start"], strict=True
    ):
        cells = [_at(curve, size) for curve in document["hit_rates"].values()]
        lines.append(
            f"| {size / document['experts']:.0%} | "
            + " | ".join("-" if cell is None else f"{cell:.1%}" for cell in cells)
            + f" | {gain['first_cold']:.1%} to {gain['first_warm']:.1%} |"
        )
    lines += ["", "Warm start: hits of the first 64 tokens of the second half, with empty slots "
              "and with the experts popular in the first half. The residency policy shares its "
              "slots between layers; the others have the same number in each."]  # fmt: skip
    return "\n".join(lines) + "\n"


def _at(curve: dict[str, Any], size: int) -> float | None:
    sizes = curve["slots_per_layer"]
    return float(curve["rate"][sizes.index(size)]) if size in sizes else None


def plots(document: dict[str, Any]) -> dict[str, bytes]:
    """PNG files by name; ImportError without matplotlib."""
    from matplotlib.figure import Figure

    found = {}
    for name, (size, draw) in PLOTS.items():
        figure = Figure(figsize=size, layout="constrained")
        draw(document, figure, figure.subplots())
        out = io.BytesIO()
        figure.savefig(out, format="png", dpi=90)
        found[name] = out.getvalue()
    return found


def _draw_heat(document: dict[str, Any], figure: Any, axes: Any) -> None:
    counts = np.array(document["counts"])
    share = counts / np.maximum(counts.mean(1, keepdims=True), 1)
    image = axes.imshow(share, aspect="auto", interpolation="nearest", cmap="magma", vmin=0)
    axes.set(xlabel="expert", ylabel="MoE layer")
    figure.colorbar(image, label="use over the layer's mean")


def _draw_hits(document: dict[str, Any], figure: Any, axes: Any) -> None:
    for name, curve in document["hit_rates"].items():
        axes.plot(curve["slots_per_layer"], curve["rate"], ".-", label=name)
    axes.plot([0, document["experts"]], [0, 1], ":", color="grey", label="chance")
    axes.set(xlabel="slots per layer", ylabel="hit rate", ylim=(0, 1.02))
    axes.locator_params(axis="x", integer=True)
    axes.legend()


def _draw_reuse(document: dict[str, Any], figure: Any, axes: Any) -> None:
    axes.bar(range(document["experts"]), document["reuse_distance"][:-1])
    axes.set(xlabel="other experts used since the last use", ylabel="uses")
    axes.locator_params(axis="x", integer=True)


def _draw_pairs(document: dict[str, Any], figure: Any, axes: Any) -> None:
    found = document["coactivation_map"]
    image = axes.imshow(found["lift"], interpolation="nearest", cmap="coolwarm", vmin=0, vmax=2)
    axes.set(title=f"layer {found['layer']}", xlabel="expert", ylabel="expert")
    figure.colorbar(image, label="meetings over chance")


Draw = Callable[[dict[str, Any], Any, Any], None]
PLOTS: dict[str, tuple[tuple[float, float], Draw]] = {
    "heat.png": ((7, 4.5), _draw_heat),
    "hit-rates.png": ((6, 4), _draw_hits),
    "reuse.png": ((6, 3), _draw_reuse),
    "coactivation.png": ((5, 4), _draw_pairs),
}


def page(document: dict[str, Any], images: dict[str, bytes]) -> str:
    """One HTML file with everything in it."""
    pictures = "".join(
        f'<img alt="{html.escape(name)}" src="data:image/png;base64,'
        f'{base64.b64encode(data).decode()}">'
        for name, data in images.items()
    )
    rows = "".join(
        f"<tr><td>{pair['layer']}<td>{pair['experts'][0]}, {pair['experts'][1]}"
        f"<td>{pair['tokens']}<td>{pair['lift']:.2f}"
        for pair in document["coactivation"]
    )
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        f"<title>Routing of {html.escape(document['model'])}</title>"
        "<style>body{font:15px sans-serif;max-width:60rem;margin:2rem auto}"
        "img{max-width:100%;display:block}td,th{padding:.1rem .8rem;text-align:right}</style>"
        f"<pre>{html.escape(summary(document))}</pre>{pictures}"
        "<h2>Experts that meet more often than by chance</h2>"
        f"<table><tr><th>layer<th>experts<th>tokens<th>times chance{rows}</table></html>\n"
    )


def write_profile(document: dict[str, Any], trace: Trace, folder: Path) -> list[str]:
    """Writes trace.npz, profile.json, profile.md, profile.html and the plots.

    Returns:
        Lines about what could not be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    trace.save(folder / "trace.npz")
    (folder / "profile.json").write_text(json.dumps(document) + "\n")
    (folder / "profile.md").write_text(summary(document))
    images, notes = {}, []
    try:
        images = plots(document)
    except ImportError:
        notes = ["plots left out: matplotlib is not installed (pip install 'greenroom[plots]')"]
    for name, data in images.items():
        (folder / name).write_bytes(data)
    (folder / "profile.html").write_text(page(document, images), encoding="utf-8")
    return notes

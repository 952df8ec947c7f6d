"""Shows what the speed benchmark found: Markdown, tables, plots. Measures nothing."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

Row = tuple[str, ...]

HEAD = ("engine", "batch x prompt+tokens", "prefill tokens/s", "first token s", "decode tokens/s",
        "between tokens ms p50 / p95 / p99", "J/token",
        "predicted prefill, decode (error)")  # fmt: skip


def rows(document: Mapping[str, Any]) -> Iterator[Row]:
    """One row per engine and case: medians, with the interquartile range in brackets."""
    for engine, result in document["results"].items():
        for name, case in result["cases"].items():
            gaps = case["between_tokens"]
            pauses = [f"{gaps[p] * 1e3:.1f}" for p in ("p50", "p95", "p99")] if gaps else ["-"]
            yield (
                engine,
                name,
                _spread(case["prefill"], 0),
                _spread(case["first_token"], 3),
                _spread(case["decode"], 1),
                " / ".join(pauses),
                _spread(case["joules_per_token"], 2),
                _predicted(case.get("predicted")),
            )


def _predicted(found: Mapping[str, Any] | None) -> str:
    if not found:
        return "-"
    return ", ".join(f"{part['rate']:.0f} ({part['error']:+.0%})" for part in found.values())


def _spread(summary: Mapping[str, float] | None, digits: int) -> str:
    if summary is None:
        return "-"
    return f"{summary['median']:.{digits}f} ({summary['iqr']:.{digits}f})"


def memory_rows(document: Mapping[str, Any]) -> Iterator[Row]:
    """Load times and peaks, a row per engine; GiB."""
    for engine, result in document["results"].items():
        loads = result["load_seconds"]
        there = [size for part, size in result["memory"].items() if part.endswith(".vram")]
        counted = sum(result["memory"].values()) - sum(there), sum(there)
        yield (
            engine,
            result["backend"],
            str(result["threads"]),
            f"{loads['cold']:.1f}" if "cold" in loads else "-",
            f"{loads['warm']:.1f}",
            f"{result['peak_rss'] / 2**30:.2f}",
            f"{result['peak_vram'] / 2**30:.2f}",
            *(f"{size / 2**30:.2f}" for size in counted),
            _hits(result["experts"]),
        )


MEMORY_HEAD = ("engine", "backend", "threads", "load cold s", "warm s", "peak RAM GiB",
               "peak VRAM GiB (driver)", "ours: RAM GiB", "VRAM GiB", "expert hits")  # fmt: skip


def _hits(experts: Mapping[str, Any] | None) -> str:
    if not experts:
        return "-"
    hits, misses = experts.get("hits"), experts.get("misses")
    if not isinstance(hits, int | float) or not isinstance(misses, int | float):
        return "-"
    return f"{hits / (hits + misses):.1%}" if hits + misses else "-"


def baseline_lines(document: Mapping[str, Any]) -> Iterator[str]:
    """Speed relative to the baseline with 95 % intervals, and what was saved."""
    if "baseline" not in document:
        return
    for case, ratios in document["baseline"]["speed"].items():
        for what, found in ratios.items():
            yield (
                f"{case}: {what} at {found['value']:.2f} times the baseline's rate "
                f"(95 % interval {found['low']:.2f} to {found['high']:.2f})"
            )
    for tier, share in document["baseline"]["saved"].items():
        yield f"{tier.replace('_', ' ')}: {share:.1%} saved"


def peer_lines(document: Mapping[str, Any]) -> Iterator[str]:
    """Rates of another engine on the same file, on the CPU, in turn with ours."""
    found = document.get("against", {})
    for engine, rates in found.items():
        line = (
            f"{engine}: prompt {rates['prompt']:.1f}, generation {rates['generation']:.1f} tokens/s"
        )
        if engine != "greenroom" and rates["prompt"] and rates["generation"]:
            ours = found["greenroom"]
            line += (
                f"; ours are {ours['prompt'] / rates['prompt']:.2f} and "
                f"{ours['generation'] / rates['generation']:.2f} times that"
            )
        yield line


def ceiling_lines(document: Mapping[str, Any]) -> Iterator[str]:
    """What the machine can do, measured before."""
    found = document.get("ceilings")
    if found:
        threads, best = max(found["dram"].items(), key=lambda item: item[1])
        yield f"RAM read {best:.1f} GB/s with {threads} threads; int8 {found['int8']:.0f} GOP/s"
        if found.get("vram"):
            yield (
                f"PCIe {max(found['pcie_up'].values()):.1f} GB/s up, "
                f"{max(found['pcie_down'].values()):.1f} down; VRAM {found['vram']:.0f} GB/s"
            )


def markdown(document: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    model, machine = document["model"], document["machine"]
    lines = [f"# Speed of {model['name'] or model['file']}", ""]
    lines += [f"`{document['command']}`, {document['date']}, {document['runs']} runs.", ""]
    if machine is not None:
        gpus = [gpu["name"] for gpu in machine["gpus"]]
        lines += [f"Machine: {', '.join([machine['processor']['name'], *gpus])}.", ""]
    lines += ["## Ceilings", "", *(f"- {line}" for line in ceiling_lines(document)), ""]
    lines += ["## Speed", "", "Medians, with interquartile ranges in brackets.", ""]
    lines += [*_table(HEAD, rows(document)), "", "## Memory and loading", ""]
    lines += [*_table(MEMORY_HEAD, memory_rows(document)), ""]
    compared = list(baseline_lines(document))
    if compared:
        lines += ["## Against the baseline", "", *(f"- {line}" for line in compared), ""]
    peers = list(peer_lines(document))
    if peers:
        lines += ["## Against another engine", "", *(f"- {line}" for line in peers), ""]
    return "\n".join(lines)


def _table(head: Row, body: Iterator[Row]) -> Iterator[str]:
    for row in (head, ("---",) * len(head), *body):
        yield "| " + " | ".join(row) + " |"


def write_report(document: Mapping[str, Any], folder: Path) -> list[str]:
    """Writes report.json, report.md and plots; names of the files that were written."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(document, indent=1) + "\n")
    (folder / "report.md").write_text(markdown(document))
    return ["report.json", "report.md", *plot(document, folder)]


def plot(document: Mapping[str, Any], folder: Path) -> list[str]:
    """speed.png and latency.png; nothing where matplotlib is missing."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return []
    for name, draw in (("speed.png", _draw_speed), ("latency.png", _draw_latency)):
        figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.4))
        draw(axes, document["results"])
        figure.tight_layout()
        figure.savefig(folder / name, dpi=90)
        pyplot.close(figure)
    return ["speed.png", "latency.png"]


def _draw_speed(axes: Any, results: Mapping[str, Any]) -> None:
    """Rates by case, with quartiles; cases are no scale, so nothing joins them."""
    for axis, what in zip(axes, ("prefill", "decode"), strict=True):
        for i, (engine, result) in enumerate(results.items()):
            of = {name: case[what] for name, case in result["cases"].items() if case[what]}
            middle = [entry["median"] for entry in of.values()]
            down = [entry["median"] - entry["q1"] for entry in of.values()]
            up = [entry["q3"] - entry["median"] for entry in of.values()]
            width = 0.8 / len(results)
            places = [n + (i + 0.5) * width - 0.4 for n in range(len(of))]
            axis.bar(places, middle, width, yerr=[down, up], capsize=3, label=engine)
            axis.set_xticks(range(len(of)), list(of))
        axis.set_title(f"{what}, tokens/s")
        axis.tick_params(axis="x", labelsize=8)
        axis.margins(y=0.3 if len(results) > 1 else 0.1)
    if len(results) > 1:
        axes[0].legend(fontsize=8, loc="upper left", ncols=2)


def _draw_latency(axes: Any, results: Mapping[str, Any]) -> None:
    """Share of first tokens, and of pauses, that took no longer; a colour per case and a style
    per engine.
    """
    titles = {"first_token": "time to first token, ms", "between_tokens": "between tokens, ms"}
    for axis, (what, title) in zip(axes, titles.items(), strict=True):
        for style, (engine, result) in zip(("-", "--", ":"), results.items(), strict=False):
            for colour, (name, case) in enumerate(result["cases"].items()):
                if (values := case["curves"][what]) is None:
                    continue
                shares = [i / (len(values) - 1) for i in range(len(values))]
                label = name if len(results) == 1 else f"{engine}, {name}"
                times = [1e3 * value for value in values]
                axis.plot(times, shares, style, color=f"C{colour}", label=label)
        axis.set_xscale("log")
        for ticks in (axis.xaxis.set_major_formatter, axis.xaxis.set_minor_formatter):
            ticks(lambda value, _: f"{value:g}")
        axis.tick_params(axis="x", which="both", labelsize=7)
        axis.set_ylim(0, 1.02)
        axis.set_title(title)
        axis.grid(alpha=0.3, which="both")
    axes[0].set_ylabel("share that took no longer")
    axes[1].legend(fontsize=7, loc="lower right")

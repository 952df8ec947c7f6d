"""The picture of a model's placement that `/placement` gives and the web page draws.

Where the engine reports residency, it is passed on; an engine without tiers has every
expert in RAM, and the picture says so.
"""

from typing import Any

from greenroom.server.served import Served

TIERS = ("vram", "ram", "disk")


def placement_picture(served: Served) -> dict[str, Any]:
    """Layers x experts with tier and heat, and memory by part.

    `tier[layer][expert]` indexes `tiers`; `heat[layer][expert]` is 0 (cold) to 1. Both are
    empty for a model without experts; `heat` is null where the engine does not count uses.
    """
    engine = served.engine
    stats = engine.stats()
    config = engine.model_config
    moe = getattr(config, "moe", None)
    experts = moe.experts if moe else 0
    layers = config.layers - moe.dense_layers if moe else 0
    found = dict(stats.get("experts", {}))
    in_ram = [[TIERS.index("ram")] * experts for _ in range(layers)] if experts else []
    hits, misses = found.get("hits", 0), found.get("misses", 0)
    return {
        "model": served.name,
        "loaded": True,
        "layers": layers,
        "experts": experts,
        "tiers": TIERS,
        "tier": found.get("tier", in_ram),
        "heat": found.get("heat"),
        "hit_rate": hits / (hits + misses) if hits + misses else None,
        "memory": [
            {"part": part, "bytes": size, "tier": tier_of(part)}
            for part, size in stats.get("memory", {}).items()
        ],
        "budgets": found.get("budgets", {}),
        "prefix_store": stats.get("prefix_store"),
        "running": stats.get("running", 0),
        "waiting": stats.get("waiting", 0),
        "generated_tokens": stats.get("counts", {}).get("generated_tokens", 0),
    }


def tier_of(part: str) -> str:
    """The tier a part of memory belongs to, by its name (`experts.vram`); RAM if unsaid."""
    return next((tier for tier in TIERS if tier in part.lower().split(".")), "ram")

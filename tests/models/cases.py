"""The tiny models every test of the families runs on: odd head counts, sizes and top-k."""

from collections.abc import Callable
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

from . import families
from .hf_export import Tiny


@dataclass(frozen=True)
class Case:
    """How to build a case from a seed, and the options it is loaded with."""

    build: Callable[..., Tiny]
    arguments: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    def make(self, seed: int) -> Tiny:
        """Seeds beyond 1 change the sizes as well as the weights."""
        sizes: dict[str, Any] = {}
        if seed == 2:
            sizes = {"hidden": 72, "heads": 9, "kv_heads": 3, "width": 56}
        elif seed == 3:
            sizes = {"hidden": 64, "heads": 4, "kv_heads": 4, "width": 96, "layers": 3}
        return self.build(seed, **(self.arguments | sizes))

    def make_wide(self, gain: float, seed: int = 7, **more: Any) -> Tiny:
        """Dimensions in whole blocks of 32, for quantised files."""
        sizes: dict[str, Any] = {"hidden": 128, "heads": 4, "kv_heads": 2, "width": 96}
        accepted = signature(self.build).parameters
        for name, size in {"moe_width": 64, "head_dim": 32}.items():
            sizes |= {name: size} if name in accepted else {}
        if "shared" in self.arguments or self.build is families.qwen2moe:
            sizes["shared"] = 96
        return self.build(seed, **(self.arguments | sizes | {"gain": gain} | more))


def ollama(seed: int, **sizes: Any) -> Tiny:
    return families.ollama(families.gpt_oss(seed, **sizes))


CASES: dict[str, Case] = {
    "gpt-oss": Case(families.gpt_oss),
    "gpt-oss-ollama": Case(ollama, {"experts": 4, "used": 1}),
    "grin-moe": Case(families.phimoe),
    "phimoe-window": Case(families.phimoe, {"window": 9, "experts": 3}),
    "phimoe-short": Case(families.phimoe, {"long": False}, {"context_length": 64}),
    "phimoe-long": Case(families.phimoe, {"long": True}),
    "phi-3.5-moe": Case(
        families.phimoe,
        {"long": False, "original": 4096, "context": 131072},
        {"context_length": 4096},
    ),
    "deepseek": Case(families.deepseek, {"experts": 11, "used": 6}),
    "deepseek-dense2": Case(families.deepseek, {"dense": 2}),
    "mixtral": Case(families.mixtral, {"theta": 1e6}),
    "mixtral-top3": Case(families.mixtral, {"experts": 8, "used": 3}),
    "llama": Case(families.llama),
    "llama-plain": Case(families.llama, {"llama3": False}),
    "qwen3moe": Case(families.qwen3moe, {"experts": 13, "used": 8}),
    "qwen3moe-top1": Case(families.qwen3moe, {"used": 1, "head_dim": 20}),
    "qwen3": Case(families.qwen3),
    "qwen3-yarn": Case(families.qwen3, {"yarn": True}),
    "qwen2moe": Case(families.qwen2moe, {"experts": 15, "used": 4}),
    "qwen2": Case(families.qwen2),
    "olmoe": Case(families.olmoe, {"experts": 9, "used": 8}),
    "granitemoe": Case(families.granitemoe),
    "granitemoe-shared": Case(families.granitemoe, {"shared": 24}),
}

# One case per architecture, for what does not depend on the variants.
MAIN = (
    "gpt-oss",
    "phi-3.5-moe",
    "deepseek",
    "mixtral",
    "llama",
    "qwen3moe",
    "qwen3",
    "qwen2moe",
    "qwen2",
    "olmoe",
    "granitemoe",
)

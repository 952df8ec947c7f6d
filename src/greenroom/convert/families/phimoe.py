"""Phi-3.5-MoE, Phi-mini-MoE and GRIN-MoE: one layer stack, biases everywhere but in experts.

GRIN-MoE's config names its class "GRIN-MoE" and has no rotary scaling: its file has neither
tables nor a magnitude, and an original context of its whole length.
"""

from typing import Any

from greenroom.convert.families.base import Tensors
from greenroom.convert.families.mixtral import Mixtral


class PhiMoe(Mixtral):
    """Experts are named as Mixtral's; queries and keys are not permuted."""

    architecture = "phimoe"
    permuted = False

    def moe_metadata(self) -> dict[str, Any]:
        """SparseMixer's threshold is no key of the file: other values than 0.01 are refused."""
        config = self.config
        config.require("router_jitter_noise", 0.01)
        keys = super().moe_metadata()
        if config.rope["rope_type"] == "default":
            # llama.cpp's loader wants the key; without tables it changes nothing.
            context = config.count("max_position_embeddings")
            keys["rope.scaling.original_context_length"] = context
        return keys

    def windows(self) -> dict[str, Any]:
        """llama.cpp's loader wants the key; the whole context is no window."""
        context = self.config.count("max_position_embeddings")
        return {"attention.sliding_window": self.config.count("sliding_window", default=context)}

    def feed_forward(self, layer: int) -> Tensors:
        """Router and experts; newer libraries call them mlp.router and mlp.experts."""
        router = f"model.layers.{layer}.mlp.router"
        if f"{router}.weight" not in self.checkpoint:
            yield from super().feed_forward(layer)
            return
        yield from self.copy(f"blk.{layer}.ffn_gate_inp", router)
        experts = self.config.count("num_local_experts")
        yield from self.experts(layer, "mlp", ("w1", "w3", "w2"), experts)

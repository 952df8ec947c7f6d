"""Mixtral: Llama with experts named w1 (gate), w3 (up), w2 (down)."""

from typing import Any

from greenroom.convert.families.base import Tensors
from greenroom.convert.families.llama import Llama


class Mixtral(Llama):
    """The file's architecture is llama, with expert_count set."""

    def moe_metadata(self) -> dict[str, Any]:
        """The experts' width is feed_forward_length."""
        return {
            "expert_count": self.config.count("num_local_experts"),
            "expert_used_count": self.config.count("num_experts_per_tok"),
        }

    def feed_forward(self, layer: int) -> Tensors:
        """Router and experts."""
        block = "block_sparse_moe"
        if f"model.layers.{layer}.{block}.gate.weight" not in self.checkpoint:
            block = "mlp"
        router = f"model.layers.{layer}.{block}.gate"
        yield from self.copy(f"blk.{layer}.ffn_gate_inp", router)
        experts = self.config.count("num_local_experts")
        yield from self.experts(layer, block, ("w1", "w3", "w2"), experts)

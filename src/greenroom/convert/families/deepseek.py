"""DeepSeek-MoE (v1): leading dense layers, then experts beside an un-gated shared one."""

from typing import Any

from greenroom.convert.families.base import Family, Tensors


class DeepSeek(Family):
    """Queries and keys are stored as adjacent pairs."""

    architecture = "deepseek"
    permuted = True

    def moe_metadata(self) -> dict[str, Any]:
        """Weights are probabilities as they are; other rules are refused."""
        config = self.config
        config.require("norm_topk_prob", False)
        config.require("scoring_func", "softmax")
        config.require("moe_layer_freq", 1)
        return {
            "expert_count": config.count("n_routed_experts"),
            "expert_used_count": config.count("num_experts_per_tok"),
            "expert_feed_forward_length": config.count("moe_intermediate_size"),
            "expert_shared_count": config.count("n_shared_experts", default=0),
            "expert_weights_scale": config.number("routed_scaling_factor", default=1.0),
            "leading_dense_block_count": config.count("first_k_dense_replace", default=0),
        }

    def feed_forward(self, layer: int) -> Tensors:
        """A dense MLP, or router, experts and the shared expert."""
        old, new = f"model.layers.{layer}.mlp", f"blk.{layer}.ffn"
        if layer < self.config.count("first_k_dense_replace", default=0):
            yield from self.mlp(old, new)
            return
        yield from self.copy(f"{new}_gate_inp", f"{old}.gate")
        names = ("gate_proj", "up_proj", "down_proj")
        yield from self.experts(layer, "mlp", names, self.config.count("n_routed_experts"))
        if self.config.count("n_shared_experts", default=0):
            yield from self.mlp(f"{old}.shared_experts", new, "_shexp")

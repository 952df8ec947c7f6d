"""Granite MoE: multipliers in the metadata, fused experts, an optional shared one."""

from typing import Any

from greenroom.convert.families.base import Family, Tensors


class GraniteMoe(Family):
    """`input_linear` is gate and up, one behind the other."""

    architecture = "granitemoe"
    permuted = True

    def moe_metadata(self) -> dict[str, Any]:
        """The experts' width is feed_forward_length."""
        config = self.config
        config.require("position_embedding_type", "rope")
        keys: dict[str, Any] = {
            "expert_count": config.count("num_local_experts"),
            "expert_used_count": config.count("num_experts_per_tok"),
            "embedding_scale": config.number("embedding_multiplier", default=1.0),
            "residual_scale": config.number("residual_multiplier", default=1.0),
            "logit_scale": config.number("logits_scaling", default=1.0),
            "attention.scale": config.number("attention_multiplier", default=1.0),
        }
        if config.get("shared_intermediate_size"):
            keys["expert_shared_feed_forward_length"] = config.count("shared_intermediate_size")
        return keys

    def feed_forward(self, layer: int) -> Tensors:
        """Router, experts, shared expert."""
        old, new = f"model.layers.{layer}", f"blk.{layer}.ffn"
        moe = f"{old}.block_sparse_moe"
        yield from self.copy(f"{new}_gate_inp", f"{moe}.router.layer")
        yield from self.halves(self.take(f"{moe}.input_linear.weight"), new, "_exps")
        yield f"{new}_down_exps.weight", self.take(f"{moe}.output_linear.weight")
        if self.config.get("shared_intermediate_size"):
            fused = self.take(f"{old}.shared_mlp.input_linear.weight")
            width = fused.shape[0] // 2
            yield f"{new}_gate_shexp.weight", fused.part(0, width)
            yield f"{new}_up_shexp.weight", fused.part(width, 2 * width)
            yield from self.copy(f"{new}_down_shexp", f"{old}.shared_mlp.output_linear")

"""Qwen3 dense and MoE: RMSNorm of queries and keys head by head, before the rotation.

Published MoE checkpoints all have norm_topk_prob true, which their GGUF files do not state.
"""

from greenroom.layers.moe import Moe
from greenroom.layers.router import Rule
from greenroom.models.block import Traits
from greenroom.models.model import Model
from greenroom.models.parts import Parts


class Qwen3(Model):
    """The dense family."""

    traits = Traits(qk_norm="head")


class Qwen3Moe(Qwen3):
    """Every layer is MoE, without a shared expert."""

    def feed_forward(self, parts: Parts, layer: int) -> Moe:
        """Weights are normalised unless the file says otherwise."""
        moe = parts.moe
        rule = Rule(
            "softmax",
            moe.used,
            renormalise=moe.renormalise is not False,
            scale=moe.weight_scale,
        )
        return Moe(parts.router(rule), parts.experts())

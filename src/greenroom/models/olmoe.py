"""OLMoE (Allen AI): RMSNorm of queries and keys over all heads together.

Weights are the softmax probabilities as they are; no shared expert.
"""

from greenroom.layers.moe import Moe
from greenroom.layers.router import Rule
from greenroom.models.block import Traits
from greenroom.models.model import Model
from greenroom.models.parts import Parts


class OlMoe(Model):
    """Every layer is MoE."""

    traits = Traits(qk_norm="all")

    def feed_forward(self, parts: Parts, layer: int) -> Moe:
        """Not normalised unless the file says so."""
        moe = parts.moe
        rule = Rule("softmax", moe.used, renormalise=bool(moe.renormalise), scale=moe.weight_scale)
        return Moe(parts.router(rule), parts.experts())

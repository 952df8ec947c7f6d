"""DeepSeek-MoE (v1, 16B): leading dense layers, then routed experts plus an un-gated shared one.

The weights of a token are its softmax probabilities as they are, not normalised again.
"""

from greenroom.layers.moe import Matrix, Moe
from greenroom.layers.router import Rule
from greenroom.models.block import Traits
from greenroom.models.model import Model
from greenroom.models.parts import Parts


class DeepSeek(Model):
    """Queries and keys are stored permuted to adjacent pairs."""

    traits = Traits(neox=False)

    def feed_forward(self, parts: Parts, layer: int) -> Matrix:
        """Dense below `leading_dense_block_count`, MoE with a shared expert above."""
        moe = self.config.moe
        if moe is None or layer < moe.dense_layers:
            return parts.dense()
        rule = Rule(
            "softmax",
            moe.used,
            renormalise=bool(moe.renormalise),
            scale=moe.weight_scale,
        )
        return Moe(parts.router(rule), parts.experts(), parts.shared())

"""Llama and Mixtral: dense or MoE layers; experts merged or, in files before April 2024, apart.

Mixtral's softmax over all experts, top-k and division by the sum is the softmax over the
chosen logits.
"""

from greenroom.layers.moe import Matrix, Moe
from greenroom.layers.router import Rule
from greenroom.models.block import Traits
from greenroom.models.model import Model
from greenroom.models.parts import Parts


class Llama(Model):
    """Queries and keys are stored permuted to adjacent pairs."""

    traits = Traits(neox=False)

    def feed_forward(self, parts: Parts, layer: int) -> Matrix:
        """MoE in every layer if the file has experts."""
        moe = self.config.moe
        if moe is None:
            return parts.dense()
        rule = Rule("softmax", moe.used, renormalise=True, scale=moe.weight_scale)
        return Moe(parts.router(rule), parts.experts())

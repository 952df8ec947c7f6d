"""Qwen2 dense and Qwen1.5/Qwen2 MoE: biased query, key and value; a gated shared expert.

Published MoE checkpoints have norm_topk_prob false, which their GGUF files do not state.
"""

from greenroom.layers.moe import Moe
from greenroom.layers.router import Rule
from greenroom.models.block import Traits
from greenroom.models.model import Model
from greenroom.models.parts import Parts


class Qwen2(Model):
    """The dense family."""

    traits = Traits(biases=frozenset({"q", "k", "v"}))


class Qwen2Moe(Qwen2):
    """Every layer is MoE; the shared expert is scaled by a sigmoid gate."""

    def feed_forward(self, parts: Parts, layer: int) -> Moe:
        """Weights are the softmax probabilities as they are."""
        moe = parts.moe
        rule = Rule("softmax", moe.used, renormalise=bool(moe.renormalise), scale=moe.weight_scale)
        return Moe(parts.router(rule), parts.experts(), parts.shared(gated=True))

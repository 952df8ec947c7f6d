"""Granite MoE (IBM): multipliers of embedding, attention, residual and logits.

The scales are read by `config`; an optional shared expert is not gated.
"""

from greenroom.layers.moe import Moe
from greenroom.layers.router import Rule
from greenroom.models.block import Traits
from greenroom.models.model import Model
from greenroom.models.parts import Parts


class GraniteMoe(Model):
    """Queries and keys are stored permuted to adjacent pairs."""

    traits = Traits(neox=False)

    def feed_forward(self, parts: Parts, layer: int) -> Moe:
        """Top-k on the logits, softmax over the chosen."""
        rule = Rule("softmax_selected", parts.moe.used)
        return Moe(parts.router(rule), parts.experts(), parts.shared())

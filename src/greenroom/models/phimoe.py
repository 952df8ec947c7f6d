"""Phi-3.5-MoE, Phi-mini-MoE and GRIN-MoE (Microsoft): LayerNorm, SparseMixer, longrope.

Follows the publisher's code. llama.cpp computes RMSNorm, weights that sum to 1 and another
magnitude of the rotation; `llama_cpp_math` asks for that.
"""

from dataclasses import replace

from greenroom.errors import UnsupportedModelError
from greenroom.layers.moe import Matrix, Moe
from greenroom.layers.rope import Rope
from greenroom.layers.router import Rule
from greenroom.models.block import Traits
from greenroom.models.model import Model
from greenroom.models.parts import Parts
from greenroom.models.ropes import build_rope

# Phi-3.5-MoE's config.json has short_mscale = long_mscale = this; a GGUF does not carry it.
PHI_35_MAGNITUDE = 1.243163121016122
PHI_35_CONTEXTS = (4096, 131072)  # original and extended: how the model is recognised


class PhiMoe(Model):
    """Every layer is MoE with two experts per token; biases everywhere but in the experts."""

    traits = Traits(centred=True, biases=frozenset({"q", "k", "v", "output"}))

    def make_rope(self, parts: Parts) -> Rope | None:
        """Longrope with the publisher's magnitude; GRIN-MoE has no tables and magnitude 1."""
        rope, config = self.config.rope, self.config
        contexts = (rope.original_context, config.context_length)
        is_phi_35 = rope.scaling == "longrope" and contexts == PHI_35_CONTEXTS
        if is_phi_35 and not self.llama_cpp_math:
            rope = replace(rope, attention_factor=PHI_35_MAGNITUDE)
        return build_rope(rope, parts, self.traits.neox, self.context_length)

    def feed_forward(self, parts: Parts, layer: int) -> Moe:
        """SparseMixer chooses exactly two experts."""
        used = parts.moe.used
        if self.llama_cpp_math:
            rule = Rule("softmax", used, renormalise=True)
        elif used == 2:
            rule = Rule("sparse_mixer", used)
        else:
            raise UnsupportedModelError(
                f"phimoe.expert_used_count = {used} is not implemented: SparseMixer takes 2"
            )
        return Moe(parts.router(rule), parts.experts())

    def head(self, parts: Parts) -> Matrix:
        """The head has a bias."""
        return parts.output(bias=True)

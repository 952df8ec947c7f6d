"""gpt-oss (OpenAI): attention sinks, alternating windows, biased experts, clamped SwiGLU.

Also reads Ollama's spelling: architecture `gptoss`, fused and renamed tensors. Source of the
math: openai/gpt-oss and transformers' gpt_oss.
"""

from torch import Tensor

from greenroom.layers.backend import ExpertWeights
from greenroom.layers.moe import Experts, Moe
from greenroom.layers.rope import Rope
from greenroom.layers.router import Rule
from greenroom.models.block import Traits
from greenroom.models.model import Model
from greenroom.models.parts import Parts
from greenroom.models.ropes import build_rope


class GptOss(Model):
    """Every layer is MoE; top-k on the logits, softmax over the chosen."""

    traits = Traits(biases=frozenset({"q", "k", "v", "output"}), ffn_norm="post_attention_norm")

    def ffn_norm_name(self, parts: Parts) -> str:
        """Ollama calls the norm before the experts ffn_norm."""
        return "ffn_norm" if parts.has("ffn_norm.weight") else self.traits.ffn_norm

    def sinks(self, parts: Parts) -> Tensor | None:
        """One logit per head."""
        name = "attn_sinks" if parts.has("attn_sinks") else "attn_sinks.weight"
        return parts.values(name, self.config.attention.heads)

    def make_rope(self, parts: Parts) -> Rope | None:
        """The publisher does not round YaRN's bounds (`truncate: false`); llama.cpp does."""
        return build_rope(
            self.config.rope, parts, self.traits.neox, self.context_length, self.llama_cpp_math
        )

    def feed_forward(self, parts: Parts, layer: int) -> Moe:
        """Router and experts, all with biases."""
        rule = Rule("softmax_selected", parts.moe.used)
        return Moe(parts.router(rule, bias=True), gpt_oss_experts(parts))


def gpt_oss_experts(parts: Parts) -> Experts:
    """The experts with their biases, from tensors apart or fused with interleaved rows."""
    moe, hidden = parts.moe, parts.config.hidden_size
    gate, up = parts.gate_up(interleaved=True)
    if parts.has("ffn_gate_up_exps.bias"):
        fused = parts.values("ffn_gate_up_exps.bias", moe.experts, 2 * moe.width)
        gate_bias, up_bias = fused[:, 0::2].contiguous(), fused[:, 1::2].contiguous()
    else:
        gate_bias = parts.values("ffn_gate_exps.bias", moe.experts, moe.width)
        up_bias = parts.values("ffn_up_exps.bias", moe.experts, moe.width)
    down_bias = parts.values("ffn_down_exps.bias", moe.experts, hidden)
    down = parts.expert_stack("down")
    biases = (gate_bias, up_bias, down_bias)
    return parts.backend.experts(ExpertWeights(gate, up, down, biases, "gpt-oss"))

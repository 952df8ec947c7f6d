"""OLMoE: queries and keys are normalised over the whole projection."""

from typing import Any

from greenroom.convert.families.qwen import Qwen3Moe


class OlMoe(Qwen3Moe):
    """The experts' width is feed_forward_length; weights are plain probabilities."""

    architecture = "olmoe"

    def check_weights(self) -> None:
        """Files of this architecture have plain probabilities as weights."""
        self.config.require("norm_topk_prob", False)

    def moe_metadata(self) -> dict[str, Any]:
        """Clamping of queries, keys and values is a key of its own."""
        self.check_weights()
        keys: dict[str, Any] = {
            "expert_count": self.config.count("num_experts", "num_local_experts"),
            "expert_used_count": self.config.count("num_experts_per_tok"),
        }
        if "clip_qkv" in self.config:
            keys["attention.clamp_kqv"] = self.config.number("clip_qkv")
        return keys

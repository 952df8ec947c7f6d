"""Qwen 2 and 3, dense and with experts."""

from typing import Any

from greenroom.convert.families.base import Family, Tensors
from greenroom.errors import UnsupportedModelError


class Qwen2(Family):
    """Biases on queries, keys and values."""

    architecture = "qwen2"


class Qwen3(Family):
    """Queries and keys are normalised per head."""

    architecture = "qwen3"


class Qwen3Moe(Qwen3):
    """Every layer has experts."""

    architecture = "qwen3moe"

    def moe_metadata(self) -> dict[str, Any]:
        """The experts have a width of their own."""
        config = self.config
        dense = config.get("mlp_only_layers", default=[])
        if dense or config.count("decoder_sparse_step", default=1) != 1:
            raise UnsupportedModelError(
                f"{config.path}: mlp_only_layers = {dense} or decoder_sparse_step other than 1 "
                f"is not implemented for {self.architecture}"
            )
        self.check_weights()
        return {
            "expert_count": config.count("num_experts", "num_local_experts"),
            "expert_used_count": config.count("num_experts_per_tok"),
            "expert_feed_forward_length": config.count("moe_intermediate_size"),
        }

    def check_weights(self) -> None:
        """Files of this architecture have weights that sum to one."""
        self.config.require("norm_topk_prob", True)

    def feed_forward(self, layer: int) -> Tensors:
        """Router and experts."""
        yield from self.copy(f"blk.{layer}.ffn_gate_inp", f"model.layers.{layer}.mlp.gate")
        names = ("gate_proj", "up_proj", "down_proj")
        experts = self.config.count("num_experts", "num_local_experts")
        yield from self.experts(layer, "mlp", names, experts)


class Qwen2Moe(Qwen3Moe):
    """A shared expert with a gate of its own; weights are not normalised again."""

    architecture = "qwen2moe"

    def check_weights(self) -> None:
        """Files of this architecture have plain probabilities as weights."""
        self.config.require("norm_topk_prob", False)

    def moe_metadata(self) -> dict[str, Any]:
        """The shared expert has a width of its own."""
        shared = self.config.count("shared_expert_intermediate_size")
        return super().moe_metadata() | {"expert_shared_feed_forward_length": shared}

    def feed_forward(self, layer: int) -> Tensors:
        """Router, experts, shared expert and its gate, a vector."""
        yield from super().feed_forward(layer)
        old = f"model.layers.{layer}.mlp"
        yield from self.mlp(f"{old}.shared_expert", f"blk.{layer}.ffn", "_shexp")
        gate = self.take(f"{old}.shared_expert_gate.weight")  # (1, d)
        width = gate.shape[1]
        flat = type(gate)((width,), lambda start, stop: gate.all()[0, start:stop], gate.source)
        yield f"blk.{layer}.ffn_gate_inp_shexp.weight", flat

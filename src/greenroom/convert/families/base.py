"""What converters of all families share: embedding, norms, attention, head, common metadata.

A family's file says what differs. Names follow llama.cpp's converters, so that their files and
ours are interchangeable.
"""

from collections.abc import Iterator
from typing import Any, ClassVar

from greenroom.convert.checkpoint import Checkpoint
from greenroom.convert.config import Config, rope_metadata, rope_tables
from greenroom.convert.values import Values, stack
from greenroom.errors import UnsupportedModelError

Tensors = Iterator[tuple[str, Values]]

# Derived from the configuration, written by old versions of the publishers' libraries.
IGNORED_ENDINGS = ("rotary_emb.inv_freq", "attn.masked_bias", "attn.bias.mask")


class Family:
    """Converts one class of checkpoints.

    Args:
        checkpoint: its tensors.
        config: its configuration.
    """

    architecture: ClassVar[str] = "llama"
    permuted: ClassVar[bool] = False  # rows of q and k stored as adjacent pairs
    ffn_norm: ClassVar[str] = "ffn_norm"

    def __init__(self, checkpoint: Checkpoint, config: Config) -> None:
        self.checkpoint = checkpoint
        self.config = config
        self.taken: set[str] = set()

    # What a family changes.

    def moe_metadata(self) -> dict[str, Any]:
        """Keys of the experts, without the prefix."""
        return {}

    def feed_forward(self, layer: int) -> Tensors:
        """Tensors behind the second norm of a layer."""
        yield from self.mlp(f"model.layers.{layer}.mlp", f"blk.{layer}.ffn")

    # What all share.

    def metadata(self) -> dict[str, Any]:
        """All keys under the architecture's prefix."""
        config = self.config
        heads = config.count("num_attention_heads")
        keys: dict[str, Any] = {
            "block_count": config.count("num_hidden_layers"),
            "context_length": config.count("max_position_embeddings"),
            "embedding_length": config.count("hidden_size"),
            "feed_forward_length": config.count("intermediate_size"),
            "attention.head_count": heads,
            "attention.head_count_kv": config.count("num_key_value_heads", default=heads),
            "attention.key_length": config.head_dim,
            "attention.value_length": config.head_dim,
            "attention.layer_norm_rms_epsilon": config.number("rms_norm_eps"),
            "vocab_size": config.count("vocab_size"),
            **rope_metadata(config),
            **self.windows(),
            **self.moe_metadata(),
        }
        return {f"{self.architecture}.{key}": value for key, value in keys.items()}

    def windows(self) -> dict[str, Any]:
        """Sliding windows, if the model uses any."""
        config = self.config
        window = config.get("sliding_window")
        kinds = config.get("layer_types")
        if window is None or config.get("use_sliding_window") is False:
            return {}
        if kinds is None:
            return {"attention.sliding_window": int(window)}
        slides = [kind == "sliding_attention" for kind in kinds]
        if not any(slides):
            return {}
        keys: dict[str, Any] = {"attention.sliding_window": int(window)}
        if not all(slides):
            keys["attention.sliding_window_pattern"] = slides
        return keys

    def tensors(self) -> Tensors:
        """(name in the file, values) in the order they are written.

        Raises:
            ModelFileError: a tensor is missing.
            UnsupportedModelError: the checkpoint has tensors that have no place.
        """
        yield from self.embedding()
        for layer in range(self.config.count("num_hidden_layers")):
            yield from self.attention(layer)
            yield from self.feed_forward(layer)
        self.finish()

    def embedding(self) -> Tensors:
        """What belongs to no layer."""
        yield from self.copy("token_embd", "model.embed_tokens")
        yield from rope_tables(self.config).items()
        yield from self.copy("output_norm", "model.norm")
        if self.config.get("tie_word_embeddings", default=False):
            self.taken.add("lm_head.weight")
        elif "lm_head.weight" in self.checkpoint:
            yield from self.copy("output", "lm_head")

    def attention(self, layer: int) -> Tensors:
        """Norms and projections of a layer."""
        old, new = f"model.layers.{layer}", f"blk.{layer}"
        heads = self.config.count("num_attention_heads")
        counts = {"q": heads, "k": self.config.count("num_key_value_heads", default=heads)}
        yield from self.copy(f"{new}.attn_norm", f"{old}.input_layernorm")
        for letter in "qkv":
            count = counts.get(letter, 0) if self.permuted else 0
            yield from self.copy(
                f"{new}.attn_{letter}", f"{old}.self_attn.{letter}_proj", heads=count
            )
        yield from self.copy(f"{new}.attn_output", f"{old}.self_attn.o_proj")
        for letter in "qk":
            name = f"{old}.self_attn.{letter}_norm"
            if f"{name}.weight" in self.checkpoint:
                yield from self.copy(f"{new}.attn_{letter}_norm", name)
        yield from self.copy(f"{new}.{self.ffn_norm}", f"{old}.post_attention_layernorm")

    def mlp(self, old: str, new: str, suffix: str = "") -> Tensors:
        """gate, up and down of a dense or shared MLP."""
        for part in ("gate", "up", "down"):
            yield from self.copy(f"{new}_{part}{suffix}", f"{old}.{part}_proj")

    def experts(self, layer: int, block: str, names: tuple[str, str, str], experts: int) -> Tensors:
        """The routed experts of a layer, one by one or fused, as one tensor per matrix.

        Args:
            layer: its number.
            block: where they are, e.g. "mlp".
            names: of gate, up and down.
            experts: how many.
        """
        old, new = f"model.layers.{layer}.{block}.experts", f"blk.{layer}"
        parts = zip(("gate", "up", "down"), names, strict=True)
        if f"{old}.gate_up_proj" in self.checkpoint:
            yield from self.halves(self.take(f"{old}.gate_up_proj"), f"{new}.ffn", "_exps")
            yield f"{new}.ffn_down_exps.weight", self.take(f"{old}.down_proj")
            return
        for part, name in parts:
            stored = [self.take(f"{old}.{e}.{name}.weight") for e in range(experts)]
            yield f"{new}.ffn_{part}_exps.weight", stack(stored)

    def halves(self, fused: Values, new: str, suffix: str) -> Tensors:
        """(experts, 2f, d) as gate, the first f rows, and up."""
        width = fused.shape[1] // 2
        yield f"{new}_gate{suffix}.weight", fused.rows(0, width)
        yield f"{new}_up{suffix}.weight", fused.rows(width)

    def copy(self, new: str, old: str, heads: int = 0) -> Tensors:
        """Weight and, where there is one, bias; rows permuted if `heads` is given."""
        yield f"{new}.weight", self._permuted(self.take(f"{old}.weight"), heads)
        if f"{old}.bias" in self.checkpoint:
            yield f"{new}.bias", self._permuted(self.take(f"{old}.bias"), heads)

    @staticmethod
    def _permuted(values: Values, heads: int) -> Values:
        return values.permuted(heads) if heads else values

    def take(self, name: str) -> Values:
        """A tensor of the checkpoint; ModelFileError if it is missing."""
        self.taken.add(name)
        return self.checkpoint.values(name)

    def finish(self) -> None:
        """Raises UnsupportedModelError if a tensor was left: the math would be another."""
        left = [
            name
            for name in self.checkpoint
            if name not in self.taken and not name.endswith(IGNORED_ENDINGS)
        ]
        if left:
            more = f" and {len(left) - 1} more" if len(left) > 1 else ""
            raise UnsupportedModelError(
                f"{self.checkpoint.folder}: tensor {left[0]}{more} is not part of "
                f"{self.architecture}; a variant of it is not implemented"
            )

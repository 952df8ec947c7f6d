"""gpt-oss as OpenAI publishes it: q, k and v in one matrix, names and keys of its own."""

from typing import Any

from greenroom.convert.checkpoint import Checkpoint
from greenroom.convert.config import Config
from greenroom.convert.families.base import Tensors
from greenroom.convert.families.gpt_oss import GptOss
from greenroom.convert.values import Values

MARK = "block.0.attn.qkv.weight"  # by this tensor the layout is recognised


class GptOssOriginal(GptOss):
    """The configuration is rewritten into HF's keys; the math is the same."""

    def __init__(self, checkpoint: Checkpoint, config: Config) -> None:
        super().__init__(checkpoint, Config(config.path, as_hf(config)))

    def embedding(self) -> Tensors:
        """Embedding, last norm, head."""
        yield "token_embd.weight", self.take("embedding.weight")
        yield "output_norm.weight", self.take("norm.scale")
        yield "output.weight", self.take("unembedding.weight")

    def attention(self, layer: int) -> Tensors:
        """The rows of `qkv` are those of all query heads, then keys, then values."""
        config, old, new = self.config, f"block.{layer}", f"blk.{layer}"
        heads, kv_heads = (config.count(f"num_{k}_heads") for k in ("attention", "key_value"))
        yield f"{new}.attn_norm.weight", self.take(f"{old}.attn.norm.scale")
        for end in ("weight", "bias"):
            fused = self.take(f"{old}.attn.qkv.{end}")
            start = 0
            for letter, count in zip("qkv", (heads, kv_heads, kv_heads), strict=True):
                stop = start + count * config.head_dim
                yield f"{new}.attn_{letter}.{end}", fused.part(start, stop)
                start = stop
        yield from self.copy(f"{new}.attn_output", f"{old}.attn.out")
        yield f"{new}.attn_sinks.weight", self.take(f"{old}.attn.sinks")
        yield f"{new}.{self.ffn_norm}.weight", self.take(f"{old}.mlp.norm.scale")

    def feed_forward(self, layer: int) -> Tensors:
        """Router and experts: mlp1 is gate and up, mlp2 is down."""
        old = f"block.{layer}.mlp"
        yield from self.routed(f"blk.{layer}.ffn", f"{old}.gate", f"{old}.mlp1", f"{old}.mlp2")

    def matrix(self, name: str) -> Values:
        """Blocks, or numbers (experts, out, in) as they are."""
        weight = f"{name}_weight"
        if f"{weight}.blocks" in self.checkpoint:
            return self.blocks(f"{weight}.blocks", f"{weight}.scales")
        return self.take(weight)


def as_hf(config: Config) -> dict[str, Any]:
    """HF's keys for OpenAI's."""
    original = config.count("initial_context_length", default=4096)
    factor = config.number("rope_scaling_factor", default=32.0)
    return config.values | {
        "rms_norm_eps": 1e-5,  # a constant of the reference code
        "max_position_embeddings": int(original * factor),
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": config.number("rope_theta", default=150000.0),
            "factor": factor,
            "original_max_position_embeddings": original,
            "beta_fast": config.number("rope_ntk_beta", default=32.0),
            "beta_slow": config.number("rope_ntk_alpha", default=1.0),
        },
    }

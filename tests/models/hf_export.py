"""Tiny random models made with HF transformers, as GGUF tensors and metadata.

Each builder returns a `Tiny`: the reference in float32 and what a converter would write. Names,
row permutations and de-interleaving follow llama.cpp's converters.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

VOCABULARY = 96
Arrays = dict[str, np.ndarray]


@dataclass
class Tiny:
    """A reference model and the content of its file."""

    architecture: str
    model: Any
    metadata: dict[str, Any]
    tensors: Arrays = field(default_factory=dict)

    def logits(self, tokens: list[int]) -> torch.Tensor:
        """(tokens, vocabulary) float32 of one pass."""
        with torch.no_grad():
            return self.model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0].float()

    def hidden(self, tokens: list[int]) -> torch.Tensor:
        """(tokens, d) float32 behind the final norm."""
        with torch.no_grad():
            return self.model.model(input_ids=torch.tensor([tokens])).last_hidden_state[0]

    def write(self, path: Path, type: str = "F32", overrides: Arrays | None = None) -> Path:
        """Writes the file; matrices are stored as `type` where a converter would."""
        writer = gguf.GGUFWriter(str(path), self.architecture)
        for key, value in self.metadata.items():
            add_value(writer, key, value)
        for name, array in (overrides if overrides is not None else self.tensors).items():
            add_tensor(writer, name, array, type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path


def add_value(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """Adds a value under its Python type."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def add_tensor(writer: gguf.GGUFWriter, name: str, array: np.ndarray, type: str) -> None:
    """Adds a tensor as `type`, or as float32 where converters keep that."""
    kind = gguf.GGMLQuantizationType[type]
    if kept_float32(name, array) or kind == gguf.GGMLQuantizationType.F32:
        writer.add_tensor(name, np.ascontiguousarray(array, np.float32))
        return
    raw = gguf.quants.quantize(np.ascontiguousarray(array, np.float32), kind)
    writer.add_tensor(name, raw, raw_dtype=kind)


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Weights that make every part matter: norms near 1, biases and logits of order 1."""
    generator = torch.Generator().manual_seed(seed)

    def normal(shape: torch.Size, std: float) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * std

    gain = 10 * model.config.initializer_range
    tied = model.config.tie_word_embeddings  # then the embedding also makes the logits

    for name, p in model.named_parameters():
        if "norm" in name and name.endswith("weight"):
            p.data = 1 + normal(p.shape, 0.2)
        elif name.endswith("bias") or "sinks" in name or p.dim() == 1:
            p.data = normal(p.shape, 0.3)
        elif "embed" in name:
            p.data = normal(p.shape, 0.15 if tied else 1.0)
        else:
            p.data = normal(p.shape, gain * min(p.shape[-2:]) ** -0.5)
    model.eval()


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head from halves to adjacent pairs (llama's q and k)."""
    pairs = weight.reshape(heads, 2, -1, *weight.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(weight.shape)


def rounded(tensors: Arrays, type: str) -> Arrays:
    """The tensors with the values a file of this type holds."""
    kind = gguf.GGMLQuantizationType[type]
    return {
        name: array if kept_float32(name, array) else through(array, kind)
        for name, array in tensors.items()
    }


def through(array: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """Quantised and dequantised."""
    raw = gguf.quants.quantize(np.ascontiguousarray(array, np.float32), kind)
    return np.asarray(gguf.quants.dequantize(raw, kind), np.float32).reshape(array.shape)


def kept_float32(name: str, array: np.ndarray) -> bool:
    """Whether converters never quantise the tensor."""
    return array.ndim == 1 or name.endswith(".bias") or "ffn_gate_inp" in name


class Source:
    """HF's state dict, read as float32 arrays."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.state = {k: v.detach().float().numpy() for k, v in model.state_dict().items()}

    def __getitem__(self, name: str) -> np.ndarray:
        return self.state[name]

    def copy(self, out: Arrays, target: str, source: str, heads: int = 0) -> None:
        """Copies weight and, where there is one, bias; permuted if `heads` is given."""
        for end in ("weight", "bias"):
            if f"{source}.{end}" in self.state:
                array = self.state[f"{source}.{end}"]
                out[f"{target}.{end}"] = permute(array, heads) if heads else array


def base_tensors(model: Any, permuted: bool = False, ffn_norm: str = "ffn_norm") -> Arrays:
    """Embedding, norms, attention and head, which all families share."""
    source, out, config = Source(model), {}, model.config
    source.copy(out, "token_embd", "model.embed_tokens")
    source.copy(out, "output_norm", "model.norm")
    if not config.tie_word_embeddings:
        source.copy(out, "output", "lm_head")
    for i in range(config.num_hidden_layers):
        old, new = f"model.layers.{i}", f"blk.{i}"
        source.copy(out, f"{new}.attn_norm", f"{old}.input_layernorm")
        source.copy(out, f"{new}.{ffn_norm}", f"{old}.post_attention_layernorm")
        heads = (config.num_attention_heads, config.num_key_value_heads)
        for letter, count in zip("qk", heads, strict=True):
            projection = f"{old}.self_attn.{letter}_proj"
            source.copy(out, f"{new}.attn_{letter}", projection, count if permuted else 0)
            source.copy(out, f"{new}.attn_{letter}_norm", f"{old}.self_attn.{letter}_norm")
        source.copy(out, f"{new}.attn_v", f"{old}.self_attn.v_proj")
        source.copy(out, f"{new}.attn_output", f"{old}.self_attn.o_proj")
    return out


def expert_tensors(model: Any, out: Arrays, layer: int, block: str, router: str) -> None:
    """Splits HF's concatenated gate_up_proj (E, 2f, d) and copies the router."""
    source = Source(model)
    old, new = f"model.layers.{layer}.{block}", f"blk.{layer}"
    source.copy(out, f"{new}.ffn_gate_inp", f"{old}.{router}")
    gate_up = source[f"{old}.experts.gate_up_proj"]
    width = gate_up.shape[1] // 2
    out[f"{new}.ffn_gate_exps.weight"] = gate_up[:, :width]
    out[f"{new}.ffn_up_exps.weight"] = gate_up[:, width:]
    out[f"{new}.ffn_down_exps.weight"] = source[f"{old}.experts.down_proj"]


def mlp_tensors(model: Any, out: Arrays, layer: int, block: str, suffix: str = "") -> None:
    """gate, up and down of a dense or shared MLP."""
    source = Source(model)
    for part in ("gate", "up", "down"):
        old = f"model.layers.{layer}.{block}.{part}_proj"
        source.copy(out, f"blk.{layer}.ffn_{part}{suffix}", old)


def base_metadata(architecture: str, config: Any, **more: Any) -> dict[str, Any]:
    """The keys all families write; `more` without the prefix."""
    head_dim = getattr(config, "head_dim", None)
    head_dim = head_dim or config.hidden_size // config.num_attention_heads
    keys: dict[str, Any] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": head_dim,
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
    }
    return {f"{architecture}.{k}": v for k, v in (keys | more).items()}


def shapes(
    hidden: int = 48,
    heads: int = 6,
    kv_heads: int = 2,
    layers: int = 2,
    width: int = 40,
    theta: float = 10000.0,
    gain: float = 1.2,
    **rope: Any,
) -> dict[str, Any]:
    """Arguments every HF configuration takes."""
    parameters = {"rope_type": "default", "rope_theta": theta} | rope
    return {
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "num_hidden_layers": layers,
        "intermediate_size": width,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 512,
        "rope_parameters": parameters,
        "tie_word_embeddings": False,
        "initializer_range": gain / 10,  # for `randomise`; transformers allows no more than 1
        "attn_implementation": "eager",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
    }

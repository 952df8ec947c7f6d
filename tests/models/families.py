"""One builder per architecture: a tiny HF model and its GGUF tensors."""

from typing import Any

import numpy as np
import torch
from torch import nn

from .hf_export import (
    Source,
    Tiny,
    base_metadata,
    base_tensors,
    expert_tensors,
    mlp_tensors,
    randomise,
    shapes,
)

MSCALE = 1.243163121016122


def moe_keys(experts: int, used: int, width: int | None = None) -> dict[str, int]:
    keys = {"expert_count": experts, "expert_used_count": used}
    return keys if width is None else keys | {"expert_feed_forward_length": width}


def gpt_oss(
    seed: int, experts: int = 5, used: int = 3, head_dim: int = 16, window: int = 7, **size: Any
) -> Tiny:
    from transformers.models.gpt_oss import GptOssConfig, GptOssForCausalLM

    yarn = {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 8.0,
        "beta_slow": 1.0,
        "truncate": False,
    }
    base = shapes(**({"theta": 150000.0, **yarn} | size))
    yarn = base["rope_parameters"]
    config = GptOssConfig(
        **base,
        head_dim=head_dim,
        num_local_experts=experts,
        num_experts_per_tok=used,
        sliding_window=window,
    )
    model = GptOssForCausalLM(config)
    randomise(model, seed)
    out, source = base_tensors(model, ffn_norm="post_attention_norm"), Source(model)
    for i in range(config.num_hidden_layers):
        old, new = f"model.layers.{i}", f"blk.{i}"
        source.copy(out, f"{new}.ffn_gate_inp", f"{old}.mlp.router")
        out[f"{new}.attn_sinks.weight"] = source[f"{old}.self_attn.sinks"]
        gate_up = source[f"{old}.mlp.experts.gate_up_proj"].transpose(0, 2, 1)
        bias = source[f"{old}.mlp.experts.gate_up_proj_bias"]
        for start, part in enumerate(("gate", "up")):
            out[f"{new}.ffn_{part}_exps.weight"] = gate_up[:, start::2]
            out[f"{new}.ffn_{part}_exps.bias"] = bias[:, start::2]
        down = source[f"{old}.mlp.experts.down_proj"].transpose(0, 2, 1)
        out[f"{new}.ffn_down_exps.weight"] = down
        out[f"{new}.ffn_down_exps.bias"] = source[f"{old}.mlp.experts.down_proj_bias"]
    keys = moe_keys(experts, used, config.intermediate_size) | {
        "attention.sliding_window": window,
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": float(yarn["factor"]),
        "rope.scaling.original_context_length": yarn["original_max_position_embeddings"],
        "rope.scaling.yarn_beta_fast": float(yarn["beta_fast"]),
        "rope.scaling.yarn_beta_slow": float(yarn["beta_slow"]),
    }
    return Tiny("gpt-oss", model, base_metadata("gpt-oss", config, **keys), out)


def ollama(tiny: Tiny) -> Tiny:
    """The same gpt-oss as Ollama spells it: fused and renamed tensors, arch `gptoss`."""
    out: dict[str, np.ndarray] = {}
    renamed = {"attn_output.": "attn_out.", "post_attention_norm": "ffn_norm"}
    for name, array in tiny.tensors.items():
        for old, new in renamed.items():
            name = name.replace(old, new)
        out[name.replace("attn_sinks.weight", "attn_sinks")] = array
    for i in range(tiny.model.config.num_hidden_layers):
        for end in ("weight", "bias"):
            parts = [out.pop(f"blk.{i}.attn_{letter}.{end}") for letter in "qkv"]
            out[f"blk.{i}.attn_qkv.{end}"] = np.concatenate(parts)
            gate, up = (out.pop(f"blk.{i}.ffn_{part}_exps.{end}") for part in ("gate", "up"))
            fused = np.stack([gate, up], 2)
            shape = (gate.shape[0], 2 * gate.shape[1], *gate.shape[2:])
            out[f"blk.{i}.ffn_gate_up_exps.{end}"] = fused.reshape(shape)
    keys = {k.replace("gpt-oss.", "gptoss."): v for k, v in tiny.metadata.items()}
    return Tiny("gptoss", tiny.model, keys, out)


def phimoe(seed: int, experts: int = 6, long: bool | None = None, **size: Any) -> Tiny:
    """`long`: None without tables (GRIN-MoE), else whether the long table is in force.

    transformers never hands the length to its longrope (it always takes the short table), so
    for the long one the reference gets the long factors in both places.
    """
    from transformers.models.phimoe import PhimoeConfig, PhimoeForCausalLM

    window = size.pop("window", None)
    original = size.pop("original", 64)
    context = size.pop("context", 512)
    base = shapes(**size)
    half = base["hidden_size"] // base["num_attention_heads"] // 2
    tables = {"short": np.linspace(1, 1.5, half), "long": np.linspace(1, 6, half)}
    if long is not None:
        used = tables["long" if long else "short"].tolist()
        base["rope_parameters"] |= {
            "rope_type": "longrope",
            "short_factor": used,
            "long_factor": used,
            "short_mscale": MSCALE,
            "long_mscale": MSCALE,
            "original_max_position_embeddings": original,
        }
    base["max_position_embeddings"] = context
    config = PhimoeConfig(
        **base,
        num_local_experts=experts,
        num_experts_per_tok=2,
        attention_bias=True,
        lm_head_bias=True,
        sliding_window=window,
        router_jitter_noise=0.01,
        input_jitter_noise=0.01,
    )
    model = PhimoeForCausalLM(config)
    randomise(model, seed)
    out = base_tensors(model)
    for i in range(config.num_hidden_layers):
        expert_tensors(model, out, i, "mlp", "router")
    keys: dict[str, Any] = moe_keys(experts, 2)
    keys["attention.sliding_window"] = window or context
    if long is not None:
        out |= {f"rope_factors_{k}.weight": v.astype(np.float32) for k, v in tables.items()}
        keys["rope.scaling.original_context_length"] = original
        keys["rope.scaling.attn_factor"] = MSCALE
    return Tiny("phimoe", model, base_metadata("phimoe", config, **keys), out)


def qwen2moe_model(experts: int, used: int, moe_width: int, shared: int, **more: Any) -> Any:
    from transformers.models.qwen2_moe import Qwen2MoeConfig, Qwen2MoeForCausalLM

    config = Qwen2MoeConfig(
        **more,
        num_experts=experts,
        num_experts_per_tok=used,
        moe_intermediate_size=moe_width,
        shared_expert_intermediate_size=shared,
        norm_topk_prob=False,
    )
    return Qwen2MoeForCausalLM(config)


def deepseek(
    seed: int, experts: int = 7, used: int = 3, moe_width: int = 24, dense: int = 1, **size: Any
) -> Tiny:
    """No DeepSeek v1 in transformers: qwen2_moe without q/k/v biases, its shared expert's gate
    held open (sigmoid(100) is 1 in float32), and leading dense layers."""
    base = shapes(**({"layers": 3} | size))
    layers = list(range(dense))
    model = qwen2moe_model(
        experts, used, moe_width, 2 * moe_width, **base, qkv_bias=False, mlp_only_layers=layers
    )
    randomise(model, seed)
    out = base_tensors(model, permuted=True)
    for i, layer in enumerate(model.model.layers):
        if i < dense:
            mlp_tensors(model, out, i, "mlp")
            continue
        expert_tensors(model, out, i, "mlp", "gate")
        mlp_tensors(model, out, i, "mlp.shared_expert", "_shexp")
        layer.mlp.shared_expert_gate = OpenGate()
    keys = moe_keys(experts, used, moe_width) | {
        "expert_shared_count": 2,
        "leading_dense_block_count": dense,
        "expert_weights_scale": 1.0,
    }
    return Tiny("deepseek", model, base_metadata("deepseek", model.config, **keys), out)


class OpenGate(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.new_full((*x.shape[:-1], 1), 100.0)


def qwen2moe(
    seed: int, experts: int = 7, used: int = 3, moe_width: int = 24, shared: int = 56, **size: Any
) -> Tiny:
    model = qwen2moe_model(experts, used, moe_width, shared, **shapes(**size))
    randomise(model, seed)
    out, source = base_tensors(model), Source(model)
    for i in range(model.config.num_hidden_layers):
        expert_tensors(model, out, i, "mlp", "gate")
        mlp_tensors(model, out, i, "mlp.shared_expert", "_shexp")
        gate = source[f"model.layers.{i}.mlp.shared_expert_gate.weight"]
        out[f"blk.{i}.ffn_gate_inp_shexp.weight"] = gate[0]
    keys = moe_keys(experts, used, moe_width) | {"expert_shared_feed_forward_length": shared}
    return Tiny("qwen2moe", model, base_metadata("qwen2moe", model.config, **keys), out)


def mixtral(seed: int, experts: int = 5, used: int = 2, **size: Any) -> Tiny:
    from transformers.models.mixtral import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        **shapes(**size), num_local_experts=experts, num_experts_per_tok=used, sliding_window=None
    )
    model = MixtralForCausalLM(config)
    randomise(model, seed)
    out = base_tensors(model, permuted=True)
    for i in range(config.num_hidden_layers):
        expert_tensors(model, out, i, "mlp", "gate")
    return Tiny("llama", model, base_metadata("llama", config, **moe_keys(experts, used)), out)


def legacy(tiny: Tiny) -> dict[str, np.ndarray]:
    """Mixtral's tensors as files before April 2024 have them: one per expert."""
    out: dict[str, np.ndarray] = {}
    for name, array in tiny.tensors.items():
        if "_exps" not in name:
            out[name] = array
            continue
        for expert, matrix in enumerate(array):
            out[name.replace("_exps", f".{expert}")] = matrix
    return out


def llama(seed: int, llama3: bool = True, **size: Any) -> Tiny:
    from transformers.models.llama import LlamaConfig, LlamaForCausalLM

    rope = {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    config = LlamaConfig(**shapes(**((rope if llama3 else {}) | size)))
    model = LlamaForCausalLM(config)
    randomise(model, seed)
    out = base_tensors(model, permuted=True)
    for i in range(config.num_hidden_layers):
        mlp_tensors(model, out, i, "mlp")
    if llama3:
        rotated = config.head_dim
        plain = 10000.0 ** -(torch.arange(0, rotated, 2, dtype=torch.float64) / rotated)
        out["rope_freqs.weight"] = (plain / model.model.rotary_emb.inv_freq.double()).numpy()
    return Tiny("llama", model, base_metadata("llama", config), out)


def qwen3moe(
    seed: int,
    experts: int = 7,
    used: int = 3,
    moe_width: int = 24,
    head_dim: int = 12,
    **size: Any,
) -> Tiny:
    from transformers.models.qwen3_moe import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        **shapes(**size),
        head_dim=head_dim,
        num_experts=experts,
        num_experts_per_tok=used,
        moe_intermediate_size=moe_width,
        norm_topk_prob=True,
    )
    model = Qwen3MoeForCausalLM(config)
    randomise(model, seed)
    out = base_tensors(model)
    for i in range(config.num_hidden_layers):
        expert_tensors(model, out, i, "mlp", "gate")
    keys = moe_keys(experts, used, moe_width)
    return Tiny("qwen3moe", model, base_metadata("qwen3moe", config, **keys), out)


def qwen3(seed: int, head_dim: int = 12, yarn: bool = False, **size: Any) -> Tiny:
    from transformers.models.qwen3 import Qwen3Config, Qwen3ForCausalLM

    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    config = Qwen3Config(**shapes(**((scaling if yarn else {}) | size)), head_dim=head_dim)
    model = Qwen3ForCausalLM(config)
    randomise(model, seed)
    out = base_tensors(model)
    for i in range(config.num_hidden_layers):
        mlp_tensors(model, out, i, "mlp")
    keys: dict[str, Any] = {}
    if yarn:
        keys = {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 32,
        }
    return Tiny("qwen3", model, base_metadata("qwen3", config, **keys), out)


def qwen2(seed: int, **size: Any) -> Tiny:
    from transformers.models.qwen2 import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(**shapes(**size))
    model = Qwen2ForCausalLM(config)
    randomise(model, seed)
    out = base_tensors(model)
    for i in range(config.num_hidden_layers):
        mlp_tensors(model, out, i, "mlp")
    return Tiny("qwen2", model, base_metadata("qwen2", config), out)


def olmoe(seed: int, experts: int = 7, used: int = 3, **size: Any) -> Tiny:
    from transformers.models.olmoe import OlmoeConfig, OlmoeForCausalLM

    config = OlmoeConfig(
        **shapes(**size), num_experts=experts, num_experts_per_tok=used, norm_topk_prob=False
    )
    model = OlmoeForCausalLM(config)
    randomise(model, seed)
    out = base_tensors(model)
    for i in range(config.num_hidden_layers):
        expert_tensors(model, out, i, "mlp", "gate")
    return Tiny("olmoe", model, base_metadata("olmoe", config, **moe_keys(experts, used)), out)


def granitemoe(seed: int, experts: int = 7, used: int = 3, shared: int = 0, **size: Any) -> Tiny:
    from transformers.models.granitemoe import GraniteMoeConfig, GraniteMoeForCausalLM
    from transformers.models.granitemoeshared import (
        GraniteMoeSharedConfig,
        GraniteMoeSharedForCausalLM,
    )

    scales = {
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.2,
        "residual_multiplier": 0.5,
        "logits_scaling": 2.0,
    }
    common = shapes(**size) | scales
    common |= {"num_local_experts": experts, "num_experts_per_tok": used}
    common["tie_word_embeddings"] = True
    if shared:
        config: Any = GraniteMoeSharedConfig(**common, shared_intermediate_size=shared)
        model: Any = GraniteMoeSharedForCausalLM(config)
    else:
        config = GraniteMoeConfig(**common)
        model = GraniteMoeForCausalLM(config)
    randomise(model, seed)
    out, source = base_tensors(model, permuted=True), Source(model)
    for i in range(config.num_hidden_layers):
        expert_tensors(model, out, i, "block_sparse_moe", "router")
        if shared:
            old, new = f"model.layers.{i}.shared_mlp", f"blk.{i}"
            gate_up = source[f"{old}.input_linear.weight"]
            out[f"{new}.ffn_gate_shexp.weight"] = gate_up[:shared]
            out[f"{new}.ffn_up_shexp.weight"] = gate_up[shared:]
            out[f"{new}.ffn_down_shexp.weight"] = source[f"{old}.output_linear.weight"]
    keys = moe_keys(experts, used) | {
        "embedding_scale": 3.0,
        "attention.scale": 0.2,
        "residual_scale": 0.5,
        "logit_scale": 2.0,
    }
    if shared:
        keys["expert_shared_feed_forward_length"] = shared
    return Tiny("granitemoe", model, base_metadata("granitemoe", config, **keys), out)

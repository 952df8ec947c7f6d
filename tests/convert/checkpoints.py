"""Checkpoints on disk, made from the tiny models the models' tests run on, and tokenizers for
them, trained on a few lines."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from ..models import families
from ..models.cases import CASES
from ..models.hf_export import Tiny

Make = Callable[[int, Path], tuple[Tiny, Path]]
LINES = [
    "The quick brown fox jumps over the lazy dog. 12345 things, it's 99 % true!",
    "Experts wait in the greenroom; those in demand are on stage.",
    "def main(arguments):\n    return {'a': [1, 2, 3], \"b\": None}\n",
    "Größe, naïveté, déjà vu; привет мир; 你好，世界.",
] * 8


def save(tiny: Tiny, folder: Path, **changes: Any) -> Path:
    """HF's own layout; `changes` are written into config.json (None removes a key)."""
    tiny.model.save_pretrained(folder)
    change_config(folder, **changes)
    return folder


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def rename(folder: Path, change: Any) -> None:
    """Replaces the tensors of a checkpoint in one file."""
    path = folder / "model.safetensors"
    tensors = {k: v.clone() for k, v in load_file(path).items()}
    save_file({k: v.contiguous() for k, v in change(tensors).items()}, path)


def deepseek(seed: int, folder: Path, tiny: Tiny | None = None) -> tuple[Tiny, Path]:
    """transformers has no DeepSeek v1: its stand-in's tensors under the publisher's names."""
    tiny = tiny or CASES["deepseek-dense2" if seed == 2 else "deepseek"].make(seed)
    config = tiny.model.config
    save(
        tiny,
        folder,
        architectures=["DeepseekForCausalLM"],
        n_routed_experts=config.num_experts,
        n_shared_experts=2,
        first_k_dense_replace=len(config.mlp_only_layers),
        moe_layer_freq=1,
        scoring_func="softmax",
    )
    rename(
        folder,
        lambda tensors: {
            name.replace("shared_expert.", "shared_experts."): tensor
            for name, tensor in tensors.items()
            if "shared_expert_gate" not in name
        },
    )
    return tiny, folder


def grin(seed: int, folder: Path, tiny: Tiny | None = None) -> tuple[Tiny, Path]:
    """GRIN-MoE as it is published: its class's name is no Python name, no rotary scaling."""
    tiny = tiny or CASES["grin-moe"].make(seed)
    save(
        tiny,
        folder,
        architectures=["GRIN-MoE"],
        model_type="grinmoe",
        rope_parameters=None,
        rope_theta=10000.0,
    )
    return tiny, folder


Tensors = dict[str, torch.Tensor]

FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def mxfp4_bank(shape: tuple[int, ...], seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random blocks (..., n, 16) with neighbours in one byte, scales (..., n), and the numbers
    they stand for (..., 32 n) float32, from the format's definition."""
    rng = np.random.default_rng(seed)
    *outer, columns = shape
    codes = rng.integers(0, 16, (*outer, columns // 32, 32))
    scales = rng.integers(122, 126, (*outer, columns // 32), np.uint8)
    values = FP4[codes] * np.exp2(scales.astype(np.float32) - 127)[..., None]
    blocks = (codes[..., ::2] | codes[..., 1::2] << 4).astype(np.uint8)
    return blocks, scales, values.reshape(shape).astype(np.float32)


def gpt_oss_mxfp4(seed: int, folder: Path) -> tuple[Tiny, Path]:
    """HF's blocks; the reference gets the numbers they stand for."""
    tiny = families.gpt_oss(seed, hidden=64, heads=4, width=96)
    blocks: Tensors = {}
    for name, p in tiny.model.named_parameters():
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, inner, outer = p.shape
            codes, scales, values = mxfp4_bank((experts, outer, inner), seed)
            p.data = torch.from_numpy(values).transpose(1, 2).contiguous()
            blocks[f"{name}_blocks"] = torch.from_numpy(codes)
            blocks[f"{name}_scales"] = torch.from_numpy(scales)
    save(tiny, folder)
    replaced = {name.rsplit("_", 1)[0] for name in blocks}
    rename(folder, lambda t: {k: v for k, v in t.items() if k not in replaced} | blocks)
    return tiny, folder


def gpt_oss_original(seed: int, folder: Path) -> tuple[Tiny, Path]:
    """The same model under OpenAI's names and keys."""
    tiny, _ = gpt_oss_mxfp4(seed, folder)
    return under_openai_names(tiny, folder), folder


def gpt_oss_original_plain(seed: int, folder: Path) -> tuple[Tiny, Path]:
    """The experts as numbers, (experts, out, in), as fine-tuned checkpoints have them."""
    tiny = families.gpt_oss(seed, hidden=64, heads=4, width=96)
    save(tiny, folder)
    return under_openai_names(tiny, folder), folder


def bfloat16(make: Make) -> Make:
    """A checkpoint stored in BF16; the reference gets the rounded numbers."""

    def made(seed: int, folder: Path) -> tuple[Tiny, Path]:
        tiny, _ = make(seed, folder)
        rename(folder, lambda tensors: {k: v.bfloat16() for k, v in tensors.items()})
        for p in tiny.model.parameters():
            p.data = p.data.bfloat16().float()
        return tiny, folder

    return made


def under_openai_names(tiny: Tiny, folder: Path) -> Tiny:
    """Renames what HF's layout has."""
    config = tiny.model.config
    rope = config.rope_parameters
    original = {
        "num_hidden_layers": config.num_hidden_layers,
        "num_experts": config.num_local_experts,
        "experts_per_token": config.num_experts_per_tok,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "swiglu_limit": 7.0,
        "head_dim": config.head_dim,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "sliding_window": config.sliding_window,
        "initial_context_length": rope["original_max_position_embeddings"],
        "rope_theta": rope["rope_theta"],
        "rope_scaling_factor": rope["factor"],
        "rope_ntk_alpha": rope["beta_slow"],
        "rope_ntk_beta": rope["beta_fast"],
    }
    (folder / "config.json").write_text(json.dumps(original))
    rename(folder, _openai_names)
    return tiny


_OPENAI = {
    "model.embed_tokens.weight": "embedding.weight",
    "model.norm.weight": "norm.scale",
    "lm_head.weight": "unembedding.weight",
    "model.layers.": "block.",
    "self_attn.o_proj": "attn.out",
    "self_attn.sinks": "attn.sinks",
    "input_layernorm.weight": "attn.norm.scale",
    "post_attention_layernorm.weight": "mlp.norm.scale",
    "mlp.router": "mlp.gate",
    "mlp.experts.gate_up_proj_bias": "mlp.mlp1_bias",
    "mlp.experts.down_proj_bias": "mlp.mlp2_bias",
    "mlp.experts.gate_up_proj_": "mlp.mlp1_weight.",
    "mlp.experts.down_proj_": "mlp.mlp2_weight.",
    "mlp.experts.gate_up_proj": "mlp.mlp1_weight",
    "mlp.experts.down_proj": "mlp.mlp2_weight",
}


def _openai_names(tensors: Tensors) -> Tensors:
    out: Tensors = {}
    for name, tensor in tensors.items():
        for old, new in _OPENAI.items():
            name = name.replace(old, new)
        plain = name.endswith(("mlp1_weight", "mlp2_weight"))
        out[name] = tensor.transpose(1, 2) if plain else tensor
    layers = {name.split(".")[1] for name in out if name.startswith("block.")}
    for layer in layers:
        for end in ("weight", "bias"):
            names = [f"block.{layer}.self_attn.{letter}_proj.{end}" for letter in "qkv"]
            out[f"block.{layer}.attn.qkv.{end}"] = torch.cat([out.pop(name) for name in names])
    return out


def byte_level(folder: Path, pre: str = "qwen2", template: str = "{{ messages }}") -> None:
    """A byte-level BPE tokenizer of 400 tokens with two special ones, in HF's files."""
    from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, trainers

    from greenroom.tokenizer.pretokenizers import pre_tokenizer

    tokenizer = Tokenizer(models.BPE())
    splits = [
        pre_tokenizers.Split(Regex(expression), behavior="isolated")
        for expression in pre_tokenizer(pre).expressions
    ]
    alphabet = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, alphabet])
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(LINES, trainer)
    special = ["<|endoftext|>", "<|im_end|>"]
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in special])
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


VOCABULARY = 400


def sentencepiece_model(folder: Path) -> None:
    """A SentencePiece BPE model with byte fallback, as Llama's and Phi's."""
    import sentencepiece

    folder.mkdir(exist_ok=True)
    with (folder / "tokenizer.model").open("wb") as out:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=iter(LINES),
            model_writer=out,
            vocab_size=VOCABULARY - 2,
            model_type="bpe",
            byte_fallback=True,
            character_coverage=0.99,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            minloglevel=2,
        )
    added = {
        str(VOCABULARY - 2): {"content": "<|user|>", "special": True},
        str(VOCABULARY - 1): {"content": "<tool>", "special": False},
    }
    config = {
        "add_bos_token": True,
        "bos_token": "<s>",
        "eos_token": {"__type": "AddedToken", "content": "</s>", "special": True},
        "unk_token": "<unk>",
        "added_tokens_decoder": added,
        "chat_template": [
            {"name": "default", "template": "A"},
            {"name": "tool_use", "template": "B"},
        ],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))

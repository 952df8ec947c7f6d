"""What files may look like: other spellings load to the same logits, damaged ones give one line."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from greenroom.errors import GreenroomError, ModelFileError, UnsupportedModelError
from greenroom.gguf import GGUFFile
from greenroom.models import ARCHITECTURES, LoadOptions, Model, ModelConfig, load_model

from . import families
from .hf_export import VOCABULARY, Arrays, Tiny
from .sessions import Session, one_pass, prompt, relative_error

TOKENS = prompt(21, 20, VOCABULARY)


def load(path: Path, **options: Any) -> Model:
    with GGUFFile(path) as file:
        return load_model(file, LoadOptions(**({"backend": "reference"} | options)))


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("mmap", [False, True])
def test_legacy_mixtral_gives_identical_logits(tmp_path: Path, backend: str, mmap: bool) -> None:
    tiny = families.mixtral(1, hidden=64, heads=4, width=96)
    merged = tiny.write(tmp_path / "merged.gguf", "Q8_0")
    apart = tiny.write(tmp_path / "apart.gguf", "Q8_0", families.legacy(tiny))
    with GGUFFile(apart) as file:
        assert "blk.0.ffn_gate.0.weight" in file.tensors
    options = {"backend": backend, "mmap": mmap, "threads": 2}
    assert torch.equal(
        one_pass(load(apart, **options), TOKENS), one_pass(load(merged, **options), TOKENS)
    )


def fused(tensors: Arrays) -> Arrays:
    """Query, key and value in one tensor; gate rows, then up rows of the experts in another."""
    out = dict(tensors)
    for i in range(2):
        for end in ("weight", "bias"):
            if f"blk.{i}.attn_q.{end}" in out:
                parts = [out.pop(f"blk.{i}.attn_{letter}.{end}") for letter in "qkv"]
                out[f"blk.{i}.attn_qkv.{end}"] = np.concatenate(parts)
        gate, up = (out.pop(f"blk.{i}.ffn_{part}_exps.weight") for part in ("gate", "up"))
        out[f"blk.{i}.ffn_gate_up_exps.weight"] = np.concatenate([gate, up], 1)
    return out


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("build", [families.qwen2moe, families.mixtral])
def test_fused_tensors_give_the_same_logits(build: Any, backend: str, tmp_path: Path) -> None:
    tiny: Tiny = build(1)
    apart = load(tiny.write(tmp_path / "a.gguf"), backend=backend)
    together = load(tiny.write(tmp_path / "b.gguf", overrides=fused(tiny.tensors)), backend=backend)
    assert relative_error(one_pass(together, TOKENS), one_pass(apart, TOKENS)) < 1e-6


def pairs(tensors: Arrays, path: Path, tiny: Tiny) -> Path:
    """A file with experts in MXFP4, nibbles of neighbours together, under the type number 4."""
    tiny.write(path, "MXFP4")
    data = bytearray(path.read_bytes())
    with GGUFFile(path) as file:
        for name, tensor in file.tensors.items():
            if tensor.type.name != "MXFP4":
                continue
            blocks = tensor.data().reshape(-1, 17).copy()
            low, high = blocks[:, 1:] & 15, blocks[:, 1:] >> 4  # elements 0..15 and 16..31
            codes = np.concatenate([low, high], 1)
            blocks[:, 1:] = codes[:, 0::2] | codes[:, 1::2] << 4
            data[tensor.offset : tensor.offset + tensor.nbytes] = blocks.tobytes()
            encoded = name.encode()
            entry = data.index(len(encoded).to_bytes(8, "little") + encoded) + 8 + len(encoded)
            number = entry + 4 + 8 * len(tensor.ne)
            data[number : number + 4] = (4).to_bytes(4, "little")
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_ollama_blocks_of_type_4_give_identical_logits(backend: str, tmp_path: Path) -> None:
    tiny = families.ollama(families.gpt_oss(1, hidden=64, heads=4, width=96))
    usual = tiny.write(tmp_path / "usual.gguf", "MXFP4")
    other = pairs(tiny.tensors, tmp_path / "pairs.gguf", tiny)
    with GGUFFile(other) as file:
        assert "MXFP4_PAIRS" in {tensor.type.name for tensor in file.tensors.values()}
    assert torch.equal(
        one_pass(load(other, backend=backend), TOKENS),
        one_pass(load(usual, backend=backend), TOKENS),
    )


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_a_float16_cache_stays_close(backend: str, tmp_path: Path) -> None:
    model = load(families.gpt_oss(1).write(tmp_path / "m.gguf"), backend=backend)
    exact = one_pass(model, TOKENS)
    half = Session(model, dtype=torch.float16).step([(0, TOKENS)])
    assert 0 < relative_error(half, exact) < 5e-3


def test_a_step_without_outputs_writes_the_cache(tmp_path: Path) -> None:
    model = load(families.qwen3moe(1).write(tmp_path / "m.gguf"))
    session = Session(model)
    batch = session.batch([(0, TOKENS[:12])])
    none = model.forward(
        type(batch)(
            batch.tokens,
            batch.positions,
            batch.query_starts,
            batch.context_lengths,
            batch.groups,
            batch.output_rows[:0],
        ),
        session.caches,
    )
    assert none.shape == (0, VOCABULARY)
    rest = session.step([(0, TOKENS[12:])])
    assert relative_error(rest, one_pass(model, TOKENS)[12:]) < 1e-5


def test_memory_counts_every_tensor(tmp_path: Path) -> None:
    tiny = families.gpt_oss(1)
    memory = load(tiny.write(tmp_path / "m.gguf")).memory()
    assert memory["experts"] == sum(
        4 * array.size for name, array in tiny.tensors.items() if "_exps" in name
    )
    assert sum(memory.values()) == sum(4 * array.size for array in tiny.tensors.values())


def test_progress_reaches_the_end(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    path = families.llama(1).write(tmp_path / "m.gguf")
    load(path, progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1]


def test_windows_make_a_group_of_their_own(tmp_path: Path) -> None:
    model = load(families.gpt_oss(1, layers=4).write(tmp_path / "m.gguf"))
    assert [spec.window for spec in model.kv_groups] == [None, 7]
    assert [model.config.kv_group(i) for i in range(4)] == [1, 0, 1, 0]
    assert [spec.window for spec in load(families.qwen3(1).write(tmp_path / "q")).kv_groups] == [
        None
    ]


def refused(tmp_path: Path, tiny: Tiny, error: type[GreenroomError]) -> str:
    with pytest.raises(error) as caught:
        load(tiny.write(tmp_path / "bad.gguf"))
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("bad.gguf: ")
    return message


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    tiny = families.mixtral(1)
    del tiny.tensors["blk.1.ffn_up_exps.weight"]
    assert "blk.1.ffn_up_exps.weight" in refused(tmp_path, tiny, ModelFileError)


def test_a_required_bias_is_named(tmp_path: Path) -> None:
    tiny = families.phimoe(1)
    del tiny.tensors["output.bias"]
    assert "output.bias" in refused(tmp_path, tiny, ModelFileError)


def test_an_extra_tensor_is_named(tmp_path: Path) -> None:
    tiny = families.olmoe(1)
    tiny.tensors["blk.0.exp_probs_b.bias"] = np.zeros(7, np.float32)
    assert "blk.0.exp_probs_b.bias" in refused(tmp_path, tiny, ModelFileError)


def test_a_wrong_shape_is_named(tmp_path: Path) -> None:
    tiny = families.qwen2moe(1)
    tiny.tensors["blk.0.attn_k.weight"] = tiny.tensors["blk.0.attn_k.weight"][:-1]
    message = refused(tmp_path, tiny, ModelFileError)
    assert "blk.0.attn_k.weight" in message
    assert "(15, 48)" in message
    assert "(16, 48)" in message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("expert_gating_func", 2),
        ("expert_group_count", 8),
        ("rope.scaling.type", "dynamic"),
        ("attention.q_lora_rank", 64),
        ("rope.scaling.yarn_log_multiplier", 0.1),
        ("attention.head_count", [4, 6]),
    ],
)
def test_what_is_not_implemented_is_refused(tmp_path: Path, key: str, value: Any) -> None:
    tiny = families.deepseek(1)
    tiny.metadata[f"deepseek.{key}"] = value
    assert f"deepseek.{key}" in refused(tmp_path, tiny, UnsupportedModelError)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("block_count", None),
        ("block_count", 4_000_000_000),
        ("attention.head_count", 0),
        ("attention.head_count_kv", 4),
        ("expert_used_count", 9),
        ("embedding_length", -3.5),
        ("attention.layer_norm_rms_epsilon", float("nan")),
        ("rope.dimension_count", 10_000),
    ],
)
def test_impossible_metadata_is_refused(tmp_path: Path, key: str, value: Any) -> None:
    tiny = families.mixtral(1)
    tiny.metadata.pop(f"llama.{key}", None)
    if value is not None:
        tiny.metadata[f"llama.{key}"] = value
    assert f"llama.{key}" in refused(tmp_path, tiny, ModelFileError)


def test_an_unknown_architecture_lists_the_known_ones(tmp_path: Path) -> None:
    tiny = families.llama(1)
    tiny.architecture = "mamba"
    message = refused(tmp_path, tiny, UnsupportedModelError)
    assert "'mamba'" in message
    assert all(name in message for name in ARCHITECTURES)


def test_equal_values_per_layer_are_one_value(tmp_path: Path) -> None:
    tiny = families.llama(1)
    tiny.metadata["llama.attention.head_count_kv"] = [2, 2]
    tiny.metadata["llama.feed_forward_length"] = [40, 40]
    with GGUFFile(tiny.write(tmp_path / "m.gguf")) as file:
        config = ModelConfig.from_metadata(file.metadata, file.tensors)
    assert (config.attention.kv_heads, config.feed_forward_length) == (2, 40)

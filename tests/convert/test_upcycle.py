"""Upcycling: what is exact stays exact, what is learned is applied as it was trained, and the
demo model is nearly as good as the dense one. llama.cpp reads all of it."""

from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from greenroom import LLM
from greenroom.convert.upcycle import upcycle_exact, upcycle_sparse
from greenroom.convert.upcycle_deltas import read_deltas
from greenroom.convert.upcycle_exact import scaled
from greenroom.errors import ModelFileError, UnsupportedModelError
from greenroom.gguf import GGMLType, GGUFFile, TensorSpec, dequantize, random_blocks, write_gguf
from greenroom.tokenizer import Tokenizer

from .llama_cpp import complete

DELTAS = Path(str(files("greenroom") / "data" / "demo_deltas.npz"))
Logits = np.ndarray[Any, np.dtype[np.float64]]


@pytest.fixture(scope="module")
def exact(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exact") / "exact.gguf"
    upcycle_exact(dense, out)
    return out


@pytest.fixture(scope="module")
def sparse(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sparse") / "sparse.gguf"
    upcycle_sparse(dense, out, DELTAS)
    return out


@pytest.fixture(scope="module")
def samples(dense: Path, texts: list[str]) -> list[list[int]]:
    tokenizer = Tokenizer.from_gguf(dense)
    return [tokenizer.encode(text)[:500] for text in texts]


def log_probabilities(path: Path, samples: list[list[int]], **settings: Any) -> Iterator[Logits]:
    """(tokens, vocabulary) for each sample."""
    with LLM(path, max_sequences=1, context_length=1024, **settings) as llm:
        for tokens in samples:
            logits = llm.logits(tokens).astype(np.float64)
            logits -= logits.max(axis=1, keepdims=True)
            yield logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def perplexity(path: Path, samples: list[list[int]]) -> float:
    losses = [
        -rows[np.arange(len(tokens) - 1), tokens[1:]]
        for tokens, rows in zip(samples, log_probabilities(path, samples), strict=True)
    ]
    return float(np.exp(np.concatenate(losses).mean()))


def test_exact_upcycling_keeps_the_bytes_and_the_logits(dense: Path, exact: Path) -> None:
    with GGUFFile(dense) as before, GGUFFile(exact) as after:
        assert after.metadata["llama.expert_used_count"] == 8
        for kind in ("gate", "up"):
            new = after.tensors[f"blk.7.ffn_{kind}_exps.weight"]
            assert new.ne == (576, 192, 8)
            assert (new.data() == before.tensors[f"blk.7.ffn_{kind}.weight"].data()).all()
        whole = before.tensors["blk.7.ffn_down.weight"].dequantize()
        cut = after.tensors["blk.7.ffn_down_exps.weight"].dequantize()
        assert (np.concatenate(list(cut), axis=1) == 8 * whole).all()
    ids = [[504, 2028, 1234, 17, 40_000, 3]]
    one = next(log_probabilities(dense, ids, backend="reference"))
    other = next(log_probabilities(exact, ids, backend="reference"))
    # sums of 8 experts instead of one: float32, whose last bits depend on the processor's routines
    assert np.abs(one - other).max() < 1e-4 * np.abs(one).max()
    divergence = (np.exp(one) * (one - other)).sum(-1)
    assert divergence.max() < 1e-6


@pytest.mark.parametrize(
    "type", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q6_K", "IQ4_XS"]
)
def test_scaling_blocks_is_exact(type: str) -> None:
    kind = GGMLType[type]
    raw = random_blocks(kind, 4, 512, np.random.default_rng(1))
    before = dequantize(kind, raw)
    assert (
        dequantize(kind, scaled(kind, raw.copy(), 8, "x").reshape(raw.shape)) == 8 * before
    ).all()


def test_scaling_beyond_float16_is_refused() -> None:
    raw = random_blocks(GGMLType.Q8_0, 1, 32, np.random.default_rng(1), scale=1e6)
    with pytest.raises(UnsupportedModelError, match="x: a scale times 64 exceeds float16"):
        scaled(GGMLType.Q8_0, raw.copy(), 64, "x")


def test_sparse_experts_are_the_trained_ones(dense: Path, sparse: Path) -> None:
    deltas, layer = read_deltas(DELTAS), 11
    order, cut = deltas.order(layer), deltas.shared * deltas.width
    with GGUFFile(dense) as before, GGUFFile(sparse) as after:
        assert after.metadata["deepseek.expert_used_count"] == deltas.used(75)
        down = before.tensors[f"blk.{layer}.ffn_down.weight"].dequantize()[:, order]
        down = (down + deltas.change("ffn_down", layer)) * deltas.factor("gain", layer)
        expert = after.tensors[f"blk.{layer}.ffn_down_exps.weight"].dequantize()[3]
        wanted = down[:, cut + 3 * deltas.width : cut + 4 * deltas.width] * deltas.routed
        assert np.abs(expert - wanted).max() <= np.abs(wanted).max() / 127
        gate = before.tensors[f"blk.{layer}.ffn_gate.weight"].dequantize()[order]
        gate += deltas.change("ffn_gate", layer)
        shared = after.tensors[f"blk.{layer}.ffn_gate_shexp.weight"].dequantize()
        assert np.abs(shared - gate[:cut]).max() <= np.abs(gate).max() / 127
        unchanged = after.tensors["token_embd.weight"].data()
        assert (unchanged == before.tensors["token_embd.weight"].data()).all()


def test_the_demo_model_is_nearly_as_good_as_the_dense_one(
    dense: Path, sparse: Path, samples: list[list[int]]
) -> None:
    # On much more of the held-out texts the ratio is 1.085 (docs/demo-model.md).
    assert perplexity(sparse, samples) / perplexity(dense, samples) < 1.1


QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def answer(path: Path, tokens: int) -> str:
    """llama.cpp's likeliest answer to the question."""
    asked = {"messages": QUESTION, "max_tokens": tokens, "temperature": 0}
    return str(complete(str(path), [asked])[0]["choices"][0]["message"]["content"])


def test_llama_cpp_answers_with_the_exact_model_as_with_the_dense_one(
    dense: Path, exact: Path
) -> None:
    text = answer(exact, 8)
    assert len(text) > 8
    assert text == answer(dense, 8)


def test_llama_cpp_answers_with_the_sparse_model(sparse: Path) -> None:
    assert "Paris" in answer(sparse, 40)


def test_llama_cpp_chooses_the_same_tokens(
    exact: Path, samples: list[list[int]], tmp_path: Path
) -> None:
    # In float16, where neither side rounds activations to eight bits.
    path = tmp_path / "f16.gguf"
    with GGUFFile(exact) as file:
        specs = [
            TensorSpec.copy(tensor)
            if tensor.type is GGMLType.F32
            else TensorSpec.of(tensor.name, GGMLType.F16, tensor.dequantize())
            for tensor in file.tensors.values()
        ]
        write_gguf(path, file.metadata.raw_values(), specs)
    jobs = [{"tokens": tokens[:125], "first": 0, "top": 40} for tokens in samples]
    answers = complete(str(path), jobs, seconds=240)
    same, divergences = [], []
    ours = log_probabilities(path, [job["tokens"] for job in jobs])
    for rows, answer in zip(ours, answers, strict=True):
        for row, (ids, theirs) in zip(rows, answer, strict=True):
            same.append(row.argmax() == ids[0])
            divergences.append(divergence(np.array(theirs), row[ids]))
    assert len(same) == 500
    assert np.mean(same) >= 0.99
    assert np.mean(divergences) < 1e-3


def divergence(p: Logits, q: Logits) -> float:
    """KL from the likeliest tokens, all others taken together as one more."""
    rest_p, rest_q = (max(1 - np.exp(x).sum(), 1e-12) for x in (p, q))
    return float((np.exp(p) * (p - q)).sum() + rest_p * np.log(rest_p / rest_q))


@pytest.mark.parametrize("experts", [3, 1, 96, 1024])
def test_ffns_that_cannot_be_cut_are_refused(dense: Path, tmp_path: Path, experts: int) -> None:
    with pytest.raises(UnsupportedModelError, match="possible: 2, 4, 8, 16"):
        upcycle_exact(dense, tmp_path / "out.gguf", experts)
    assert not list(tmp_path.iterdir())


def test_only_dense_llama_models_are_taken(exact: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="has experts already"):
        upcycle_exact(exact, tmp_path / "out.gguf")


@pytest.mark.parametrize(
    ("active", "used"), [(50, 12), (62.5, 18), (75, 24), (87.5, 30), (100, 36), (27, 1)]
)
def test_activity_becomes_a_number_of_experts(active: float, used: int) -> None:
    assert read_deltas(DELTAS).used(active) == used


@pytest.mark.parametrize("active", [0, 25, 101, -75])
def test_impossible_activity_is_refused(active: float) -> None:
    with pytest.raises(UnsupportedModelError, match="allow 27 to 100 percent"):
        read_deltas(DELTAS).used(active)


def broken(change: str) -> dict[str, Any]:
    with np.load(DELTAS) as packed:
        arrays = dict(packed)
    if change == "missing":
        del arrays["attn_q.a"]
    elif change == "order":
        arrays["order"][4, :2] = 7
    elif change == "not finite":
        arrays["router_scale"][0, 0] = np.inf
    elif change == "shape":
        arrays["gain"] = arrays["gain"][:, :-1]
    elif change == "object":
        arrays["gain"] = np.array([{}], dtype=object)
    return arrays


@pytest.mark.parametrize("change", ["missing", "order", "not finite", "shape", "object"])
def test_damaged_deltas_are_named(tmp_path: Path, change: str) -> None:
    path = tmp_path / "bad.npz"
    np.savez(path, **broken(change))
    with pytest.raises(ModelFileError, match=r"^bad.npz: these are no deltas") as caught:
        read_deltas(path)
    assert "\n" not in str(caught.value)


def test_other_files_are_no_deltas(tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("hello")
    for name in ("text.npz", "missing.npz"):
        with pytest.raises(ModelFileError, match=name):
            read_deltas(tmp_path / name)


def test_deltas_of_another_model_are_refused(dense: Path, tmp_path: Path) -> None:
    with np.load(DELTAS) as packed:
        arrays = {
            key: value[:-1]
            if key in ("order", "router", "router_scale", "gain")
            or ("_norm" in key and key != "output_norm")
            or "." in key
            else value
            for key, value in packed.items()
        }
    np.savez(tmp_path / "d.npz", **arrays)
    with pytest.raises(ModelFileError, match="for another model: 29 layers"):
        upcycle_sparse(dense, tmp_path / "out.gguf", tmp_path / "d.npz")

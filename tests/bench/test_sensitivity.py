"""Sensitivity: shares against a sum by hand, and the divergence that noise causes."""

from pathlib import Path

import numpy as np
import pytest
import torch

from greenroom.bench.quality import Windows, evaluate, windows_of
from greenroom.bench.sensitivity import Noisy, Shares, measure, thinned
from greenroom.commands import main
from greenroom.engine import LLM
from greenroom.experts.reference import ReferenceExperts
from greenroom.experts.trace import ERRORS, Trace

TEXT = "The quick brown fox jumps over the lazy dog, and the dog does not mind at all. " * 6


def bank(experts: int = 4, d: int = 8, f: int = 6) -> ReferenceExperts:
    torch.manual_seed(1)
    return ReferenceExperts(
        torch.randn(experts, f, d), torch.randn(experts, f, d), torch.randn(experts, d, f)
    )


def test_shares_are_those_of_the_squared_sizes() -> None:
    experts, hidden = bank(), torch.randn(5, 8)
    ids = torch.tensor([[0, 1], [1, 2], [2, 0], [0, 2], [2, 1]], dtype=torch.int32)
    weights = torch.rand(5, 2)
    shares = Shares(experts, 4)
    assert torch.equal(shares(hidden, ids, weights), experts(hidden, ids, weights))
    expected = np.zeros(4)
    for token in range(5):
        sizes = [
            float((w * experts.one(int(e), hidden[token : token + 1])).square().sum())
            for e, w in zip(ids[token], weights[token], strict=True)
        ]
        for e, size in zip(ids[token].tolist(), sizes, strict=True):
            expected[e] += size / sum(sizes)
    np.testing.assert_allclose(shares.sums, expected, rtol=1e-5)
    assert shares.sums[3] == 0


def test_noise_has_its_size_and_is_the_same_again() -> None:
    experts, hidden = bank(d=512), torch.randn(3, 512)
    ids, weights = torch.zeros(3, 1, dtype=torch.int32), torch.ones(3, 1)
    plain = experts(hidden, ids, weights)
    found = Noisy(experts, 0.2)(hidden, ids, weights)
    off = (found - plain).square().sum(-1) / plain.square().sum(-1)
    np.testing.assert_allclose(off.sqrt(), 0.2, rtol=0.15)
    assert torch.equal(found, Noisy(experts, 0.2)(hidden, ids, weights))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sensitivity") / "m.gguf"
    assert main(["synth", "qwen3-30b-a3b-tiny", str(path)]) == 0
    return path


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_it_is_the_divergence_of_a_noisy_layer(model: Path, backend: str) -> None:
    with LLM(model, context_length=64, threads=1, backend=backend, prefix_cache=False) as llm:
        windows = windows_of(llm.tokenizer, TEXT, 32, 96)
        calls: list[tuple[int, int]] = []
        found = measure(llm, windows, lambda *call: calls.append(call))
        blocks = [llm.engine.model.blk[i].ffn for i in llm.engine.model.moe_layers]
        assert not any(isinstance(block.experts, Noisy | Shares) for block in blocks)
        before = evaluate(llm, windows)
        blocks[0].experts = Noisy(blocks[0].experts, ERRORS[1])
        noisy = evaluate(llm, windows)
    assert calls[-1] == ((1 + 2 * len(blocks)) * windows.positions,) * 2
    assert found.shape == (len(blocks), llm.engine.model_config.moe.experts, 2)
    small, large = found.sum(1).T
    assert ((small > 0) & (small < large)).all()
    change = np.concatenate(noisy.nll) - np.concatenate(before.nll)
    # Half the mean square of a log-probability's change, to second order.
    assert 0.1 < large[0] / (0.5 * np.square(change).mean()) < 10


def test_few_windows_are_taken_evenly() -> None:
    windows = Windows(tuple((i,) * 10 for i in range(9)), 10)
    assert [w[0] for w in thinned(windows, 30).tokens] == [0, 4, 8]
    assert [w[0] for w in thinned(windows, 5).tokens] == [0]
    assert thinned(windows, 1000) == windows


def test_profile_writes_it_for_quantize(model: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text(TEXT)
    common = ["--text", str(tmp_path / "text"), "--context", "32", "--max-tokens", "64"]
    for name, more in (("with", ["--sensitivity"]), ("without", [])):
        out = ["--out", str(tmp_path / name), "--threads", "1"]
        assert main(["profile", str(model), *common, *out, *more]) == 0
        trace = Trace.load(tmp_path / name / "trace.npz")
        assert (trace.sensitivity is not None) == bool(more)

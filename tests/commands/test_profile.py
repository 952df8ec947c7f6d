"""`greenroom profile` on tiny models: its files, the importance matrix, one-line errors."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from greenroom.bench.quality import windows_of
from greenroom.commands import main
from greenroom.convert.imatrix import read_imatrix
from greenroom.engine import LLM, EngineConfig, assemble
from greenroom.experts.trace import NOBODY, Trace
from greenroom.gguf import GGUFFile
from greenroom.models import LoadOptions, Model, load_model
from greenroom.tokenizer import Tokenizer

TEXT = "The quick brown fox jumps over the lazy dog, and the dog does not mind at all. " * 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("profile")
    for name in ("gpt-oss-20b-tiny", "qwen3-30b-a3b-tiny"):
        assert main(["synth", name, str(folder / f"{name}.gguf")]) == 0
    (folder / "text").write_text(TEXT)
    return folder


def run(folder: Path, name: str, *more: str) -> list[str]:
    text, out = str(folder / "text"), str(folder / "out")
    common = ["--text", text, "--out", out, "--context", "32", "--threads", "1"]
    return ["profile", str(folder / f"{name}.gguf"), *common, *more]


def test_files(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(run(folder, "gpt-oss-20b-tiny", "--json")) == 0
    found = json.loads(capsys.readouterr().out)
    out = folder / "out"
    trace = Trace.load(out / "trace.npz")
    assert found["kind"] == "profile"
    assert found["tokens"] == trace.tokens == trace.counts()[0].sum() / trace.selected
    assert (trace.routes != NOBODY).all()
    assert len(trace.starts) == -(-trace.tokens // 32)
    assert json.loads((out / "profile.json").read_text()) == found
    rates = found["hit_rates"]
    assert rates["clairvoyant"]["rate"][-1] >= rates["LRU"]["rate"][-1] > 0.5
    page = (out / "profile.html").read_text()
    assert page.count("data:image/png;base64,") == 4
    assert not re.search(r"https?://|src=\"(?!data:)|<script|<link", page)
    for name in ("heat.png", "hit-rates.png", "reuse.png", "coactivation.png"):
        assert (out / name).stat().st_size > 1000
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(run(folder, "gpt-oss-20b-tiny", "--max-tokens", "40")) == 0
    captured = capsys.readouterr()
    assert "matplotlib is not installed" in " ".join(captured.err.split())
    assert "max over mean" in captured.out
    assert "data:image" not in (out / "profile.html").read_text()


@pytest.mark.parametrize("name", ["gpt-oss-20b-tiny", "qwen3-30b-a3b-tiny"])
def test_importance_matrix(folder: Path, name: str) -> None:
    path = folder / f"{name}.imatrix.gguf"
    assert main(run(folder, name, "--imatrix", str(path), "--max-tokens", "64")) == 0
    found = read_imatrix(path)
    trace = Trace.load(folder / "out" / "trace.npz")
    model = folder / f"{name}.gguf"
    with GGUFFile(model) as file:
        matrices = {
            tensor for tensor, info in file.tensors.items()
            if len(info.shape) > 1 and not re.search("token_embd|gate_inp|output.w|bias", tensor)
        }  # fmt: skip
        shapes = {tensor: info.shape for tensor, info in file.tensors.items()}
        reference = load_model(file, LoadOptions(backend="reference"))
    matrices |= {tensor for tensor in shapes if "attn_output.weight" in tensor}
    assert set(found) == matrices
    for tensor, means in found.items():
        assert means.shape[-1] == shapes[tensor][-1]
        assert np.isfinite(means).all()
    with GGUFFile(path) as file:
        counts = file.tensors["blk.1.ffn_down_exps.weight.counts"].dequantize().reshape(-1)
    np.testing.assert_array_equal(counts, trace.counts()[1])
    _check_first_experts(found, reference, model)


def _check_first_experts(found: dict, reference: Model, path: Path) -> None:
    """Against the reference's own inner values, for the busiest expert of the first layer."""
    experts = reference.blk[0].ffn.experts
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def spy(hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        seen.append((hidden.clone(), ids.clone()))
        return experts(hidden, ids, weights)

    reference.blk[0].ffn.experts = spy
    tokenizer = Tokenizer.from_gguf(path)
    with LLM.from_engine(assemble(reference, tokenizer, EngineConfig(context_length=64))) as llm:
        for window in windows_of(tokenizer, TEXT, 32, 64).tokens:
            llm.embed(window)
    hidden, ids = (torch.cat(parts) for parts in zip(*seen, strict=True))
    expert = int(torch.bincount(ids.flatten()).argmax())
    x = hidden[(ids == expert).any(-1)]
    expected = x.square().mean(0).numpy()
    gate = found["blk.0.ffn_gate_exps.weight"][expert]
    np.testing.assert_allclose(gate, expected, rtol=0.1, atol=0.02 * expected.max())
    bias = [None if experts.biases is None else experts.biases[i][expert] for i in (0, 1)]
    linear = torch.nn.functional.linear
    inner = experts.activation(
        linear(x, experts.gate[expert], bias[0]), linear(x, experts.up[expert], bias[1])
    )
    expected = inner.square().mean(0).numpy()
    down = found["blk.0.ffn_down_exps.weight"][expert]
    np.testing.assert_allclose(down, expected, rtol=0.2, atol=0.05 * expected.max())


def test_quantize_reads_it(folder: Path) -> None:
    path, out = folder / "im.gguf", folder / "small.gguf"
    assert main(run(folder, "qwen3-30b-a3b-tiny", "--imatrix", str(path))) == 0
    source = str(folder / "qwen3-30b-a3b-tiny.gguf")
    assert main(["quantize", source, str(out), "--type", "Q4_K_M", "--imatrix", str(path)]) == 0
    assert out.stat().st_size > 0


def test_errors_are_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "short").write_text("a")
    for arguments, message in (
        (run(folder, "none"), "none.gguf: cannot be opened"),
        ([*run(folder, "gpt-oss-20b-tiny"), "--text", str(folder / "short")], "too short"),
        ([*run(folder, "gpt-oss-20b-tiny"), "--text", str(folder / "nope")], "No such file"),
        ([*run(folder, "none"), "--out", str(folder / "text")], "text: File exists"),
    ):
        capsys.readouterr()
        assert main(arguments) == 1
        captured = capsys.readouterr().err
        complaint = [line for line in captured.splitlines() if line.startswith("greenroom:")]
        assert len(complaint) == 1
        assert message in complaint[0]

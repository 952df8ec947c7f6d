"""The commands that look at files or make them: inspect, tokenize, synth, upcycle, demo."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from greenroom.commands import main
from greenroom.tokenizer import Tokenizer

TEXT = "The old house on the hill: déjà vu!"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    assert main(["synth", "gpt-oss-20b-tiny", str(path)]) == 0
    return str(path)


def test_inspect_counts_bytes(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", model, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    # 16 experts of three matrices of 288 rows of 9 blocks of 17 bytes, and three biases
    expert = 3 * (288 * 9 * 17 + 288 * 4)
    assert facts["experts"]["bytes_per_expert"] == [expert]
    assert facts["bytes"]["experts"] == 4 * 16 * expert
    assert facts["bytes_per_token"]["experts"] == 4 * 4 * expert
    assert facts["bytes"]["rest"] - facts["bytes_per_token"]["rest"] == 4095 * 288 // 32 * 34
    assert facts["kv_cache"]["bytes_per_token"] == 4 * 2 * 64 * 2 * 2
    half = 2 * 128 * 512 + 2 * 131072 * 512
    assert facts["kv_cache"]["bytes_full_context"] == half
    assert facts["attention"]["windowed_layers"] == 2
    assert facts["types"]["MXFP4"]["tensors"] == 12
    assert facts["runs"] is True


def test_inspect_says_it_in_words(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", model]) == 0
    words = " ".join(capsys.readouterr().out.split())
    assert "16 in each of 4 layers, 4 per token; width 288, stacked" in words
    assert "everything in RAM" in words


def test_inspect_waits_for_no_torch_where_no_gpu_is(model: str) -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"  # importing it fails
        "from greenroom.commands import main\n"
        "from greenroom.placement import hardware\n"
        "hardware._DRIVERS = ()\n"
        "sys.exit(main(['inspect', sys.argv[1]]))"
    )
    done = subprocess.run([sys.executable, "-c", code, model], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "everything in RAM" in " ".join(done.stdout.split())


def test_inspect_plans_for_a_budget(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", model, "--vram", "2GiB", "--context", "512", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["placement"]
    assert found["backend"] == "cuda"
    assert sum(row["bytes"] for row in found["vram"]) == 2 << 30
    assert main(["inspect", model, "--vram", "1MiB", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["placement"]
    assert (found["backend"], found["vram"]) == ("native", [])
    assert "hold not even one layer" in found["reason"]


def test_inspect_describes_what_cannot_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import numpy as np

    from greenroom.gguf import GGMLType, TensorSpec, write_gguf

    path = tmp_path / "odd.gguf"
    spec = TensorSpec("x.weight", GGMLType.F32, (2, 4), np.zeros((2, 4), np.float32))
    write_gguf(path, {"general.architecture": "mamba"}, [spec])
    assert main(["inspect", str(path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["runs"] is False
    assert "mamba" in facts["problem"]
    assert facts["parameters"] == 8


def test_tokenize_prints_ids_and_pieces(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = Tokenizer.from_gguf(model).encode(TEXT)
    assert main(["tokenize", model, TEXT, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["ids"] == ids
    assert len(printed["pieces"]) == len(ids)
    monkeypatch.setattr(sys, "stdin", io.StringIO(TEXT))
    assert main(["tokenize", model, "--ids"]) == 0
    assert capsys.readouterr().out.split() == [str(token) for token in ids]
    assert main(["tokenize", model, "<|end|>", "--special"]) == 0
    assert capsys.readouterr().out.count("\n") == 1


def test_errors_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out.gguf")
    for arguments, message in (
        (["synth", "gpt-5", out], "no shape 'gpt-5'"),
        (["synth", "gpt-oss-20b-tiny", out, "--type", "Q9"], "no type 'Q9'"),
        (["upcycle", str(tmp_path / "none.gguf"), out, "--exact"], "none.gguf: cannot be opened"),
        (["inspect", str(tmp_path)], "this is a directory"),
    ):
        assert main(arguments) == 1
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_upcycle_wants_one_way(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["upcycle", "a.gguf", "b.gguf"]) == 2
    assert main(["upcycle", "a.gguf", "b.gguf", "--exact", "--deltas", "c.npz"]) == 2
    assert "either --exact or --deltas" in " ".join(capsys.readouterr().err.split())


def test_demo_answers(capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["demo", "--prompt", "What is the capital of France?", "--max-tokens", "30"])
    captured = capsys.readouterr()
    if "could not be fetched" in captured.err:
        pytest.skip(captured.err)
    assert status == 0
    assert "Paris" in captured.out
    assert "24 of 36 per token and layer" in captured.err
    assert "tokens/s" in captured.err

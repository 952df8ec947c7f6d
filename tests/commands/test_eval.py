"""`greenroom eval` on a tiny model: documents, files and one-line errors."""

import json
import sys
from pathlib import Path

import pytest

from greenroom.commands import main

TEXT = "The quick brown fox jumps over the lazy dog, and the dog does not mind at all. " * 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("eval")
    assert main(["synth", "gpt-oss-20b-tiny", str(folder / "tiny.gguf")]) == 0
    (folder / "text").write_text(TEXT)
    return folder


def test_against_float32(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, text, report = (str(folder / name) for name in ("tiny.gguf", "text", "report"))
    common = [model, "--text", text, "--context", "32", "--threads", "1"]
    arguments = ["eval", *common, "--reference", "float32", "--vram", "0", "--report", report]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kind"] == "eval"
    assert found["reference"]["backend"] == "reference"
    (placement,) = found["placements"]
    assert placement["name"] == "vram 0"
    assert placement["backend"] == "native"
    assert 0 < placement["kl_mean"] < 0.1
    assert placement["perplexity_ratio"] == pytest.approx(1, abs=0.05)
    assert json.loads((folder / "report" / "report.json").read_text()) == found
    assert "vram 0" in (folder / "report" / "report.md").read_text()
    assert (folder / "report" / "kl.png").stat().st_size > 1000
    (folder / "report" / "kl.png").unlink()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main([*arguments, "--max-tokens", "40"]) == 0
    captured = capsys.readouterr()
    assert "matplotlib is not installed" in " ".join(captured.err.split())
    assert "| vram 0 |" in captured.out
    assert not (folder / "report" / "kl.png").exists()


def test_errors_are_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(folder / "tiny.gguf")
    (folder / "binary").write_bytes(b"\xff\xfe\x00")
    (folder / "empty").write_text(" \n")
    for extra, message in (
        (["--text", str(folder / "none")], "No such file"),
        (["--text", str(folder / "binary")], "not UTF-8"),
        (["--text", str(folder / "empty")], "holds no text"),
        (["--text", str(folder / "text"), "--reference", "x.gguf"], "x.gguf: cannot be opened"),
        (["--text", str(folder / "text"), "--vram", "much"], "must be a size"),
    ):
        capsys.readouterr()
        assert main(["eval", model, *extra]) == 1
        complaint = [
            line for line in capsys.readouterr().err.splitlines() if line.startswith("greenroom:")
        ]
        assert len(complaint) == 1
        assert message in complaint[0]

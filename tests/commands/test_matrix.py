"""`greenroom matrix` on two tiny shapes: one row each, files gone, nothing left empty."""

import json

from greenroom.bench import matrix as table
from greenroom.commands import main
from greenroom.engine import llm, load
from greenroom.placement.hardware import Gpu, Hardware


def test_two_shapes(tmp_path, capsys) -> None:
    call = ["matrix", "--work", str(tmp_path / "w"), "--tiny", "--layers", "2", "--runs", "2"]
    more = ["--shapes", "gpt-oss-20b,deepseek-moe-16b", "--prompt", "16", "--generate", "4"]
    assert main([*call, *more, "--report", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    document = json.loads(out.splitlines()[-1])
    rows = [model["row"] for model in document["models"]]
    assert [row["architecture"] for row in rows] == ["gpt-oss", "deepseek"]
    assert rows[0]["experts"] == "4 of 16"
    assert rows[1]["experts"] == "4 of 16 + shared"
    for row in rows:
        assert float(row["decode tokens/s"]) > 0
        assert 0 <= float(row["mean KL"]) < 1e-2
        assert row["same next token"].endswith("%")
    assert list((tmp_path / "w").iterdir()) == []
    assert "| gpt-oss |" in (tmp_path / "matrix.md").read_text()


def test_quality_of_the_tiny_shape_is_marked(tmp_path, capsys) -> None:
    call = ["matrix", "--work", str(tmp_path), "--shapes", "gpt-oss-20b", "--tiny", "--runs", "1"]
    more = ["--layers", "2", "--prompt", "8", "--generate", "2", "--quality-tiny"]
    assert main([*call, *more]) == 0
    row = json.loads(capsys.readouterr().out.splitlines()[-1])["models"][0]["row"]
    assert row["layers"] == "2"
    assert row["mean KL"].endswith("(tiny)")
    assert list(tmp_path.iterdir()) == []


def test_the_budget_of_a_tiny_shape_places_the_same_share(tmp_path, monkeypatch) -> None:
    path = tmp_path / "m.gguf"
    assert main(["synth", "gpt-oss-20b-tiny", str(path)]) == 0
    gpu = Hardware(Gpu("GPU", 80 << 30, 80 << 30))
    planned = load.planned
    monkeypatch.setattr(llm, "planned", lambda file, config: planned(file, config, gpu))
    settings = {"context_length": 128, "max_sequences": 1}
    for share in (0.0, 0.5, 1.0):
        vram = table.budget_like(share, path)
        slots = llm.plan(path, vram=vram, **settings).slots
        assert share * 64 <= slots <= 64
        less = llm.plan(path, vram=f"{int(vram.removesuffix('MiB')) - 1}MiB", **settings)
        assert less.slots < share * 64 or less.mixed


def test_an_unknown_shape_is_one_line(tmp_path, capsys) -> None:
    assert main(["matrix", "--work", str(tmp_path), "--shapes", "gpt-9"]) == 1
    assert "no shape 'gpt-9'" in capsys.readouterr().err

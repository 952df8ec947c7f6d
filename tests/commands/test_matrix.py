"""`greenroom matrix` on two tiny shapes: one row each, files gone, nothing left empty."""

import json

from greenroom.commands import main


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
    assert list((tmp_path / "w").iterdir()) == []
    assert "| gpt-oss |" in (tmp_path / "matrix.md").read_text()


def test_an_unknown_shape_is_one_line(tmp_path, capsys) -> None:
    assert main(["matrix", "--work", str(tmp_path), "--shapes", "gpt-9"]) == 1
    assert "no shape 'gpt-9'" in capsys.readouterr().err

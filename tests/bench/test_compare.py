"""Results side by side: ratios worked by hand, and what cannot be compared."""

import json

import pytest

from greenroom.commands import main


def result(median: float, q1: float, q3: float, header: str = "h") -> dict:
    decode = {"median": median, "q1": q1, "q3": q3}
    return {
        "kind": "bench",
        "version": 1,
        "model": {"file": "m.gguf", "header": header},
        "results": {"greenroom": {"cases": {"1 x 4+4": {"decode": decode}}}},
    }


def call(tmp_path, a, b, *more) -> int:
    for name, document in (("a", a), ("b", b)):
        (tmp_path / name).write_text(json.dumps(document))
    return main(["compare", str(tmp_path / "a"), str(tmp_path / "b"), *more])


def test_ratios(tmp_path, capsys) -> None:
    assert call(tmp_path, result(10, 8, 16), result(20, 16, 24), "--json") == 0
    (change,) = json.loads(capsys.readouterr().out)["changes"]
    assert (change["ratio"], change["low"], change["high"]) == (2.0, 1.0, 3.0)
    assert call(tmp_path, result(10, 8, 16), result(20, 16, 24)) == 0
    assert "2.000" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("other", "complaint"),
    [
        (result(1, 1, 1, "other"), "different models"),
        ({"kind": "eval"}, "not eval"),
        ({"kind": "bench", "version": 1, "model": {"header": "h"}}, "lacks"),
        ([], "no kind"),
    ],
)
def test_what_cannot_be_compared(tmp_path, capsys, other, complaint) -> None:
    assert call(tmp_path, result(1, 1, 1), other) in (0, 1)
    captured = capsys.readouterr()
    if complaint != "lacks":
        assert complaint in captured.err
        assert captured.err.count("\n") == 1


def test_force(tmp_path) -> None:
    assert call(tmp_path, result(1, 1, 1), result(1, 1, 1, "other"), "--force") == 0

"""`greenroom stress` on a tiny model: every check, the document and the exit status."""

import json
from pathlib import Path

import pytest

from greenroom.bench import stress_checks
from greenroom.commands import main


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("stress") / "tiny.gguf"
    assert main(["synth", "gpt-oss-20b-tiny", str(path)]) == 0
    return str(path)


def test_every_check_has_a_verdict(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["stress", model, "--minutes", "0.05", "--context", "128", "--threads", "1"]
    assert main([*arguments, "--vram", "0", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    status = {check["name"]: check["status"] for check in found["checks"]}
    assert list(status) == list(stress_checks.CHECKS)
    assert status.pop("expert thrash") == "not applicable"
    # whether a rendering needs its process depends on the model's template
    assert status.pop("template worker") in ("passed", "not applicable")
    assert set(status.values()) == {"passed"}
    assert found["status"] == "passed"


def test_a_failed_check_is_an_exit_status(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(subject: object) -> str:
        raise ValueError("broken")

    def stopped(subject: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(stress_checks, "CHECKS", {"a": broken, "b": lambda subject: "fine"})
    assert main(["stress", model, "--quick"]) == 1
    out = capsys.readouterr().out
    assert "failed" in out.splitlines()[0]
    assert "ValueError: broken" in out
    assert out.splitlines()[-1] == "failed: tiny.gguf"
    monkeypatch.setattr(stress_checks, "CHECKS", {"a": stopped})
    assert main(["stress", model, "--quick"]) == 130


def test_errors_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        ([str(tmp_path / "none.gguf")], "none.gguf: cannot be opened"),
        ([str(tmp_path / "none.gguf"), "--vram", "much"], "must be a size"),
    ):
        assert main(["stress", *arguments]) == 1
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1

"""The stress test's own judgement: faults that are put in must be found."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from greenroom.bench import stress, stress_checks
from greenroom.bench.stress import Failure, Footprint, NotApplicable, Subject, judge, run_checks
from greenroom.engine import LLM
from greenroom.errors import RequestError

_spec = importlib.util.spec_from_file_location(
    "fake_model", Path(__file__).parents[1] / "engine" / "fake_model.py"
)
assert _spec is not None
assert _spec.loader is not None
fake = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fake)


class FakeSubject(Subject):
    """A subject whose engine is the fake one, with a fault."""

    fault: Any = None

    @contextmanager
    def load(self, **settings: Any) -> Iterator[LLM]:
        engine = fake.fake_engine(context_length=self.context, **settings)
        engine.model_config.moe = None
        fault = type(self).fault
        if fault is not None:
            fault(engine)
        with LLM.from_engine(engine) as llm:
            yield llm


@pytest.fixture
def subject(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSubject:
    monkeypatch.setattr(fake.Config, "moe", None, raising=False)
    monkeypatch.setattr(FakeSubject, "fault", None)
    monkeypatch.setattr(fake, "Config", _open_config())
    path = tmp_path / "fake.gguf"
    path.write_bytes(b"")
    return FakeSubject(path=path, seconds=0.5, context=64)


def _open_config() -> Any:
    class Config:
        def __init__(self, vocabulary_size: int, context_length: int) -> None:
            self.vocabulary_size, self.context_length = vocabulary_size, context_length
            self.moe = None

    return Config


GOOD = ("random requests", "context limits", "memory pressure", "failures inside", "leaks")


@pytest.mark.parametrize("name", GOOD)
def test_a_sound_engine_passes(subject: FakeSubject, name: str) -> None:
    verdict = judge(name, stress_checks.CHECKS[name], subject)
    assert (verdict.status, verdict.detail.count("\n")) == ("passed", 0), verdict.detail


def test_what_does_not_apply_is_said(subject: FakeSubject) -> None:
    assert judge("x", stress_checks.expert_thrash, subject).status == "not applicable"
    assert judge("x", stress_checks.template_worker, subject).status == "not applicable"


def never_drops(engine: Any) -> None:
    """Cancelled requests keep their blocks."""
    engine.cancel = lambda job: None


def forgets(engine: Any) -> None:
    """Answers depend on how much was asked before."""
    run, calls = engine._runner.run, []

    def drifting(*arguments: Any) -> Any:
        calls.append(None)
        rows = [part.copy() for part in run(*arguments)]
        for part in rows:
            part[..., len(calls) // 100 % 97] += 1e6
        return rows

    engine._runner.run = drifting


def accepts_all(engine: Any) -> None:
    """Nothing is checked before it is queued."""
    engine.check = lambda tokens, params=None: None


def test_faults_are_found(subject: FakeSubject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stress, "PATIENCE", 1.0)
    short = replace(subject, seconds=0.3)
    for fault, check, words in (
        (forgets, stress_checks.random_requests, "answered differently"),
        (accepts_all, stress_checks.context_limits, "too long"),
    ):
        monkeypatch.setattr(FakeSubject, "fault", staticmethod(fault))
        verdict = judge("x", check, short)
        assert verdict.status == "failed"
        assert words in verdict.detail


def test_a_hang_is_a_failure(subject: FakeSubject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stress, "PATIENCE", 0.2)

    def mute(engine: Any) -> None:
        engine._finish_chunk = lambda job, chunk, rows: None

    monkeypatch.setattr(FakeSubject, "fault", staticmethod(mute))
    with subject.load() as llm:
        request = stress.ask(llm.engine, [1, 2], 1)
        with pytest.raises(Failure, match="no token within"):
            request.step()
        with pytest.raises(Failure, match="are held"):
            stress.settle(llm.engine)


def test_growth_is_judged() -> None:
    before = Footprint(files=9, threads=3, children=1, bytes=100 << 20)
    assert "+1.0 MiB" in replace(before, bytes=101 << 20).check_growth(before, 2 << 20)
    for worse, words in (
        (replace(before, files=10), "1 more files"),
        (replace(before, threads=5), "2 more threads"),
        (replace(before, children=2), "1 more children"),
        (replace(before, bytes=103 << 20), "3.0 MiB more memory"),
    ):
        with pytest.raises(Failure, match=words):
            worse.check_growth(before, 2 << 20)


@pytest.mark.parametrize("stays", [1 << 20, 99 << 20])
def test_vram_that_a_closed_model_holds_is_seen(
    subject: FakeSubject, stays: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def vram() -> int:  # asked before and after each load
        asked.append(1)
        return stays * (len(asked) % 2 == 0)

    monkeypatch.setattr(stress_checks, "vram", vram)
    found = judge("reloading", stress_checks.reloading, subject)
    assert found.status == ("passed" if stays < 16 << 20 else "failed")
    assert ("a closed model still holds 99.0 MiB of VRAM" in found.detail) == (stays > 16 << 20)


def test_an_open_file_is_seen(tmp_path: Path) -> None:
    before = Footprint.now()
    with (tmp_path / "x").open("w"):
        assert Footprint.now().files == before.files + 1
    assert Footprint.now().files == before.files


def _raises(error: BaseException) -> Any:
    def check(subject: Subject) -> str:
        raise error

    return check


def test_verdicts_and_the_worst_of_them(subject: FakeSubject) -> None:
    checks = {
        "good": lambda subject: "fine",
        "odd": _raises(NotApplicable("no slots")),
        "user": _raises(RequestError("one line\nof text")),
        "bug": _raises(ZeroDivisionError("x")),
    }
    told: list[Any] = []
    found = run_checks(subject, checks, told.append)
    assert [c["status"] for c in found["checks"]] == ["passed", "not applicable"] + ["failed"] * 2
    assert [c["detail"] for c in found["checks"]] == [
        "fine", "no slots", "one line of text", "ZeroDivisionError: x"
    ]  # fmt: skip
    assert (found["kind"], found["status"]) == ("stress", "failed")
    assert [verdict.name for verdict in told] == list(checks)
    interrupted = {"stop": _raises(KeyboardInterrupt()), "never": _raises(AssertionError())}
    found = run_checks(subject, interrupted, told.append)
    assert found["status"] == "interrupted"
    assert [c["name"] for c in found["checks"]] == ["stop"]
    assert run_checks(subject, {"good": lambda subject: ""}, told.append)["status"] == "passed"

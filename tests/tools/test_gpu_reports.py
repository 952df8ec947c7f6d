"""tools/gpu_reports.py: which steps there are, that a failing one loses nothing, what is packed."""

import json
import os
import signal
import tarfile

import pytest
from tool import tool

from greenroom.bench import matrix as table

reports = tool("gpu_reports")


def steps(tmp_path, *more):
    return list(reports.steps(reports.parsed([str(tmp_path), *more])))


def test_every_file_is_made_before_it_is_measured_and_then_deleted(tmp_path) -> None:
    found = steps(tmp_path)
    names = [step.name for step in found]
    assert names[:5] == ["doctor", "plan", "plan-json", "synth-gpt-oss-20b", "bench-2GiB"]
    assert names[-2:] == ["synth-grin-moe", "matrix-grin-moe"]
    assert sum(name.startswith("sweep") for name in names) == 4
    alive = None
    for step in found[3:]:
        if step.name.startswith("synth"):
            assert alive is None
            alive = step.arguments[2]
        assert alive in step.arguments or step.name.startswith("matrix")
        alive = None if step.ends == alive else alive
    assert alive is None


def test_only_the_steps_that_are_named(tmp_path) -> None:
    more = ("--only", "sweep", "--shapes", "qwen3-30b-a3b", "grin-moe")
    (synth, sweep) = steps(tmp_path, *more)
    assert synth.arguments[:3] == ("synth", "qwen3-30b-a3b", "qwen3-30b-a3b-48.gguf")
    assert sweep.ends == "qwen3-30b-a3b-48.gguf"


def test_the_matrix_finds_the_file_that_was_made(tmp_path) -> None:
    more = ("--only", "matrix", "--shapes", "deepseek-moe-16b", "--tiny", "--layers", "2")
    (synth, matrix) = steps(tmp_path, *more)
    assert synth.arguments[1:3] == ("deepseek-moe-16b-tiny", "deepseek-moe-16b-tiny-2.gguf")
    assert matrix.arguments[-3:] == ("--layers", "2", "--tiny")


def test_a_step_that_fails_leaves_what_the_others_reported(tmp_path, capsys) -> None:
    work = tmp_path / "work"
    good, bad = reports.Step("good", 60, ("--version",)), reports.Step("bad", 60, ("nonsense",))
    done = [reports.run(step, work, 60) for step in (good, bad)]
    reports.pack(done, work, tmp_path)
    assert done[0]["status"] == 0
    assert done[1]["status"] not in (0, "out of time")
    with tarfile.open(tmp_path / "reports.tar.gz") as archive:
        assert {"reports/logs/good.txt", "reports/logs/bad.txt"} <= set(archive.getnames())
    assert json.loads((tmp_path / "steps.json").read_text()) == done


def test_tables_of_two_calls_become_one(tmp_path) -> None:
    for call, shapes in (("first", ("grin-moe", "gpt-oss-20b")), ("second", ("grin-moe",))):
        rows = [
            {"shape": shape, "row": dict.fromkeys(table.HEAD, f"{shape} {call}")}
            for shape in shapes
        ]
        document = {"command": f"greenroom {call}", "date": "today", "models": rows}
        (tmp_path / call).mkdir()
        (tmp_path / call / "matrix.json").write_text(json.dumps(document))
    out = tmp_path / "both"
    reports.main([str(out), "--join", str(tmp_path / "first"), str(tmp_path / "second")])
    document = json.loads((out / "matrix.json").read_text())
    assert document["command"] == "greenroom first ; greenroom second"
    rows = [line for line in (out / "matrix.md").read_text().splitlines() if "first |" in line]
    assert len(rows) == 1
    assert [model["row"]["GiB"] for model in document["models"]] == [
        "gpt-oss-20b first",
        "grin-moe second",
    ]


def test_a_program_that_is_ended_packs_what_there_is(tmp_path, monkeypatch, capsys) -> None:
    def ended(step, work, seconds):
        if step.name == "plan":
            os.kill(os.getpid(), signal.SIGTERM)
        (work / "reports").mkdir(exist_ok=True)
        (work / "reports" / step.name).write_text("done")
        return {"step": step.name}

    monkeypatch.setattr(reports, "run", ended)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit):
            reports.main([str(tmp_path / "out"), "--work", str(tmp_path / "work")])
    finally:
        signal.signal(signal.SIGTERM, before)
    with tarfile.open(tmp_path / "out" / "reports.tar.gz") as archive:
        assert "reports/doctor" in archive.getnames()

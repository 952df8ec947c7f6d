"""Conversions that are killed: under the result's name there is nothing or the whole file, and the
next run goes on where the last one stopped, or starts anew where anything differs."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from greenroom.commands import main
from greenroom.convert.convert import Conversion, convert
from greenroom.convert.legacy import merge_experts
from greenroom.convert.quantise import Quantisation, quantise_file
from greenroom.gguf.partial import journal_path, partial_path

from ..models.cases import CASES
from ..models.families import legacy
from . import checkpoints

# Calls one of the functions below and kills itself when so many bytes of tensors are written.
_KILLED = """
import os, signal, sys
from pathlib import Path
from tests.convert import test_resume
def stop(done, total):
    if done >= int(sys.argv[3]): os.kill(os.getpid(), signal.SIGKILL)
getattr(test_resume, sys.argv[1])(Path(sys.argv[2]), stop)
"""
ROOT = Path(__file__).parents[2]


def run_convert(folder: Path, progress: object = None) -> int:
    return convert(Conversion(folder / "checkpoint", "Q8_0"), folder / "out.gguf", progress)


def run_quantise(folder: Path, progress: object = None) -> int:
    job = Quantisation(folder / "model.gguf", "Q4_0", threads=1)
    return quantise_file(job, folder / "out.gguf", progress)


def run_merge(folder: Path, progress: object = None) -> int:
    return merge_experts(folder / "split.gguf", folder / "out.gguf", progress)


RUNS = {"run_convert": run_convert, "run_quantise": run_quantise, "run_merge": run_merge}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    tiny = CASES["mixtral"].make(1)
    checkpoints.save(tiny, folder / "checkpoint")
    tiny.write(folder / "model.gguf")
    tiny.write(folder / "split.gguf", overrides=legacy(tiny))
    return folder


@pytest.fixture
def folder(sources: Path, tmp_path: Path) -> Path:
    shutil.copytree(sources, tmp_path, dirs_exist_ok=True)
    return tmp_path


def killed(name: str, folder: Path, at: int) -> None:
    """Lets a run in a process of its own kill itself behind `at` bytes."""
    done = subprocess.run(
        [sys.executable, "-c", _KILLED, name, str(folder), str(at)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
    )
    assert done.returncode == -signal.SIGKILL
    assert not (folder / "out.gguf").exists()
    assert partial_path(folder / "out.gguf").exists()


@pytest.mark.parametrize("name", RUNS)
def test_a_killed_run_goes_on(folder: Path, name: str) -> None:
    whole = folder / "whole"
    shutil.copytree(folder, whole)
    calls: list[tuple[int, int]] = []
    assert RUNS[name](whole, lambda *call: calls.append(call)) == 0
    total = calls[-1][1]
    rng = random.Random(name)
    for at in sorted(rng.randrange(total // 3, total) for _ in range(3)):
        killed(name, folder, at)
    calls.clear()
    found = RUNS[name](folder, lambda *call: calls.append(call))
    assert found > 0
    assert calls[0][0] > found  # it did not write again what was there
    assert calls[-1] == (total, total)
    assert (folder / "out.gguf").read_bytes() == (whole / "out.gguf").read_bytes()
    assert not [p for p in folder.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize("change", ["weights", "touched", "type", "config"])
def test_a_changed_checkpoint_starts_anew(folder: Path, change: str) -> None:
    killed("run_convert", folder, 100_000)
    checkpoint = folder / "checkpoint"
    if change == "weights":
        checkpoints.rename(checkpoint, lambda t: {k: v + 1 for k, v in t.items()})
    elif change == "touched":
        os.utime(checkpoint / "model.safetensors", ns=(1, 1))
    elif change == "config":
        checkpoints.change_config(checkpoint, rope_theta=12345.0)
    type = "Q4_0" if change == "type" else "Q8_0"
    assert convert(Conversion(checkpoint, type), folder / "out.gguf") == 0
    convert(Conversion(checkpoint, type), folder / "again.gguf")
    assert (folder / "out.gguf").read_bytes() == (folder / "again.gguf").read_bytes()


def test_an_importance_matrix_that_changed_starts_anew(folder: Path) -> None:
    def job() -> Quantisation:
        return Quantisation(folder / "model.gguf", "Q4_0", imatrix=folder / "i.dat", threads=1)

    def write(value: float) -> None:
        name = b"blk.0.attn_q.weight"
        numbers = np.full(48, value, "<f4")
        numbers[0] = 1
        head = [np.array([n], "<i4").tobytes() for n in (1, len(name), 1, 48)]
        content = head[0] + head[1] + name + head[2] + head[3] + numbers.tobytes()
        (folder / "i.dat").write_bytes(content)

    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    write(1.0)
    with pytest.raises(KeyboardInterrupt):
        quantise_file(job(), folder / "out.gguf", stop)
    write(9.0)
    assert quantise_file(job(), folder / "out.gguf") == 0


def test_kills_at_any_moment(folder: Path) -> None:
    """A real command on a larger checkpoint, killed by the clock until it gets through."""
    checkpoint, out = folder / "checkpoint", folder / "out.gguf"
    rows = torch.randn(60_000, 48)
    wide = {"model.embed_tokens.weight": rows, "lm_head.weight": rows.clone()}
    checkpoints.rename(checkpoint, lambda tensors: tensors | wide)
    checkpoints.change_config(checkpoint, vocab_size=len(rows))
    convert(Conversion(checkpoint), folder / "whole.gguf")
    arguments = [sys.executable, "-m", "greenroom", "convert", str(checkpoint), str(out)]
    rng, kills = random.Random(4), 0
    seconds = 0.0
    while not out.exists():
        process = subprocess.Popen(
            arguments,
            stderr=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )
        partial = partial_path(out)
        deadline = time.monotonic() + 60
        while process.poll() is None and not partial.exists() and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(rng.random() * seconds)
        process.kill()
        process.wait()
        kills += process.returncode == -signal.SIGKILL
        seconds = 1.5 * seconds + 0.01
        assert kills < 30
    assert kills
    assert out.read_bytes() == (folder / "whole.gguf").read_bytes()


def test_the_command_says_what_it_does(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = folder / "out.gguf"
    arguments = ["convert", str(folder / "checkpoint"), str(out)]
    with monkeypatch.context() as patch:
        seen = 0

        def stop(*_: object) -> bytes:
            nonlocal seen
            seen += 1
            if seen > 9:
                raise KeyboardInterrupt
            return original(*_)

        from greenroom.convert import encoding

        original = encoding.encoded
        patch.setattr(encoding, "encoded", stop)
        assert main(arguments) == 130
    assert "run the same command again to go on" in capsys.readouterr().err
    assert journal_path(out).exists()
    assert main(arguments) == 0
    assert "went on behind" in capsys.readouterr().err
    assert sorted(p.name for p in folder.iterdir() if p.name.startswith(".")) == []

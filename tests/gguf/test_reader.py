"""Reading sound files: values, views, split sets, large vocabularies."""

import gc
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from greenroom.errors import ModelFileError
from greenroom.gguf import (
    GGMLType,
    GGUFFile,
    TensorSpec,
    Typed,
    ValueType,
    random_blocks,
    write_gguf,
)
from greenroom.gguf.header import Entry
from greenroom.gguf.metadata import Metadata

VOCABULARIES = Path(__file__).parents[2] / "../shared/data/vocab"


def spec(name: str, size: int = 8) -> TensorSpec:
    return TensorSpec(name, GGMLType.F32, (size,), np.full(size, len(name), np.float32))


def write_raw(path: Path, version: int, body: bytes) -> Path:
    path.write_bytes(b"GGUF" + version.to_bytes(4, "little") + body)
    return path


def test_views_and_their_life(tmp_path: Path) -> None:
    raw = random_blocks(GGMLType.Q8_0, 6, 64, np.random.default_rng(0))
    path = tmp_path / "model.gguf"
    stack = TensorSpec("blk.0.ffn_up_exps.weight", GGMLType.Q8_0, (3, 2, 64), raw)
    write_gguf(path, {"general.architecture": "x", "words": ["a"]}, [spec("one"), stack])
    file = GGUFFile(str(path))
    tensor = file.tensors[stack.name]
    assert (tensor.ne, tensor.shape, tensor.nbytes) == ((64, 2, 3), (3, 2, 64), raw.size)
    assert tensor.row_bytes == 68
    assert tensor.rows().shape == (3, 2, 68)
    assert path.read_bytes()[tensor.offset :][: tensor.nbytes] == raw.tobytes()
    view = tensor.expert(1)
    np.testing.assert_array_equal(view, raw.reshape(3, 2, 68)[1])
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 0
    assert "words" in file.metadata
    assert file.metadata.array_length("words") == 1
    assert file.metadata.array_length("general.architecture") is None
    assert file.metadata.get("none", 5) == 5
    file.close()
    gc.collect()
    # A view outlives the file it came from; new ones are refused in one line.
    np.testing.assert_array_equal(view, raw.reshape(3, 2, 68)[1])
    with pytest.raises(ModelFileError, match=r"model\.gguf: the file was closed"):
        tensor.data()


def test_undecoded_metadata_after_closing(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, {"seen": "a", "unseen": "b"}, [])
    with GGUFFile(path) as file:
        assert file.metadata["seen"] == "a"
    assert file.metadata["seen"] == "a"
    assert list(file.metadata) == ["seen", "unseen"]
    with pytest.raises(ModelFileError, match="closed"):
        file.metadata["unseen"]


def test_version_2_scalars_and_nested_arrays(tmp_path: Path) -> None:
    def u32(value: int) -> bytes:
        return value.to_bytes(4, "little")

    def u64(value: int) -> bytes:
        return value.to_bytes(8, "little")

    nested = u32(9) + u64(2) + u32(4) + u64(2) + u32(5) + u32(6) + u32(8) + u64(1) + u64(1) + b"z"
    body = u64(1) + u64(2)
    body += u64(1) + b"n" + u32(9) + nested
    body += u64(17) + b"general.alignment" + u32(0) + b"\x08"
    body += u64(1) + b"s" + u32(0) + u32(0) + u64(0)
    body += bytes(-(len(body) + 8) % 8) + np.float32(2.5).tobytes()
    file = GGUFFile(write_raw(tmp_path / "model.gguf", 2, body))
    assert file.alignment == 8
    numbers, strings = file.metadata["n"]
    assert numbers.tolist() == [5, 6]
    assert strings == ["z"]
    # No dimensions: one number.
    assert file.tensors["s"].shape == (1,)
    assert file.tensors["s"].dequantize() == np.float32(2.5)


def test_a_value_is_decoded_once(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, {"words": ["a", "b"], "ids": [1, 2]}, [])
    with GGUFFile(path) as file:
        assert file.metadata["words"] is file.metadata["words"]
        with pytest.raises(ValueError, match="read-only"):
            file.metadata["ids"][0] = 3
    metadata = Metadata(b"", {"k": Entry(ValueType.U8, 0, 1)})
    assert (len(metadata), "k" in metadata, "j" in metadata) == (1, True, False)


def test_ollama_mxfp4(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    raw = random_blocks(GGMLType.MXFP4_PAIRS, 2, 64, np.random.default_rng(0))
    write_gguf(path, {}, [TensorSpec("w", GGMLType.MXFP4_PAIRS, (2, 64), raw)])
    with GGUFFile(path) as file:
        assert file.tensors["w"].type == 4
        assert file.tensors["w"].type.block_bytes == 17
        # Neighbours share a byte: elements 0 and 1 are the nibbles of the first one.
        values = file.tensors["w"].dequantize()
        levels = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
        codes = np.array([raw[0, 1] & 15, raw[0, 1] >> 4])
        np.testing.assert_array_equal(values[0, :2], levels[codes] * 2.0 ** (raw[0, 0] - 127.0))


def split_set(folder: Path, count: int = 3, total: int | None = None) -> list[Path]:
    paths = [folder / f"m-{i + 1:05}-of-{count:05}.gguf" for i in range(count)]
    for i, path in enumerate(paths):
        metadata = {
            "split.no": Typed(ValueType.U16, i),
            "split.count": Typed(ValueType.U16, count),
            "split.tensors.count": Typed(ValueType.I32, total or 2 * count),
        }
        if i == 0:
            metadata["general.architecture"] = "x"
        write_split(path, metadata, [spec(f"t{i}"), spec(f"wide{i}", 40)])
    return paths


def write_split(path: Path, metadata: dict, tensors: list[TensorSpec]) -> None:
    # The writer leaves split keys out, so they are written under another name first.
    write_gguf(path, {k.replace("split.", "shard."): v for k, v in metadata.items()}, tensors)
    path.write_bytes(path.read_bytes().replace(b"shard.", b"split."))


def test_split_set(tmp_path: Path) -> None:
    paths = split_set(tmp_path)
    with GGUFFile(paths[0]) as file:
        assert list(file.tensors) == ["t0", "wide0", "t1", "wide1", "t2", "wide2"]
        assert file.paths == tuple(paths)
        assert file.tensors["wide2"].path == paths[2]
        assert file.tensors["wide1"].dequantize().tolist() == [5.0] * 40
        assert file.metadata["general.architecture"] == "x"
        assert file.nbytes == 3 * 48 * 4


def test_split_sets_that_are_not_whole(tmp_path: Path) -> None:
    paths = split_set(tmp_path)
    with pytest.raises(ModelFileError, match=r"open the first file.*m-00001-of-00003"):
        GGUFFile(paths[1])
    hidden = paths[1].rename(tmp_path / "hidden")
    with pytest.raises(ModelFileError, match=r"m-00002-of-00003.gguf of the same set is missing"):
        GGUFFile(paths[0])
    paths[1].write_bytes(paths[2].read_bytes())
    with pytest.raises(ModelFileError, match=r"m-00002.* it is file 3"):
        GGUFFile(paths[0])
    hidden.rename(paths[1])
    os.truncate(paths[2], paths[2].stat().st_size - 33)
    with pytest.raises(ModelFileError, match=r"m-00003.*truncated"):
        GGUFFile(paths[0])
    plain = paths[0].rename(tmp_path / "model.gguf")
    with pytest.raises(ModelFileError, match="file 1 of a set of 3; give the files their names"):
        GGUFFile(plain)
    plain.rename(tmp_path / "m-00001-of-00004.gguf")
    with pytest.raises(ModelFileError, match="its name says 4 files, its metadata 3"):
        GGUFFile(tmp_path / "m-00001-of-00004.gguf")


def test_split_sets_with_wrong_tensors(tmp_path: Path) -> None:
    paths = split_set(tmp_path, total=7)
    with pytest.raises(ModelFileError, match="should have 7 tensors, but its files have 6"):
        GGUFFile(paths[0])
    split_set(tmp_path)
    write_split(paths[2], {"split.no": 2}, [spec("t0")])
    with pytest.raises(ModelFileError, match=r"m-00003.*'t0' is also in m-00001"):
        GGUFFile(paths[0])
    write_split(paths[0], {"split.count": Typed(ValueType.F32, 3.0)}, [])
    with pytest.raises(ModelFileError, match=r"split\.count must be a count, not F32"):
        GGUFFile(paths[0])
    write_split(paths[0], {"split.count": Typed(ValueType.I8, -3)}, [])
    with pytest.raises(ModelFileError, match=r"split\.count must be a count, not -3"):
        GGUFFile(paths[0])


def test_counts_of_any_width(tmp_path: Path) -> None:
    widths = [ValueType.U8, ValueType.I16, ValueType.I32, ValueType.U64, ValueType.I64]
    for width in widths:
        for i, path in enumerate(split_set(tmp_path, 2)):
            counts = {"split.no": i, "split.count": 2, "split.tensors.count": 2}
            typed = {key: Typed(width, value) for key, value in counts.items()}
            write_split(path, typed, [spec(f"t{i}")])
        with GGUFFile(tmp_path / "m-00001-of-00002.gguf") as file:
            assert list(file.tensors) == ["t0", "t1"]


@pytest.mark.parametrize("name", ["gpt-4o", "llama-spm", "gpt-2", "deepseek-llm", "llama-bpe"])
def test_vocabularies(name: str) -> None:
    path = VOCABULARIES / f"{name}.gguf"
    if not path.exists():
        pytest.skip("the shared vocabularies are not beside the checkout")
    with GGUFFile(path) as file:
        tokens = file.metadata["tokenizer.ggml.tokens"]
        assert len(tokens) == file.metadata.array_length("tokenizer.ggml.tokens")
        assert all(isinstance(token, str) for token in tokens)
        assert len(file.metadata["tokenizer.ggml.token_type"]) == len(tokens)


LARGE = """
import sys
import numpy
from greenroom.gguf import GGUFFile
with GGUFFile(sys.argv[1]) as file:
    values = [file.metadata[key] for key in file.metadata]
sizes = sorted(len(value) for value in values if isinstance(value, list))
# Not ru_maxrss: a child inherits its parent's.
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(int(status["VmHWM"].split()[0]) / 1024, *sizes)
"""


def test_the_largest_vocabulary_is_small() -> None:
    path = VOCABULARIES / "gpt-4o.gguf"
    if not path.exists():
        pytest.skip("the shared vocabularies are not beside the checkout")
    call = [sys.executable, "-c", LARGE, path]
    run = subprocess.run(call, capture_output=True, check=True)
    memory, *sizes = map(float, run.stdout.split())
    assert sizes == [201088, 446189]
    assert memory < 300  # MiB; measured: 130

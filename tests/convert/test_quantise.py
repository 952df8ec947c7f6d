"""Quantisers against llama.cpp's own, and files in other types."""

import ctypes
import re
import struct
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import gguf
import numpy as np
import pytest

from greenroom import native
from greenroom.convert.imatrix import read_imatrix
from greenroom.convert.mixture import MIXES, Rules, parse_override
from greenroom.convert.quantise import Quantisation, quantise_file
from greenroom.convert.quantisers import Quantisers
from greenroom.errors import ModelFileError, UnsupportedModelError
from greenroom.gguf import GGMLType, GGUFFile, TensorSpec, dequantize, write_gguf

TYPES = [
    name for name, mix in MIXES.items() if mix.base.name == name and mix.file_type not in (0, 1, 32)
]


@cache
def llama_cpp() -> ctypes.CDLL:
    spec = find_spec("xllamacpp")
    assert spec is not None
    assert spec.submodule_search_locations
    (path,) = Path(spec.submodule_search_locations[0]).glob("xllamacpp*.so")
    lib = ctypes.CDLL(str(path))
    size, pointer = ctypes.c_int64, ctypes.c_void_p
    lib.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, size, size, size, pointer]
    lib.ggml_quantize_chunk.restype = ctypes.c_size_t
    return lib


def theirs(type: GGMLType, x: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    rows, columns = x.shape
    out = np.zeros((rows, type.row_bytes(columns)), np.uint8)
    at = None if weights is None else weights.ctypes.data
    llama_cpp().ggml_quantize_chunk(int(type), x.ctypes.data, out.ctypes.data, 0, rows, columns, at)
    return out


def numbers(kind: str) -> np.ndarray:
    rng = np.random.default_rng(7)
    x = rng.standard_normal((24, 1024))
    if kind == "heavy":
        x = rng.standard_t(4, x.shape)
    if kind == "shifted":
        x = x * 0.3 + 0.5
    return (0.03 * x).astype(np.float32)


@pytest.fixture(scope="module")
def quantisers() -> Quantisers:
    return Quantisers(2)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", ["normal", "heavy", "shifted"])
@pytest.mark.parametrize("name", TYPES)
def test_errors_are_no_worse_than_llama_cpps(
    quantisers: Quantisers, name: str, kind: str, weighted: bool
) -> None:
    type, x = GGMLType[name], numbers(kind)
    weights = None
    if weighted:
        weights = (np.random.default_rng(1).random(1024) ** 3 + 0.01).astype(np.float32)
    factor = 1.0 if weights is None else weights
    errors = [
        float(np.sqrt((factor * (dequantize(type, raw) - x) ** 2).mean()))
        for raw in (quantisers.quantise(type, x, weights), theirs(type, x, weights))
    ]
    assert errors[0] <= 1.02 * errors[1]


@pytest.mark.parametrize("name", TYPES)
def test_extremes_are_encoded(quantisers: Quantisers, name: str) -> None:
    type = GGMLType[name]
    x = np.zeros((6, 256), np.float32)
    x[1] = 1.0
    x[2, 5] = -3.0
    x[3] = 1e-30
    x[4] = np.linspace(-200, 200, 256)
    x[5] = -1.0
    raw = quantisers.quantise(type, x)
    back = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType(int(type)))
    assert np.isfinite(back).all()
    assert not back[0].any()
    assert np.abs(back[1] - 1).max() < 0.13
    assert np.abs(back[4] - x[4]).max() < 200 * (0.3 if name in ("Q2_K", "NVFP4") else 0.2)
    with pytest.raises(ValueError, match="NaN"):
        quantisers.quantise(type, np.full((1, 256), np.nan, np.float32))


def test_threads_do_not_change_the_bytes() -> None:
    x = numbers("normal")
    one, two = (Quantisers(n).quantise(GGMLType.Q4_K, x) for n in (1, 2))
    assert (one == two).all()


@pytest.mark.parametrize("name", TYPES)
def test_every_processor_writes_the_same_bytes(name: str) -> None:
    rng = np.random.default_rng(5)
    x = (0.1 * rng.standard_t(5, 64 * 1024) + 0.02).astype(np.float32)
    weights = (rng.random(1024) + 0.01).astype(np.float32)
    type, written = GGMLType[name], []
    for tier in native.usable_tiers():
        lib = native.module(tier)
        out = np.zeros(64 * type.row_bytes(1024), np.uint8)
        lib.quantise(lib.Pool(1), int(type), 64, 1024, x, out, weights)
        written.append(out.tobytes())
    assert len(set(written)) == 1


def model(path: Path, layers: int = 8) -> Path:
    rng = np.random.default_rng(3)

    def values(*shape: int) -> np.ndarray:
        return (0.05 * rng.standard_normal(shape)).astype(np.float32)

    tensors = {"token_embd.weight": values(40, 256), "output.weight": values(40, 256)}
    for i in range(layers):
        tensors |= {
            f"blk.{i}.attn_norm.weight": values(256),
            f"blk.{i}.attn_v.weight": values(64, 256),
            f"blk.{i}.ffn_gate_inp.weight": values(4, 256),
            f"blk.{i}.ffn_up_exps.weight": values(4, 32, 256),
            f"blk.{i}.ffn_down_exps.weight": values(4, 256, 32),
        }
    metadata = {
        "general.architecture": "llama",
        "llama.block_count": layers,
        "llama.expert_count": 4,
    }
    specs = [TensorSpec.of(n, GGMLType.F32, v) for n, v in tensors.items()]
    write_gguf(path, metadata, specs)
    return path


def test_a_file_gets_the_mix(tmp_path: Path) -> None:
    source, out = model(tmp_path / "a.gguf"), tmp_path / "b.gguf"
    quantise_file(Quantisation(source, "q4_k_m", ("attn_v=Q8_0",), threads=2), out)
    with GGUFFile(source) as before, GGUFFile(out) as after:
        types = {name: tensor.type.name for name, tensor in after.tensors.items()}
        for name, tensor in after.tensors.items():
            x = before.tensors[name].dequantize()
            error = np.sqrt(((tensor.dequantize() - x) ** 2).mean() / (x**2).mean())
            assert error <= (0 if tensor.type == GGMLType.F32 else 0.1), name
        assert after.metadata["general.file_type"] == 15
    assert types["output.weight"] == "Q6_K"
    assert types["token_embd.weight"] == types["blk.1.ffn_up_exps.weight"] == "Q4_K"
    assert types["blk.1.attn_v.weight"] == "Q8_0"
    assert types["blk.0.ffn_down_exps.weight"] == "Q8_0"  # Q6_K does not fit rows of 32
    assert types["blk.1.ffn_down_exps.weight"] == "Q5_0"
    assert types["blk.1.attn_norm.weight"] == types["blk.1.ffn_gate_inp.weight"] == "F32"


@pytest.mark.parametrize("mix", MIXES)
def test_every_mix_is_written(tmp_path: Path, mix: str) -> None:
    out = tmp_path / "b.gguf"
    quantise_file(Quantisation(model(tmp_path / "a.gguf", 2), mix, threads=2), out)
    with GGUFFile(out) as file:
        found = file.tensors["blk.1.ffn_up_exps.weight"].type
        assert found == MIXES[mix].base
        assert file.metadata["general.file_type"] == MIXES[mix].file_type


def test_published_counts_of_finer_layers() -> None:
    rules = Rules("Q4_K_M", layers=32, experts=16)
    kinds = [
        rules.type_of(f"blk.{i}.ffn_down_exps.weight", (16, 4096, 6400), GGMLType.BF16)
        for i in range(32)
    ]
    assert kinds.count(GGMLType.Q6_K) == 16
    mixtral = Rules("Q4_K_M", layers=32, experts=8)
    assert mixtral.type_of("blk.0.attn_k.weight", (1024, 4096), GGMLType.F16) == GGMLType.Q8_0
    oss = Rules("Q8_0", layers=24, experts=32)
    kept = oss.type_of("blk.0.ffn_up_exps.weight", (32, 2880, 2880), GGMLType.MXFP4)
    assert kept == GGMLType.MXFP4


def test_importance_moves_the_error(tmp_path: Path) -> None:
    source = model(tmp_path / "a.gguf", 2)
    weights = np.full((4, 256), 0.01, np.float32)
    for expert in range(4):
        weights[expert, expert::4] = 10.0  # other columns for each expert
    name = "blk.0.ffn_up_exps.weight"
    counts = np.full((4, 1), 3.0, np.float32)
    parts = {f"{name}.in_sum2": 3 * weights, f"{name}.counts": counts}
    specs = [TensorSpec.of(n, GGMLType.F32, v) for n, v in parts.items()]
    write_gguf(tmp_path / "i.gguf", {"general.type": "imatrix"}, specs)
    assert np.allclose(read_imatrix(tmp_path / "i.gguf")[name], weights)
    errors = []
    for imatrix in (None, tmp_path / "i.gguf"):
        out = tmp_path / "b.gguf"
        quantise_file(Quantisation(source, "Q2_K", (), imatrix, 2), out)
        with GGUFFile(source) as before, GGUFFile(out) as after:
            off = after.tensors[name].dequantize() - before.tensors[name].dequantize()
        errors.append(float((weights[:, None] * off**2).sum()))
    assert errors[1] < 0.97 * errors[0]


def test_older_importance_files(tmp_path: Path) -> None:
    values = np.arange(4, dtype=np.float32)
    raw = struct.pack("<ii", 1, 3) + b"abc" + struct.pack("<2i", 2, 4) + values.tobytes()
    (tmp_path / "i.dat").write_bytes(raw)
    assert (read_imatrix(tmp_path / "i.dat")["abc"] == values / 2).all()
    (tmp_path / "i.dat").write_bytes(raw[:-3])
    with pytest.raises(ModelFileError, match="damaged"):
        read_imatrix(tmp_path / "i.dat")


def test_what_cannot_be_done_is_said(tmp_path: Path) -> None:
    source = model(tmp_path / "a.gguf", 1)
    with pytest.raises(UnsupportedModelError, match="no type 'Q9'"):
        quantise_file(Quantisation(source, "Q9"), tmp_path / "b.gguf")
    with pytest.raises(UnsupportedModelError, match="REGEX=TYPE"):
        parse_override("ffn_down")
    with pytest.raises(UnsupportedModelError, match=re.escape("no blocks of Q4_K")):
        quantise_file(Quantisation(source, "Q8_0", ("down=Q4_K",)), tmp_path / "b.gguf")
    with pytest.raises(ModelFileError, match="another name"):
        quantise_file(Quantisation(source, "Q8_0"), source)

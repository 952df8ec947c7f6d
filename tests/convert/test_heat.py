"""Mixed precision by heat: the classes, the file, the engine on both backends, and the way back."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from greenroom.commands import main
from greenroom.commands.inspect import describe
from greenroom.convert.allocation import rounding_errors, spend
from greenroom.convert.heat import Heat, divergence, room_for
from greenroom.convert.quantise import Quantisation, quantise_file
from greenroom.convert.quantisers import Quantisers
from greenroom.errors import ModelFileError, UnsupportedModelError
from greenroom.experts.trace import Trace
from greenroom.gguf import GGMLType, GGUFFile, TensorSpec, dequantize, write_gguf
from greenroom.models import LoadOptions, load_model
from greenroom.models.registry import read_config
from greenroom.placement.sizes import Sizes

from ..models.cases import CASES
from ..models.hf_export import VOCABULARY
from ..models.sessions import one_pass, prompt, relative_error


def trace(path: Path, counts: np.ndarray, layers: list[int] | None = None) -> Path:
    """A trace of one route per token with these counts, (layers, experts)."""
    tokens = counts.sum(1).max()
    routes = np.full((tokens, len(counts), 1), -1, np.int16)
    for i, row in enumerate(counts):
        routes[: row.sum(), i, 0] = np.repeat(np.arange(len(row)), row)
    np.savez_compressed(
        path,
        version=np.int64(1),
        model=np.frombuffer(b"tiny", np.uint8),
        experts=np.int64(counts.shape[1]),
        layers=np.array(layers or range(len(counts))),
        routes=routes,
        starts=np.zeros(1, np.int64),
    )
    return path


def source(folder: Path, case: str) -> tuple[Path, np.ndarray]:
    """A model in float16 and counts in which experts 1 and 2 of every layer are hot."""
    tiny = CASES[case].make_wide(gain=1.0)
    path = tiny.write(folder / "model.gguf", "F16")
    with GGUFFile(path) as file:
        config = load_model(file, LoadOptions(backend="reference")).config
    assert config.moe is not None
    counts = np.ones((config.layers, config.moe.experts), np.int64)
    counts[:, 1], counts[:, 2] = 20, 10
    return path, counts


def logits(path: Path, backend: str, **options: object) -> torch.Tensor:
    with GGUFFile(path) as file:
        model = load_model(file, LoadOptions(backend=backend, threads=2, **options))
        return one_pass(model, prompt(5, 23, VOCABULARY))


@pytest.mark.parametrize("case", ["qwen3moe", "gpt-oss"])
def test_the_engine_runs_a_mixed_file(tmp_path: Path, case: str) -> None:
    path, counts = source(tmp_path, case)
    heat = Heat(trace(tmp_path / "t.npz", counts), "Q8_0", "Q4_0", share=2 / counts.shape[1])
    out = tmp_path / "mixed.gguf"
    quantise_file(Quantisation(path, "F16", heat=heat, threads=2), out)
    with GGUFFile(out) as file, GGUFFile(path) as before:
        index = file.tensors["blk.0.ffn_exps.class"].data().view(np.int32)
        hot, cold = (file.tensors[f"blk.0.ffn_down_exps.c{c}.weight"] for c in (0, 1))
        whole = before.tensors["blk.0.ffn_down_exps.weight"].dequantize()
        assert describe(file)["experts"]["classes"][0]["type"] == "Q8_0"
        assert (hot.type, cold.type) == (GGMLType.Q8_0, GGMLType.Q4_0)
        assert index.tolist() == [int(e not in (1, 2)) for e in range(len(index))]
        off = hot.dequantize() - whole[1:3]
        assert (off**2).mean() < 1e-4 * (whole[1:3] ** 2).mean()
    # The twin: every expert rounded to its type, stored in float32 as plain stacks.
    plain = tmp_path / "plain.gguf"
    quantise_file(Quantisation(out, "F32", threads=2), plain)
    with GGUFFile(plain) as file:
        assert not any(".c0." in name or ".class" in name for name in file.tensors)
    expected = logits(plain, "reference")
    assert relative_error(logits(out, "reference"), expected) < 1e-5
    assert relative_error(logits(out, "native"), expected) < 0.05
    assert torch.equal(logits(out, "native"), logits(out, "native", mmap=True))


@pytest.mark.parametrize("case", ["qwen3moe", "gpt-oss"])
def test_what_a_mixed_file_needs_of_ram_is_known_before_it_is_loaded(
    tmp_path: Path, case: str
) -> None:
    path, counts = source(tmp_path, case)
    heat = Heat(trace(tmp_path / "t.npz", counts), "Q8_0", "Q4_0", share=2 / counts.shape[1])
    out = tmp_path / "mixed.gguf"
    quantise_file(Quantisation(path, "F16", heat=heat, threads=2), out)
    with GGUFFile(out) as file:
        sizes = Sizes.of(file.tensors, read_config(file))
        model = load_model(file, LoadOptions(backend="native", threads=1))
        assert sizes.experts == model.memory()["experts"] > 0
    assert (sizes.slab, sizes.expert_count) == (0, 0)  # none of them leaves the RAM


@pytest.mark.parametrize("seed", range(20))
def test_bytes_go_where_they_save_most(seed: int) -> None:
    """Against every choice there is, on small cases with three candidates."""
    rng = np.random.default_rng(seed)
    errors = np.sort(rng.random((2, 3, 3)) ** 3, axis=-1)
    bytes_of = np.array([[6, 4, 2], [9, 6, 3]])
    room = int(rng.integers(0, 24))
    layer = np.repeat(np.arange(2), 3)

    def used(chosen: np.ndarray) -> int:
        return int((bytes_of[layer, chosen] - bytes_of[layer, 2]).sum())

    def saved(chosen: np.ndarray) -> float:
        flat = errors.reshape(6, 3)
        return float((flat[:, 2] - flat[np.arange(6), chosen]).sum())

    of = spend(errors, bytes_of, room).ravel()
    assert used(of) <= room
    choices = (np.array(c) for c in itertools.product(range(3), repeat=6))
    best = max(saved(c) for c in choices if used(c) <= room)
    assert saved(of) >= 0.75 * best  # greedy, not exact


def test_hot_experts_are_those_with_most_routes() -> None:
    share = np.array([[0.5, 0.1, 0.1, 0.3], [0.9, 0.0, 0.0, 0.1]])
    bytes_of = np.array([[8, 4], [8, 4]])
    cost = share[..., None] * np.array([0.0, 1.0])
    for wanted, hot in ((None, [[0], [0]]), (0.375, [[0, 3], [0]])):
        room = room_for(bytes_of, 4, Heat(Path(), "Q8_0", "Q4_0", share=wanted), 0)
        of = spend(cost, bytes_of, room)
        assert [np.flatnonzero(row == 0).tolist() for row in of] == hot
    with pytest.raises(UnsupportedModelError, match="cannot be reached"):
        room_for(bytes_of, 4, Heat(Path(), "Q8_0", "Q4_0", size=120), 100)


def test_rounding_errors_are_those_of_the_blocks(tmp_path: Path) -> None:
    values = np.random.default_rng(1).normal(size=(3, 40, 64)).astype(np.float32)
    values[1] *= 100  # relative errors do not see it
    values[2] = np.rint(values[2] * 20) / 16
    importance = {"e": np.repeat([[1.0, 3.0]], 32, 1).reshape(64).astype(np.float32)}
    write_gguf(tmp_path / "e.gguf", {}, [TensorSpec.of("e", GGMLType.F16, values)])
    with GGUFFile(tmp_path / "e.gguf") as file:
        types = [GGMLType.Q8_0, GGMLType.Q4_0, GGMLType.F16]
        plain = rounding_errors(file.tensors["e"], types, Quantisers(1))
        weighed = rounding_errors(file.tensors["e"], types, Quantisers(1, importance))
        stored = file.tensors["e"].dequantize().reshape(values.shape)
    for i, type in enumerate(types[:2]):
        lost = stored - dequantize(type, Quantisers(1).quantise(type, stored))
        exact = (lost**2).sum((1, 2)) / (stored**2).sum((1, 2))
        assert np.allclose(plain[:, i], exact, rtol=0.1)  # 32 of 40 rows
    assert (plain[:, 2] == 0).all()
    assert ((weighed > 0) == (plain > 0)).all()
    assert not np.allclose(weighed[:, 1], plain[:, 1], rtol=1e-3)


def test_a_size_uses_the_types_between(tmp_path: Path) -> None:
    path, counts = source(tmp_path, "qwen3moe")
    heat = Heat(trace(tmp_path / "t.npz", counts), "Q8_0", "Q3_K", size=path.stat().st_size // 2)
    assert heat.mixes == ["Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K"]
    quantise_file(Quantisation(path, "F16", heat=heat, threads=2), tmp_path / "o.gguf")
    assert (tmp_path / "o.gguf").stat().st_size <= path.stat().st_size // 2
    with GGUFFile(tmp_path / "o.gguf") as file:
        found = {e["type"] for e in describe(file)["experts"]["classes"]}
        index = file.tensors["blk.0.ffn_exps.class"].data().view(np.int32)
        assert set(index) == set(range(index.max() + 1))
    assert len(found) > 2
    plain = tmp_path / "plain.gguf"
    quantise_file(Quantisation(tmp_path / "o.gguf", "F32", threads=2), plain)
    expected = logits(plain, "reference")
    assert relative_error(logits(tmp_path / "o.gguf", "reference"), expected) < 1e-5
    assert relative_error(logits(tmp_path / "o.gguf", "native"), expected) < 0.05


@pytest.mark.parametrize("percent", [45, 48])
def test_the_size_is_kept(tmp_path: Path, percent: int) -> None:
    path, counts = source(tmp_path, "mixtral")
    size = path.stat().st_size * percent // 100
    heat = Heat(trace(tmp_path / "t.npz", counts), "Q8_0", "Q4_0", size=size)
    quantise_file(Quantisation(path, "Q8_0", heat=heat, threads=2), tmp_path / "o.gguf")
    found = (tmp_path / "o.gguf").stat().st_size
    assert found <= size
    with GGUFFile(tmp_path / "o.gguf") as file:
        hot = sum(e["experts"] for e in describe(file)["experts"]["classes"][:1])
    assert 0 < hot < counts.size


def test_a_measured_sensitivity_decides(tmp_path: Path) -> None:
    path, counts = source(tmp_path, "qwen3moe")
    record = Trace.load(trace(tmp_path / "t.npz", counts))
    known = np.full((*counts.shape, 2), 1e-3)
    known[-1, 3] = 1.0  # of an expert that is not hot, in the last layer
    replace(record, sensitivity=known).save(tmp_path / "s.npz")
    types = []
    for name in ("t.npz", "s.npz"):
        heat = Heat(tmp_path / name, "Q8_0", "Q4_0", share=1 / counts.size)
        quantise_file(Quantisation(path, "F16", heat=heat, threads=2), tmp_path / "o.gguf")
        with GGUFFile(tmp_path / "o.gguf") as file:
            classes = [
                file.tensors[n].data().view(np.int32) if n in file.tensors else None
                for n in (f"blk.{layer}.ffn_exps.class" for layer in range(len(counts)))
            ]
        types.append([(i, int(c.argmin())) for i, c in enumerate(classes) if c is not None])
    assert types[0] == [(0, 1)]
    assert types[1] == [(len(counts) - 1, 3)]


def test_divergence_is_a_power_through_what_was_measured() -> None:
    routes = np.array([[[0]], [[0]], [[1]]], np.int16)
    record = Trace("tiny", 2, (0,), routes, np.zeros(1, np.int64))
    errors = np.square([[[0.0, 0.05, 0.1, 0.2]]])
    np.testing.assert_allclose(divergence(record, errors)[0, :, 3], [0.04 * 2 / 3, 0.04 / 3])
    known = np.array([[[1.0, 4.0], [3.0, 6.0]]])  # with the error's square, and with the error
    found = divergence(replace(record, sensitivity=known), errors)
    np.testing.assert_allclose(found, [[[0, 1, 4, 16], [0, 3, 6, 12]]])
    still = divergence(replace(record, sensitivity=np.zeros((1, 2, 2))), errors)
    assert (still[..., 1:] > 0).all()
    assert (still < 1e-20).all()


def test_a_trace_of_another_model_is_refused(tmp_path: Path) -> None:
    path, counts = source(tmp_path, "mixtral")
    other = trace(tmp_path / "t.npz", counts[:, :-1])
    with pytest.raises(ModelFileError, match="this trace is of tiny"):
        quantise_file(
            Quantisation(path, "Q8_0", heat=Heat(other, "Q8_0", "Q4_0")), tmp_path / "o.gguf"
        )
    (tmp_path / "no.npz").write_bytes(b"PK")
    with pytest.raises(ModelFileError, match="this is no trace"):
        quantise_file(
            Quantisation(path, "Q8_0", heat=Heat(tmp_path / "no.npz", "Q8_0", "Q4_0")),
            tmp_path / "o.gguf",
        )


def test_a_damaged_index_is_refused(tmp_path: Path) -> None:
    path, counts = source(tmp_path, "mixtral")
    heat = Heat(trace(tmp_path / "t.npz", counts), "Q8_0", "Q4_0")
    quantise_file(Quantisation(path, "Q8_0", heat=heat, threads=2), tmp_path / "o.gguf")
    for values in ([0] * counts.shape[1], [9] * counts.shape[1], [-1] * counts.shape[1]):
        with GGUFFile(tmp_path / "o.gguf") as file:
            specs = [
                TensorSpec(t.name, t.type, t.shape, np.array(values, np.int32))
                if t.name == "blk.0.ffn_exps.class"
                else TensorSpec.copy(t)
                for t in file.tensors.values()
            ]
            write_gguf(tmp_path / "bad.gguf", file.metadata.raw_values(), specs)
        with pytest.raises(ModelFileError):
            logits(tmp_path / "bad.gguf", "reference")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, counts = source(tmp_path, "mixtral")
    record = trace(tmp_path / "t.npz", counts)
    out = tmp_path / "o.gguf"
    arguments = ["quantize", str(path), str(out), "--hot-type", "Q8_0", "--cold-type", "Q4_0"]
    assert main([*arguments, "--hot-experts", str(record), "--hot-share", "0.5"]) == 0
    assert main([*arguments, "--hot-share", "0.5"]) == 1
    assert "need --hot-experts" in capsys.readouterr().err
    assert main(["inspect", str(out)]) == 0
    assert "mixed precision" in capsys.readouterr().out

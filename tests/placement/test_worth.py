"""A budget for some of the layers is used only where that is predicted to be faster."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from greenroom.convert.synth import Synthesis, write_synthetic
from greenroom.convert.synth_shapes import shape_of
from greenroom.engine import planning
from greenroom.engine.config import EngineConfig
from greenroom.gguf import GGUFFile
from greenroom.models.registry import read_config
from greenroom.placement import predict
from greenroom.placement.hardware import Gpu, Hardware
from greenroom.placement.placement import Placement
from greenroom.placement.planner import Plan, Wish
from greenroom.placement.sizes import Sizes
from greenroom.placement.work import Work

from .profiles import GPU

GIB = 1 << 30
# Reads 100 and 1000 GB/s; a layer of the CPU has overheads that outweigh the GPU's.
GOOD = replace(GPU, matrix_seconds=1e-3)
POOR = replace(GOOD, matrix_seconds=0.0, dense={"X": 1e5})


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("synth") / "model.gguf"
    write_synthetic(Synthesis(shape_of("gpt-oss-20b-tiny", 4)), path)
    with GGUFFile(path) as opened:
        yield opened


def planned(
    file: GGUFFile, monkeypatch: pytest.MonkeyPatch, layers: int, profile: Any, **more: Any
) -> Placement:
    """With just the bytes that so many layers need."""
    model = read_config(file)
    plan = Plan(Sizes.of(file.tensors, model), model, Wish(context=256, chunk=64, sequences=1))
    settings = {"context_length": 256, "prefill_chunk": 64, "max_sequences": 1} | more
    config = EngineConfig(vram=plan.need(True, layers), **settings)
    monkeypatch.setattr(planning, "probe", lambda: Hardware(Gpu("a GPU", 70 * GIB, 80 * GIB)))
    monkeypatch.setattr(planning, "machine", lambda: SimpleNamespace(fingerprint="f" * 16))
    monkeypatch.setattr(planning, "saved_profile", {"f" * 16: profile}.get)
    return planning.planned(file, config)


def test_layers_on_both_processors_have_to_pay(file, monkeypatch) -> None:
    taken = planned(file, monkeypatch, 2, GOOD)
    assert taken.mixed
    assert (taken.layers_on_gpu, taken.head_on_gpu) == (2, True)
    refused = planned(file, monkeypatch, 2, POOR)
    assert (refused.backend, refused.vram, refused.parts) == ("native", None, {})
    assert not refused.mixed
    assert "computing on the CPU" in refused.reason
    assert "hold 2 of 4 layers and the head" in refused.reason
    assert "of the CPU's time, which is not worth it" in refused.reason


def test_what_was_not_measured_or_was_asked_for_is_done(file, monkeypatch) -> None:
    assert planned(file, monkeypatch, 2, None).mixed
    assert planned(file, monkeypatch, 2, POOR, backend="cuda").mixed
    whole = planned(file, monkeypatch, 4, POOR)
    assert (whole.backend, whole.layers_on_gpu, whole.mixed) == ("cuda", 4, False)


def test_both_processors_parts_of_a_token_are_added_up(file) -> None:
    work = Work.of(file.tensors, read_config(file))
    cpu = predict.decode(work, Placement("native", "", layers=4), GOOD, 64).parts
    whole = Placement("cuda", "", layers=4, layers_on_gpu=4, head_on_gpu=True)
    gpu = predict.decode(work, whole, GOOD, 64).parts
    half = predict.decode(work, replace(whole, layers_on_gpu=2), GOOD, 64).parts
    for part in ("dense layers from RAM", "host and threads", "attention on the CPU"):
        assert half.get(part, 0) == pytest.approx(cpu.get(part, 0) / 2)
    assert half["short kernels"] == pytest.approx(gpu["short kernels"] / 2)
    assert half["host"] == predict.GPU_STEP_SECONDS
    assert "host" not in gpu  # a step is launched while the one before is computed
    assert "head from RAM" in cpu
    assert "head from RAM" not in half
    headless = predict.decode(work, replace(whole, head_on_gpu=False), GOOD, 64).parts
    assert headless["head from RAM"] == cpu["head from RAM"]
    assert headless["dense layers from VRAM"] < gpu["dense layers from VRAM"]


def test_plain_layers_are_launched_one_by_one(file) -> None:
    work = Work.of(file.tensors, read_config(file))
    place = Placement("cuda", "", layers=4, layers_on_gpu=3, head_on_gpu=True, prefill_chunk=256)
    found = predict.prefill(work, place, GOOD, 512).parts
    assert found["between layers"] == pytest.approx(2 * 3 * predict.PLAIN_LAYER_SECONDS)
    assert found["experts on the CPU"] > 0

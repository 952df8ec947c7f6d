"""At a budget that is just enough for a part, or a byte more, all that was planned can be booked:
weights, experts, the cache with blocks of any size, and the memory of captured steps."""

import os
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from greenroom import native
from greenroom.convert.synth import Synthesis, write_synthetic
from greenroom.convert.synth_shapes import shape_of
from greenroom.engine.config import EngineConfig, with_threads
from greenroom.engine.load import _decided, _options, assemble, planned
from greenroom.experts.shelf import Shelf
from greenroom.gguf import GGUFFile
from greenroom.models import load_model
from greenroom.models.registry import read_config
from greenroom.placement.hardware import Gpu, Hardware
from greenroom.placement.planner import Plan, Wish
from greenroom.placement.sizes import Sizes

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

GIB = 1 << 30
GPU = Hardware(Gpu("a GPU", 70 * GIB, 80 * GIB))
SHAPES = ("gpt-oss-20b", "deepseek-moe-16b", "qwen3-30b-a3b", "phi-3.5-moe")
wishes = st.fixed_dictionaries(
    {
        "max_sequences": st.sampled_from([1, 3, 32]),
        "block_size": st.sampled_from([16, 32, 48, 1024]),
        "kv_type": st.sampled_from(["f16", "f32"]),
        "prefix_ram": st.sampled_from([0, "1MiB"]),
    },
    optional={
        "context_length": st.sampled_from([64, 100, 4096, 5000]),
        "prefill_chunk": st.sampled_from([16, 100, 512]),
        "cache_tokens": st.sampled_from([5000, 5999]),
    },
)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder, found = tmp_path_factory.mktemp("synth"), []
    for name in SHAPES:
        path = folder / f"{name}.gguf"
        write_synthetic(Synthesis(shape_of(f"{name}-tiny", 3)), path)
        found.append((GGUFFile(path), Shelf()))
    yield found
    for file, _ in found:
        file.close()


def thresholds(file: GGUFFile, config: EngineConfig) -> list[int]:
    """Bytes that are just enough for something more."""
    model = read_config(file)
    sizes, layers = Sizes.of(file.tensors, model), model.layers
    plan = Plan(sizes, model, Wish(
        sequences=config.max_sequences, chunk=config.prefill_chunk, context=config.context_length,
        cache_tokens=config.cache_tokens, block_size=config.block_size,
        value_bytes=2 if config.kv_type == "f16" else 4,
    ))  # fmt: skip
    whole = plan.need(True, layers)
    staged = whole + 2 * sizes.slab + sizes.staged
    return [plan.need(True, 0), plan.need(True, layers - 1), whole, staged]


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, len(SHAPES) - 1),
    wishes,
    st.integers(0, 3),
    st.one_of(st.integers(0, 1), st.integers(0, 1 << 20), st.integers(0, 200 << 20)),
)
def test_what_is_planned_can_be_booked(files, which: int, wish: dict, at: int, more: int) -> None:
    file, shelf = files[which]
    config = EngineConfig(threads=1, **wish)
    config = replace(config, vram=thresholds(file, config)[at] + more)
    plan = planned(file, config, GPU)
    assert plan.backend == "cuda"
    config = with_threads(_decided(config, plan))
    shelf.open(file.path)
    options = _options(file, config, plan, shelf, None)
    model = load_model(file, replace(options, device=DEVICE, pool=native.lib().Pool(1)))
    engine = assemble(model, None, config, None, plan.cache_room)
    engine.close()
    assert engine.config.context_length == config.context_length
    ledger = next(backend for backend in model.backends if backend.tier).bench.ledger
    ledger.book("graphs", plan.parts.get("graphs", 0))
    assert ledger.used <= plan.lasting <= config.vram

"""A closed engine holds no memory, whoever still holds the engine."""

import asyncio
import gc
import os
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from greenroom.convert.synth import Synthesis, write_synthetic
from greenroom.convert.synth_shapes import shape_of
from greenroom.engine import LLM, EngineConfig, SamplingParams
from greenroom.engine.engine import Engine
from greenroom.engine.load import assemble, load_engine
from greenroom.errors import EngineClosedError
from greenroom.gguf import GGUFFile
from greenroom.models import LoadOptions, load_model
from greenroom.server import ServerSettings
from greenroom.server.registry import Registry
from greenroom.server.served import Served
from greenroom.server.source import ModelSource

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS: dict[str, dict[str, Any]] = {
    "reference": {"backend": "reference"},
    "native": {"backend": "native", "threads": 1},
    "cuda": {
        "backend": "cuda", "device": DEVICE, "threads": 1, "slot_bytes": 1 << 20,
        "staging_bytes": 2 << 20, "scratch_bytes": 1 << 20,
    },
    "mixed": {
        "backend": "cuda", "device": DEVICE, "threads": 1, "layers_on_gpu": 1,
        "scratch_bytes": 1 << 20,
    },
}  # fmt: skip
LETTERS = SimpleNamespace(
    eog_ids=frozenset(), encode=lambda text, add_special: [1, 2, 3],
    stream=lambda context: SimpleNamespace(push=chr, flush=str),
)  # fmt: skip
PARAMS = SamplingParams(max_tokens=2, temperature=0, ignore_eos=True)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_synthetic(Synthesis(shape_of("gpt-oss-20b-tiny", 2)), tmp_path / "model.gguf")
    return tmp_path / "model.gguf"


def opened(path: Path, options: dict[str, Any]) -> tuple[LLM, list[weakref.ref[Any]]]:
    """A model, and what must go with it."""
    with GGUFFile(path) as file:
        model = load_model(file, LoadOptions(**options))
    config = EngineConfig(
        context_length=64, max_sequences=1, prefill_chunk=64, block_size=4, prefix_ram="1M",
        cache_tokens=64,
    )  # fmt: skip
    engine = assemble(model, LETTERS, config)
    parts: list[Any] = [model, engine._blocks.store, engine._runner.caches[0].k, model.output]
    parts += [blk.ffn.experts for blk in model.blk]
    if "slot_bytes" in options:
        tiers = model.backend.tiers
        parts += [tiers.slots.arenas[0].memory, model.blk[0].ffn.experts.stream]
        parts += [blk.ffn.experts.cpu for blk in model.blk]
    return LLM.from_engine(engine), [weakref.ref(part) for part in parts]


@pytest.mark.parametrize("name", BACKENDS)
def test_closing_frees_weights_and_caches_at_once(path: Path, name: str) -> None:
    llm, parts = opened(path, BACKENDS[name])
    assert all(part() is not None for part in parts)
    if "device" not in BACKENDS[name] or DEVICE == "cuda":  # a minute in the interpreter
        llm.generate([[5] * 40, [6] * 40], PARAMS)  # long and short steps, prefixes kept
    gc.collect()
    gc.disable()
    try:
        llm.close()
        assert [part() for part in parts] == [None] * len(parts)
    finally:
        gc.enable()
    assert llm.engine.stats()["memory"] == {}


def test_a_closed_model_says_so(path: Path) -> None:
    with LLM(path, vram=0, threads=1, context_length=64) as llm:
        assert llm.generate([[5]], PARAMS)
    calls = [
        lambda: llm.generate([[5]], PARAMS), lambda: list(llm.stream([5], PARAMS)),
        lambda: llm.logits([5]), lambda: llm.embed([5]), lambda: llm.engine.model,
        lambda: llm.engine.meter(),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(EngineClosedError, match=r"^the engine was closed$"):
            call()
    llm.close()


def test_vram_goes_back_to_the_driver_when_nothing_is_left_in_it(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm, parts = opened(path, BACKENDS["native"])
    seen: list[Any] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: seen.extend(p() for p in parts))
    llm.close()
    assert seen == [None] * len(parts)


def test_a_server_that_unloads_a_model_frees_it_while_answers_still_know_it(path: Path) -> None:
    parts: list[weakref.ref[Any]] = []

    def load(source: ModelSource) -> Engine:
        engine = load_engine(path, EngineConfig(vram=0, threads=1, context_length=64))
        parts.extend(weakref.ref(part) for part in (engine.model, engine._runner.caches[0].k))
        return engine

    async def serve() -> Served:
        registry = Registry([ModelSource("tiny", path)], load, ServerSettings())
        served = await registry.lease("tiny")
        assert all(part() is not None for part in parts)
        registry.release(served)
        await registry.unload(served)
        return served

    served = asyncio.run(serve())
    assert served.engine.config.context_length == 64
    assert [part() for part in parts] == [None, None]


def test_an_engine_that_stopped_by_itself_holds_nothing_either(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm, parts = opened(path, BACKENDS["native"])

    def broken(*_: Any) -> Any:
        raise RuntimeError("lost")

    monkeypatch.setattr(llm.engine._scheduler, "schedule", broken)
    with pytest.raises(EngineClosedError, match="stopped after an error: lost"):
        llm.generate([[5]], PARAMS)
    llm.engine._thread.join(20)
    gc.collect()  # errors hold the frames they came through
    assert [part() for part in parts] == [None] * len(parts)

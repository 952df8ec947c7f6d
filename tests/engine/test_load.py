"""What is decided before a model is loaded."""

import threading
import time
from types import SimpleNamespace

import pytest
import torch

from greenroom.convert.synth import Synthesis, write_synthetic
from greenroom.convert.synth_shapes import shape_of
from greenroom.engine.config import EngineConfig, resolve
from greenroom.engine.load import _session, load_engine
from greenroom.errors import BudgetError, NativeError, TokenizerError
from greenroom.models.config import ModelConfig


def config_of(name: str) -> ModelConfig:
    job = Synthesis(shape_of(name))
    tensors = {s.name: SimpleNamespace(shape=s.shape, ne=s.shape[::-1]) for s in job.specs()}
    return ModelConfig.from_metadata(job.metadata(), tensors)


@pytest.mark.parametrize("free", [3 << 30, 80 << 30])
def test_longrope_knows_its_context_before_loading(monkeypatch, free: int) -> None:
    monkeypatch.setattr("greenroom.engine.load.available_memory", lambda: free + (1 << 30))
    monkeypatch.setattr("greenroom.engine.config.available_memory", lambda: free)
    model = config_of("phi-3.5-moe")
    file = SimpleNamespace(nbytes=1 << 30)
    early = _session(EngineConfig(), model, file).context_length
    block = 32 * model.cache_bytes(2)
    assert early == resolve(EngineConfig(), model.context_length, [None], [block]).context_length
    # 128 KiB a token: a quarter of 3 GiB holds 6144 tokens, one of 80 GiB all of them.
    assert (early == model.context_length) == (free == 80 << 30)


def test_a_context_that_was_asked_for_or_changes_no_weight_is_left_alone() -> None:
    asked = EngineConfig(context_length=100)
    assert _session(asked, config_of("phi-3.5-moe"), SimpleNamespace(nbytes=1)) is asked
    free = EngineConfig()
    assert _session(free, config_of("gpt-oss-20b"), SimpleNamespace(nbytes=1)) is free


def test_a_short_session_takes_the_short_table(tmp_path) -> None:
    path = tmp_path / "model.gguf"
    write_synthetic(Synthesis(shape_of("phi-3.5-moe-tiny", 1)), path)
    tables = []
    for context in (4096, 4097):
        engine = load_engine(path, EngineConfig(context_length=context, vram=0, threads=1,
                                                max_sequences=1))  # fmt: skip
        tables.append(engine.model.rope.frequencies)
        engine.close()
    assert (tables[0] >= tables[1]).all()
    assert (tables[0] > tables[1]).any()


def test_ram_that_was_named_is_enough_or_refused_with_what_is(tmp_path, monkeypatch) -> None:
    path = tmp_path / "model.gguf"
    write_synthetic(Synthesis(shape_of("gpt-oss-20b-tiny", 1)), path)
    common = {"vram": 0, "threads": 1, "max_sequences": 1, "context_length": 64}
    with pytest.raises(BudgetError, match="ram is 1 MiB") as caught:
        load_engine(path, EngineConfig(ram="1MiB", **common))
    needed = int(str(caught.value).split(" need ")[1].split()[0])
    engine = load_engine(path, EngineConfig(ram=needed << 20, **common))
    memory = engine.stats()["memory"]
    engine.close()
    assert sum(memory.values()) - memory["kv_cache"] <= needed << 20


def test_a_model_beyond_the_free_ram_stays_in_its_file(tmp_path, monkeypatch, caplog) -> None:
    path = tmp_path / "model.gguf"
    write_synthetic(Synthesis(shape_of("gpt-oss-20b-tiny", 1)), path)
    monkeypatch.setattr("greenroom.engine.load.available_memory", lambda: 1 << 20)
    engine = load_engine(path, EngineConfig(vram=0, threads=1, context_length=64))
    experts = engine.stats()["memory"]["experts"]
    engine.close()
    assert experts == 0
    assert "stay in the mapped file" in caplog.text


def test_vram_that_runs_out_while_loading_is_one_line(tmp_path, monkeypatch) -> None:
    path = tmp_path / "m.gguf"
    write_synthetic(Synthesis(shape_of("gpt-oss-20b-tiny")), path)

    def none(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("greenroom.models.load_model", none)
    with pytest.raises(BudgetError, match=r"m\.gguf: VRAM ran out while loading"):
        load_engine(path)


def test_threads_that_cannot_be_started_are_one_line(tmp_path, monkeypatch) -> None:
    path = tmp_path / "m.gguf"
    write_synthetic(Synthesis(shape_of("gpt-oss-20b-tiny", 1)), path)

    def none(_: int) -> None:
        raise RuntimeError("Resource temporarily unavailable")

    monkeypatch.setattr("greenroom.layers.native_ops._lib", SimpleNamespace(Pool=none))
    with pytest.raises(NativeError, match="1000 threads cannot be started"):
        load_engine(path, EngineConfig(vram=0, threads=1000))


def test_a_context_beyond_the_models_own_is_said(tmp_path, caplog) -> None:
    path = tmp_path / "m.gguf"
    write_synthetic(Synthesis(shape_of("gpt-oss-20b-tiny", 1)), path)
    own = config_of("gpt-oss-20b-tiny").context_length
    for context in (own, own + 1):
        assert "was made for" not in caplog.text
        settings = {"vram": 0, "threads": 1, "max_sequences": 1, "context_length": context}
        load_engine(path, EngineConfig(**settings)).close()
    assert f"{own + 1} tokens was asked for, but the model was made for {own}" in caplog.text


def test_an_error_in_the_vocabulary_ends_the_loading_of_weights(tmp_path, monkeypatch) -> None:
    path = tmp_path / "m.gguf"
    write_synthetic(Synthesis(shape_of("gpt-oss-20b-tiny", 1)), path)
    failed = threading.Event()

    def from_gguf(file):
        failed.set()
        raise TokenizerError("no such tokenizer")

    seen = []

    def progress(done: int, total: int) -> None:
        assert failed.wait(60)
        seen.append(done / total)
        time.sleep(0.01)  # what runs beside is over by the next call

    monkeypatch.setattr("greenroom.engine.load.Tokenizer.from_gguf", from_gguf)
    with pytest.raises(TokenizerError, match="no such tokenizer"):
        load_engine(path, EngineConfig(vram=0, threads=1), progress)
    assert not seen or seen[-1] < 1


def test_an_interrupt_while_loading_leaves_no_thread(tmp_path) -> None:
    path = tmp_path / "m.gguf"
    write_synthetic(Synthesis(shape_of("gpt-oss-20b-tiny", 1)), path)
    before = set(threading.enumerate())

    def progress(done: int, total: int) -> None:
        if 2 * done > total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load_engine(path, EngineConfig(vram=0, threads=1), progress)
    assert set(threading.enumerate()) == before


def test_an_interrupt_while_a_gpu_is_prepared_leaves_no_thread(tmp_path, monkeypatch) -> None:
    path = tmp_path / "m.gguf"
    write_synthetic(Synthesis(shape_of("gpt-oss-20b-tiny", 1)), path)
    before = set(threading.enumerate())

    def load_model(file, options):
        options.preparing()

    def preparing() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("greenroom.models.load_model", load_model)
    with pytest.raises(KeyboardInterrupt):
        load_engine(path, EngineConfig(vram=0, threads=1), preparing=preparing)
    assert set(threading.enumerate()) == before


def test_an_interrupt_while_speed_is_measured_leaves_no_thread(tmp_path, monkeypatch) -> None:
    path = tmp_path / "m.gguf"
    write_synthetic(Synthesis(shape_of("gpt-oss-20b-tiny", 1)), path)
    before = set(threading.enumerate())

    def rehearse(model) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("greenroom.models.model.Model.rehearse", rehearse)
    with pytest.raises(KeyboardInterrupt):
        load_engine(path, EngineConfig(vram=0, threads=1))
    assert set(threading.enumerate()) == before

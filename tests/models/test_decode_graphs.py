"""What CUDA graphs rest on, without a GPU: a step with widened tables and its last rows computed
for all gives the logits of the plain step; and which steps are taken."""

import os
from types import SimpleNamespace

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from dataclasses import replace

from greenroom.experts.rendezvous import RendezvousCourier
from greenroom.layers.decode_graphs import DecodeGraphs, context_range, is_decode, widened

from .conftest import Loader
from .hf_export import VOCABULARY
from .sessions import Session, prompt

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_ranges_of_contexts() -> None:
    assert [context_range(n) for n in (1, 512, 513, 2048, 2049, 40000)] == [
        512, 512, 2048, 2048, 8192, 131072,
    ]  # fmt: skip


@pytest.mark.parametrize("case", ["gpt-oss", "deepseek"])
def test_a_recordable_step_equals_the_plain_one(load: Loader, case: str) -> None:
    _, model = load(case, backend="cuda", device=DEVICE)
    session = Session(model, sequences=2)
    prompts = [prompt(i, length, VOCABULARY) for i, length in enumerate((9, 5))]
    chunk = session.batch([(0, prompts[0]), (1, prompts[1])])
    assert not is_decode(chunk)
    model.forward(chunk, session.caches)
    batch = session.batch([(0, [3]), (1, [7])])
    assert is_decode(batch)
    plain = model.forward(batch, session.caches)
    wide = widened(batch, 128)
    assert all(group.block_tables.shape == (2, 128) for group in wide.groups)
    step = replace(model.backend.step(wide, model.rope), longest=512)
    with torch.inference_mode():
        found = model._compute(model._embed(batch.tokens), step, session.caches)
    torch.testing.assert_close(found, plain, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("case", ["gpt-oss", "deepseek"])
def test_a_step_that_meets_the_cpu_equals_one_that_waits(load: Loader, case: str) -> None:
    _, model = load(case, seed=2, backend="cuda", device=DEVICE)
    session = Session(model, sequences=2)
    chunk = session.batch([(0, prompt(0, 9, VOCABULARY)), (1, prompt(1, 5, VOCABULARY))])
    model.forward(chunk, session.caches)
    batch = session.batch([(0, [3]), (1, [7])])
    step = model.backend.step(batch, model.rope)
    courier = model.backend._courier = RendezvousCourier(torch.device(DEVICE))
    with torch.inference_mode():
        for blk in model.blk:
            if hasattr(blk.ffn, "experts"):
                blk.ffn.experts._courier = courier
        plain = model._compute(model._embed(batch.tokens), step, session.caches)
        assert not model.waits
        with model.backend.recording(), model.backend.answering(2):
            found = model._compute(model._embed(batch.tokens), step, session.caches)
    assert torch.equal(found, plain)


def test_nothing_is_recorded_without_a_gpu_or_for_long_steps(load: Loader) -> None:
    backend = SimpleNamespace(device=torch.device("cpu"))
    graphs = DecodeGraphs(backend, None)
    assert not graphs.usable
    _, model = load("deepseek", backend="cuda", device=DEVICE)
    assert model.waits == (DEVICE == "cpu")  # for experts in RAM
    batch = Session(model).batch([(0, [1])])
    assert graphs(batch, [], model._embed, model._compute) is None

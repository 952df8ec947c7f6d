"""The routes a model reports: the same whatever the backend and however the text was cut."""

import numpy as np
import pytest
import torch

from greenroom.experts.trace import NOBODY, Trace, TraceRecorder
from greenroom.models import Model

from .cases import CASES
from .conftest import Loader
from .hf_export import VOCABULARY
from .sessions import Session, prompt

LENGTH = 21


def recorded(model: Model, chunks: list[int], last_only: bool = False) -> Trace:
    tokens = prompt(5, LENGTH, VOCABULARY)
    recorder = TraceRecorder(model.moe_layers, model.config.moe.experts)
    session, done = Session(model), 0
    model.record(recorder)
    for size in chunks:
        session.step([(0, tokens[done : done + size])], last_only)
        done += size
    model.record(None)
    session.step([(0, [1])])
    return recorder.trace("tiny")


@pytest.mark.parametrize("case", ["gpt-oss", "deepseek-dense2", "qwen2moe", "grin-moe"])
def test_backends_and_chunks_agree(load: Loader, case: str) -> None:
    traces = []
    for backend in ("reference", "native"):
        _, model = load(case, backend=backend)
        traces += [recorded(model, [LENGTH]), recorded(model, [4, 9, 1, 1, 6])]
    first = traces[0]
    assert first.tokens == LENGTH
    assert first.layers == model.moe_layers
    assert first.selected == model.config.moe.used
    assert (first.routes != NOBODY).all()
    assert first.starts.tolist() == [0]
    assert len(np.unique(first.routes)) > 1
    for other in traces[1:]:
        np.testing.assert_array_equal(np.sort(other.routes), np.sort(first.routes))


def test_the_last_layer_reports_what_it_computed(load: Loader) -> None:
    assert "gpt-oss" in CASES
    _, model = load("gpt-oss")
    whole, part = recorded(model, [LENGTH]), recorded(model, [LENGTH], last_only=True)
    np.testing.assert_array_equal(part.routes[:, :-1], whole.routes[:, :-1])
    assert (part.routes[:-1, -1] == NOBODY).all()
    np.testing.assert_array_equal(part.routes[-1, -1], whole.routes[-1, -1])


def test_routes_are_the_routers(load: Loader) -> None:
    _, model = load("gpt-oss")
    block, seen = model.blk[0].ffn, []
    original = block.router

    def spy(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ids, weights = original(hidden)
        seen.append(ids.clone())
        return ids, weights

    block.router = spy
    try:
        found = recorded(model, [LENGTH])
    finally:
        block.router = original
    np.testing.assert_array_equal(found.routes[:, 0], seen[0].numpy())

"""What CUDA graphs rest on, without a GPU: a step with widened tables and its last rows computed
for all gives the logits of the plain step; and which steps are taken."""

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from dataclasses import replace

from greenroom.experts.rendezvous import RendezvousCourier
from greenroom.layers.choice import likeliest
from greenroom.layers.decode_graphs import (
    DecodeGraphs,
    Recorded,
    context_range,
    fill,
    is_decode,
    reading,
    widened,
)
from greenroom.layers.ledger import Ledger
from greenroom.layers.staging import Staging

from .conftest import Loader
from .hf_export import VOCABULARY
from .sessions import Session, one_pass, prompt, relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
stand_ins = pytest.mark.skipif(
    DEVICE == "cuda", reason="a GPU records real graphs: tests/needs/gpu/test_look_ahead.py"
)


def embedded(model: Any, batch: Any) -> torch.Tensor:
    return model.token_embd.rows(batch.tokens).to(DEVICE)


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
        found = model._compute(embedded(model, batch), step, session.caches)
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
        plain = model._compute(embedded(model, batch), step, session.caches)
        assert not model.waits
        with model.backend.recording(), model.backend.answering(2):
            found = model._compute(embedded(model, batch), step, session.caches)
    assert torch.equal(found, plain)


def test_nothing_is_recorded_without_a_gpu_or_for_long_steps(load: Loader) -> None:
    backend = SimpleNamespace(device=torch.device("cpu"))
    graphs = DecodeGraphs(backend, None)
    assert not graphs.usable
    _, model = load("deepseek", backend="cuda", device=DEVICE)
    assert model.waits == (DEVICE == "cpu")  # for experts in RAM
    batch = Session(model).batch([(0, [1])])
    assert graphs(batch, [], model.lead, model._compute) is None


def test_graphs_that_are_given_up_are_not_booked_any_more() -> None:
    ledger = Ledger(torch.device("cpu"), 100)
    backend: Any = SimpleNamespace(device=torch.device("cpu"), bench=SimpleNamespace(ledger=ledger))
    graphs = DecodeGraphs(backend, None)
    for _ in range(3):  # as often as memory runs out in a step
        ledger.book("graphs", 60)
        graphs._graphs[1, 512] = SimpleNamespace()  # type: ignore[assignment]
        graphs.clear()
    assert (ledger.used, len(graphs._graphs)) == (0, 0)


class Replays(DecodeGraphs):
    """Records a step as the call it is; what it reads and writes stays in one place."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.usable, self.replays = True, 0

    def _capture(self, inputs: Any, step: Any, compute: Any, chosen: Any) -> Recorded:
        staging = Staging(torch.device(DEVICE), inputs)
        fixed = reading(step, staging)
        logits = compute(staging.there[0], fixed)
        chosen.copy_(likeliest(logits))

        def replay() -> None:
            self.replays += 1
            logits.copy_(compute(staging.there[0], fixed))
            chosen.copy_(likeliest(logits))

        return Recorded(SimpleNamespace(replay=replay), staging, step, logits, chosen)


@stand_ins
def test_replayed_steps_give_the_logits_of_plain_ones(load: Loader) -> None:
    """Two sequences, contexts of different lengths, inputs that change from step to step."""
    _, model = load("gpt-oss", backend="cuda", device=DEVICE)
    session = Session(model, sequences=2)
    prompts = [prompt(i, length, VOCABULARY) for i, length in enumerate((9, 5))]
    model.forward(session.batch([(0, prompts[0]), (1, prompts[1])]), session.caches)
    graphs = Replays(model.backend, model.rope)
    with torch.inference_mode():
        for token in range(5):
            batch = session.batch([(0, [3 + token]), (1, [7 * token])])
            arguments = batch, session.caches, model.lead
            assert graphs.replay(*arguments) is None or token > 2
            found = graphs(*arguments, model._compute)
            assert (found is None) == (token < 2)
            plain = model.forward(batch, session.caches)
            if found is not None:
                torch.testing.assert_close(found, plain, atol=1e-5, rtol=1e-4)
        assert graphs.replays == 2 * 2  # by both calls
        later = session.batch([(0, [1]), (1, [2])])
        graphs.prepare(later, session.caches)
        again = graphs.replay(*arguments)  # another batch than the one prepared
        assert again is not None
        assert again.likeliest.tolist() == plain.argmax(-1).tolist()
        graphs.prepare(later, session.caches)
        later.tokens[:] = torch.tensor([11, 12])  # they are not known until now
        after = graphs.replay(later, session.caches, model.lead)
        assert after is not None
        plain = model.forward(later, session.caches)
        torch.testing.assert_close(after.logits, plain, atol=1e-5, rtol=1e-4)
        assert graphs.replay(batch, list(session.caches), model.lead) is None


@stand_ins
def test_a_step_goes_on_with_tokens_the_host_has_not_seen(load: Loader) -> None:
    """A chain of steps that is told no token after the first, against steps that are told all."""
    _, model = load("gpt-oss", seed=3, backend="cuda", device=DEVICE)
    session = Session(model, sequences=2)
    prompts = [prompt(i, length, VOCABULARY) for i, length in enumerate((9, 5))]
    first = session.batch([(0, prompts[0]), (1, prompts[1])], last_only=True)
    tokens = model.forward(first, session.caches).argmax(-1)
    graphs = Replays(model.backend, model.rope)
    chosen: list[torch.Tensor | None] = [None]
    with torch.inference_mode():
        for step in range(8):
            batch = session.batch([(i, [token]) for i, token in enumerate(tokens.tolist())])
            logits = model.forward(batch, session.caches)
            tokens = logits.argmax(-1)
            arguments = batch, session.caches, model.lead
            if step < 3:
                graphs(*arguments, model._compute)
                continue
            if chosen[-1] is not None:
                batch.tokens[:] = 0
            found = graphs.replay(*arguments, chosen[-1])
            assert found is not None
            torch.testing.assert_close(found.logits, logits, atol=1e-5, rtol=1e-4)
            # Left by the graph itself, or drawn and elsewhere.
            chosen.append(found.likeliest.clone() if step == 5 else found.likeliest)
    assert graphs.replays == 5


PARTS = [("gpt-oss", 1, True), ("deepseek", 1, False), ("gpt-oss", 0, True), ("deepseek", 2, False)]


@stand_ins
@pytest.mark.parametrize(("case", "layers", "head"), PARTS)
def test_what_follows_the_layers_in_ram_is_replayed(
    load: Loader, monkeypatch: pytest.MonkeyPatch, case: str, layers: int, head: bool
) -> None:
    """Prompt, plain steps and replayed ones of two sequences, against the reference."""
    _, wanted = load(case)
    split = {"layers_on_gpu": layers, "head_on_gpu": head}
    _, model = load(case, backend="cuda", device=DEVICE, **split)
    device = model.lead.device
    assert (model.lead.layers, device.tier) == (len(model.blk) - layers, ".vram")
    assert model.graphs is None  # without a GPU
    monkeypatch.setattr(model, "graphs", graphs := Replays(device, model.rope))
    monkeypatch.setattr(type(model), "waits", False)  # experts answer in the stand-in
    prompts = [prompt(i, length, VOCABULARY) for i, length in enumerate((5, 3))]
    sessions = [Session(m, sequences=2) for m in (wanted, model)]
    for session in sessions:
        session.step([(0, prompts[0]), (1, prompts[1])])
    for token in range(4):
        right, found = (s.step([(0, [3 + token]), (1, [7 * token])]) for s in sessions)
        assert relative_error(found, right) < 1e-4
    assert graphs.replays == 1
    batch = sessions[1].batch([(0, [1]), (1, [2])])
    with torch.inference_mode():
        launched = model.launch(batch, sessions[1].caches)
    assert (launched is not None) == head  # else the host has still to do
    right = sessions[0].step([(0, [1]), (1, [2])])
    if launched is not None:
        assert relative_error(launched.logits, right) < 1e-4
        assert launched.likeliest.tolist() == right.argmax(-1).tolist()
    assert not model.chains


@stand_ins
def test_a_mixed_step_that_cannot_be_recorded_is_computed_plainly(
    load: Loader, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _, wanted = load("gpt-oss")
    _, model = load("gpt-oss", backend="cuda", device=DEVICE, layers_on_gpu=1)
    graphs = Replays(model.lead.device, model.rope)

    def fails(*arguments: Any) -> Recorded:
        raise RuntimeError("no memory for it")

    monkeypatch.setattr(graphs, "_capture", fails)
    monkeypatch.setattr(model, "graphs", graphs)
    monkeypatch.setattr(type(model), "waits", False)
    tokens = prompt(4, 6, VOCABULARY)
    session = Session(model)
    found = torch.cat([session.step([(0, [token])]) for token in tokens])
    assert relative_error(found, one_pass(wanted, tokens)) < 1e-4
    assert not graphs.usable
    assert caplog.text.count("decoding without CUDA graphs") == 1


def test_tables_narrower_than_their_place_are_filled_up() -> None:
    wide = torch.tensor([[5, 6, 7], [8, 9, 1]], dtype=torch.int32)
    slots = torch.tensor([4, 5])
    staging = Staging(torch.device("cpu"), [wide, slots])
    fill(staging.here, [torch.tensor([[1, 2], [3, 4]], dtype=torch.int32), slots + 1])
    assert [part.tolist() for part in staging.there] == [wide.tolist(), slots.tolist()]
    staging.send()
    assert staging.there[0].tolist() == [[1, 2, -1], [3, 4, -1]]
    assert staging.there[1].tolist() == [5, 6]
    assert all(part.data_ptr() % 16 == 0 for part in staging.there)
    staging.here[1][:] = 9  # written while the last ones travel
    assert staging.there[1].tolist() == [5, 6]
    staging.send()
    assert staging.there[1].tolist() == [9, 9]

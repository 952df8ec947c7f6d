"""Experts in slots and streamed experts in whole models: the answers stay those of the CPU."""

import os

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from greenroom.experts import resident as resident_mlp
from greenroom.experts import slots as slots_module
from greenroom.experts.limits import BESIDE_STAGED, FEW_ROWS
from greenroom.experts.share import Rates
from greenroom.experts.trace import Trace

from .conftest import Loader
from .hf_export import VOCABULARY
from .sessions import Session, one_pass, prompt, relative_error

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
CLOSE = 2e-2 if GPU else 3e-3  # streamed experts round both factors to 11 bits


def with_tiers(load: Loader, case: str, share: float, staged: int):
    """(reference, cuda model with a share of the experts in slots and `staged` staging slabs)."""
    _, wanted = load(case)
    _, plain = load(case, backend="cuda", device=DEVICE)
    banks = [blk.ffn.experts.cpu for blk in plain.blk if hasattr(blk.ffn, "experts")]
    slab = max(bank.layout.nbytes for bank in banks)
    numbers = 2 * max(bank.layout.d * bank.layout.f for bank in banks)
    everything = sum(bank.nbytes for bank in banks)
    options = {"slot_bytes": int(everything * share)}
    if staged:
        table = BESIDE_STAGED * max(bank.experts for bank in banks)
        options["staging_bytes"] = 2 * numbers + staged * slab + table
    _, model = load(case, backend="cuda", device=DEVICE, **options)
    streams = [b.ffn.experts.stream for b in model.blk if hasattr(b.ffn, "experts")]
    assert all((stream is not None) == bool(staged) for stream in streams)
    return wanted, model


@pytest.fixture
def expanded(monkeypatch) -> None:
    """Matrices are expanded first, however few rows: the interpreter takes much less time."""
    monkeypatch.setattr(resident_mlp, "FEW_ROWS", 0)


@pytest.mark.parametrize(
    ("case", "share", "few"), [("gpt-oss", 0.5, FEW_ROWS), ("deepseek", 1.0, 0)]
)
def test_slots_and_stream_equal_the_reference(
    load: Loader, monkeypatch, case: str, share: float, few: int
) -> None:
    monkeypatch.setattr(resident_mlp, "FEW_ROWS", few)  # 0: matrices are expanded first
    wanted, model = with_tiers(load, case, share, staged=2)
    resident = model.backend.tiers.slots.resident
    everywhere = (model.backend.tiers.slots.seats != -1).mean()
    crosses = [blk.ffn.experts.crosses for blk in model.blk if hasattr(blk.ffn, "experts")]
    assert any(crosses) == (everywhere < 1)  # a step asks the CPU only where a slot is missing
    assert model.waits == (any(crosses) and not GPU)
    assert 0.3 * share < everywhere <= share
    assert resident.sum() > 0
    tokens = prompt(4, 42, VOCABULARY)
    session, start, parts = Session(model), 0, []
    for size in (37, 4, 1):  # streamed, then by CPU and slots
        parts.append(session.step([(0, tokens[start : start + size])]).cpu())
        start += size
        model.step_done(size)
    model.step_done(1)
    assert relative_error(torch.cat(parts), one_pass(wanted, tokens)) < CLOSE
    found = model.expert_stats()
    k, layers = model.config.moe.used, len(model.moe_layers)
    # The last layer computes only the rows whose logits are wanted; here all of them.
    assert found["hits"] + found["misses"] == k * layers * 42
    assert found["hits"] > 0
    assert (found["misses"] == 0) == (share == 1.0)
    assert np.array(found["heat"]).max() == 1


@pytest.mark.parametrize("few", [0, FEW_ROWS])
def test_a_stream_without_slots_copies_what_is_routed(load: Loader, monkeypatch, few: int) -> None:
    monkeypatch.setattr(resident_mlp, "FEW_ROWS", few)
    wanted, model = with_tiers(load, "qwen3moe", 0.0, staged=3)
    tokens = prompt(7, 34, VOCABULARY)
    assert relative_error(one_pass(model, tokens).cpu(), one_pass(wanted, tokens)) < CLOSE
    stream = next(b.ffn.experts.stream for b in model.blk if hasattr(b.ffn, "experts"))
    assert stream.ring.copied_bytes > 0
    assert not stream.ring.staged


@pytest.mark.usefixtures("expanded")
@pytest.mark.parametrize("reading", [1e3, 1e11, 1e18])
def test_the_cpu_takes_its_share_of_a_long_step(load: Loader, reading: float) -> None:
    """From nothing to nearly everything; the result stays the reference's."""
    wanted, model = with_tiers(load, "gpt-oss", 0.0, staged=2)
    share = model.backend.tiers.share
    usual = share.rates, share.meeting, share.route
    share.rates, share.meeting, share.route = Rates(50e9, reading, 1e18), 0.0, 0.0
    tokens = prompt(9, 34, VOCABULARY)
    ring = model.blk[0].ffn.experts.stream.ring
    before = ring.copied_bytes  # models are shared by tests
    try:
        assert relative_error(one_pass(model, tokens).cpu(), one_pass(wanted, tokens)) < CLOSE
    finally:
        share.rates, share.meeting, share.route = usual
    copied = ring.copied_bytes - before
    everything = sum(blk.ffn.experts.nbytes for blk in model.blk)
    assert not ring.staged
    if reading == 1e3:
        assert copied == everything
    if reading == 1e18:  # what was copied is what was staged ahead
        assert 0 < copied < everything


def fetched(model, streams) -> list[tuple[int, tuple[int, ...], int]]:
    """Layer and experts of each page that a long step copies, and how many layers' routes were
    known by then."""
    ring, found, routed = streams[0].ring, [], []
    fetch, tokens = ring.fetch, prompt(9, 34, VOCABULARY)

    def note(layer: int, experts: tuple[int, ...]) -> None:
        found.append((layer, experts, len(routed)))
        fetch(layer, experts)

    session = Session(model)
    ring.fetch = note
    model.record(type("Routes", (), {"begin": lambda *_: 0, "add": lambda *a: routed.append(a)})())
    try:
        session.step([(0, tokens)])
    finally:
        model.record(None)
        del ring.fetch
    assert not ring.staged
    return found


@pytest.mark.usefixtures("expanded")
def test_a_long_step_copies_ahead_but_not_for_the_last_layer(load: Loader) -> None:
    """The first layer's pages set off before its routes are known, the last one's after."""
    _, model = with_tiers(load, "gpt-oss", 0.0, staged=2)
    streams = [blk.ffn.experts.stream for blk in model.blk]
    pages = fetched(model, streams)
    firsts = [next(seen for at, _, seen in pages if at == layer) for layer in range(len(streams))]
    assert firsts[0] == 0
    assert firsts[1:-1] == list(range(1, len(streams) - 1))
    assert firsts[-1] == len(streams)


@pytest.mark.usefixtures("expanded")
def test_who_is_seldom_wanted_does_not_set_off_before_it_is_asked_for(load: Loader) -> None:
    _, model = with_tiers(load, "gpt-oss", 0.0, staged=2)
    streams = [blk.ffn.experts.stream for blk in model.blk]
    demand, experts = streams[0]._demand, streams[0].cpu.experts
    kept = demand._chance.copy()  # models are shared by tests
    demand.count([0] + [100] * (experts - 1))
    try:
        pages = [page for page in fetched(model, streams) if page[0] == 0]
    finally:
        demand._chance[:] = kept
    early = [e for _, page, seen in pages for e in page if not seen]
    assert 0 not in early
    assert len(early) > 0
    assert 0 in [e for _, page, seen in pages for e in page if seen]


@pytest.mark.usefixtures("expanded")
def test_answers_stay_the_same_after_thousands_of_promotions(load: Loader) -> None:
    wanted, model = with_tiers(load, "gpt-oss", 0.5, staged=0)
    slots = model.backend.tiers.slots
    tokens = prompt(8, 5, VOCABULARY)
    truth = one_pass(wanted, tokens)
    rng = np.random.default_rng(0)
    for _ in range(1200):
        for arena in slots.arenas:
            arena.residency.warm(1000 * rng.random(arena.residency.heat.shape))
        slots.advance(4)
        if DEVICE == "cuda":
            torch.cuda.synchronize()  # else most copies are still under way
        held = slots.seats[slots.seats >= 0]
        assert len(np.unique(held)) == len(held)
    assert slots.stats["promotions"] > 2000
    assert torch.equal(slots.table.cpu(), torch.from_numpy(slots.seats))
    assert relative_error(one_pass(model, tokens).cpu(), truth) < CLOSE


@pytest.mark.usefixtures("expanded")
def test_answers_stay_the_same_while_many_are_promoted(load: Loader, monkeypatch) -> None:
    """Nobody waits for the copies: on a GPU they are under way beside the steps after a prompt."""
    wanted, model = with_tiers(load, "gpt-oss", 0.5, staged=2)
    slots = model.backend.tiers.slots
    for name, value in {"BURST": 1e3, "BURST_BYTES": 6 * slots.arenas[0].slab}.items():
        monkeypatch.setattr(slots_module, name, value)
    monkeypatch.setattr(slots, "bus", 1e12)
    monkeypatch.setattr(slots, "_bursts", True)
    monkeypatch.setattr(slots_module, "EVERY", 1 << 30)
    monkeypatch.setattr(slots.check, "moves", slots_module.MOVES)  # models are shared by tests
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    slots.advance(0)  # another test's promotion may be under way
    tokens, parts, start = prompt(8, 37, VOCABULARY), [], 0
    session, before = Session(model), slots.stats["promoted_bytes"]
    for size in (33, 1, 1, 1, 1):
        parts.append(session.step([(0, tokens[start : start + size])]).cpu())
        start += size
        if size > 1:  # who has no slot becomes hot
            for arena in slots.arenas:
                arena.residency.warm(1000.0 * (arena.residency.slot_of < 0))
        model.step_done(size, 1.0)
    assert slots.stats["promoted_bytes"] - before == slots.arenas[0].memory.numel()  # all changed
    assert relative_error(torch.cat(parts), one_pass(wanted, tokens)) < CLOSE
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    slots.advance(0)
    assert torch.equal(slots.table.cpu(), torch.from_numpy(slots.seats))


def test_slots_that_are_not_used_leave_all_to_the_cpu_until_they_are_again(load: Loader) -> None:
    wanted, model = with_tiers(load, "gpt-oss", 0.5, staged=0)
    slots = model.backend.tiers.slots
    tokens = prompt(8, 5, VOCABULARY)
    truth = one_pass(wanted, tokens)
    for using in (False, True):
        slots.check.using = using
        model.step_done(1)
        model.step_done(1)  # counts what came before
        before = slots.stats["hits"]
        assert bool((slots.table >= 0).any()) == using
        assert relative_error(one_pass(model, tokens).cpu(), truth) < CLOSE
        model.step_done(5)
        model.step_done(1)
        assert (slots.stats["hits"] > before) == using
    assert torch.equal(slots.table.cpu(), torch.from_numpy(slots.seats))


@pytest.mark.parametrize("using", [True, False])
def test_a_full_layer_stays_full_beside_one_that_is_not(
    load: Loader, tmp_path, using: bool
) -> None:
    _, wanted = load("gpt-oss")
    _, plain = load("gpt-oss", backend="cuda", device=DEVICE)
    layout, experts = plain.blk[0].ffn.experts.cpu.layout, plain.config.moe.experts
    routes = np.arange(experts, dtype=np.int32).reshape(-1, 1, 1).repeat(2, 1)
    routes[:, 1] = 0  # all of the first layer's experts are popular, of the second's one
    path = tmp_path / "trace.npz"
    Trace("toy", experts, plain.moe_layers, routes, np.zeros(1, np.int64)).save(path)
    options = {
        "slot_bytes": (experts + 2) * layout.nbytes + 4 * 2 * (512 + experts),
        "staging_bytes": 4 * layout.d * layout.f + 2 * layout.nbytes + BESIDE_STAGED * experts,
        "trace": str(path),
    }
    _, model = load("gpt-oss", backend="cuda", device=DEVICE, **options)
    assert model.blk[1].ffn.experts.stream is not None
    slots = model.backend.tiers.slots
    full = [layer.full for layer in slots.layers]
    assert full == [True, False]
    tokens = prompt(9, 40, VOCABULARY)
    slots.check.using = using
    for _ in range(12):  # those without a slot are in demand, and only they
        for arena in slots.arenas:
            arena.residency.warm(100.0 * (arena.residency.slot_of < 0))
        model.step_done(1)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
    assert (slots.stats["promotions"] > 0) == using
    assert [layer.full for layer in slots.layers] == full
    assert [bool((layer.table >= 0).all()) for layer in slots.layers] == full
    for steps in ([40], [1] * 3):  # streamed or straight from the blocks; then by slots and CPU
        session, start = Session(model), 0
        for size in steps:
            found = session.step([(0, tokens[start : start + size])]).cpu()
            start += size
        truth = one_pass(wanted, tokens[:start])[-len(found) :]
        assert relative_error(found, truth) < CLOSE
    model.step_done(1)
    slots.check.using = True
    model.step_done(1)


def test_a_trace_says_who_starts_in_a_slot(load: Loader, tmp_path) -> None:
    _, plain = load("gpt-oss", backend="cuda", device=DEVICE)
    layers, experts = plain.moe_layers, plain.config.moe.experts
    slab = plain.blk[0].ffn.experts.cpu.layout.nbytes
    routes = np.full((4, len(layers), 1), experts - 1, np.int32)
    path = tmp_path / "trace.npz"
    Trace("toy", experts, layers, routes, np.zeros(1, np.int64)).save(path)
    room = len(layers) * (slab + 4 * (512 + experts))
    _, model = load("gpt-oss", backend="cuda", device=DEVICE, slot_bytes=room, trace=str(path))
    seats = model.backend.tiers.slots.seats
    assert (seats[:, experts - 1] >= 0).all()
    assert (seats[:, : experts - 1] == -1).all()

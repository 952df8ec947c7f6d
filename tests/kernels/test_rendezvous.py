"""Ringing and collecting against their plain torch twins; another thread plays the CPU."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from greenroom.kernels.rendezvous import (
    NUMBER,
    STATE_WORDS,
    Box,
    collect,
    collect_twin,
    ring,
    ring_twin,
)

ROOM, NOTHING = 3, -(2**31)
SIZES = [(1, 7, 3), (3, 2100, 4), (2, 1, 5)]


def make_box(d: int, k: int, device: torch.device, room: int = ROOM) -> Box:
    pin = device.type == "cuda"
    floats = [torch.zeros(room, n, pin_memory=pin) for n in (d, k, d)]
    ids = torch.zeros(room, k, dtype=torch.int32, pin_memory=pin)
    bells = torch.zeros(2, 16, dtype=torch.int32, pin_memory=pin)
    return Box(floats[0], ids, floats[1], floats[2], bells[0], bells[1])


def make_state(device: torch.device, *words: int) -> torch.Tensor:
    return torch.tensor(words or [0] * STATE_WORDS, dtype=torch.int32, device=device)


def settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


@pytest.mark.parametrize("resident", [False, True])
@pytest.mark.parametrize(("tokens", "d", "k"), SIZES)
def test_ring_equals_twin(tokens, d, k, resident, device) -> None:
    hidden, weights = torch.randn(tokens, d, device=device), torch.rand(tokens, k, device=device)
    ids = torch.randint(-1, 9, (tokens, k), device=device, dtype=torch.int32)
    ids[0, :2] = torch.tensor([0, 1])  # one that stays, one that has a slot
    table = torch.tensor([-1, 0, 4, -1, -1, 3, -1, -1, 1], dtype=torch.int32, device=device)
    source = torch.tensor([NUMBER.value], dtype=torch.int32, pin_memory=device.type == "cuda")
    found, wanted = [], []
    for call, out in ((ring, found), (ring_twin, wanted)):
        box, state = make_box(d, k, device), make_state(device, 5, 0, 0)
        for first in (None, source):
            call(hidden, ids, weights, box, state, table if resident else None, first)
            settle(device)
            out += [int(box.ring[0]), state.tolist()]
        out += [box.hidden, box.ids, box.weights]
    assert found[:4] == wanted[:4]
    assert (found[0], found[2]) == (5, NUMBER.value)
    for one, other in zip(found[4:], wanted[4:], strict=True):
        assert torch.equal(one, other)
    assert resident == (not torch.equal(found[5][:tokens], ids.cpu()))


def test_where_all_have_slots_nothing_is_sent_and_nothing_awaited(device) -> None:
    ids = torch.tensor([[2, 1], [-1, -1]], dtype=torch.int32, device=device)
    table = torch.tensor([-1, 0, 4], dtype=torch.int32, device=device)
    hits = torch.randn(2, 8, device=device)
    for call, answer in ((ring, collect), (ring_twin, collect_twin)):
        box, state = make_box(8, 2, device), make_state(device, 5, 0, 0)
        box.ids.fill_(-7)
        box.result.fill_(torch.nan)
        call(hits, ids, torch.ones(2, 2, device=device), box, state, table)
        out = answer(box, 2, state, hits)
        settle(device)
        assert int(box.ring[0]) == 5 + NOTHING
        assert (box.ids == -7).all()
        assert torch.equal(out, hits)
        assert state.tolist() == [5, 0, 0]


@pytest.mark.parametrize(("tokens", "d", "k"), SIZES)
@pytest.mark.parametrize("parts", [(False, False), (True, False), (False, True), (True, True)])
def test_collect_equals_twin(tokens, d, k, parts, device) -> None:
    given = [torch.randn(tokens, d, device=device) if part else None for part in parts]
    outs = []
    for call in (collect, collect_twin):
        box, state = make_box(d, k, device), make_state(device, 8, 1, 7)
        box.result.copy_(torch.linspace(-1, 1, ROOM * d).view(ROOM, d))
        box.done[0] = 8
        outs.append(call(box, tokens, state, *given))
        assert state.tolist() == [8, 1, 7]
    assert torch.equal(*outs)
    total = outs[0].cpu() - sum(part.cpu() for part in given if part is not None)
    torch.testing.assert_close(total, box.result[:tokens], atol=1e-5, rtol=1e-4)


def test_collect_waits_for_the_answer(device) -> None:
    box, state = make_box(40, 2, device), make_state(device, 3, 1, 0)
    box.done[0] = 2  # of the step before

    def answer() -> None:
        time.sleep(0.1)
        box.result.fill_(4.5)
        box.done[0] = 3

    with ThreadPoolExecutor(1) as other:
        collect(make_box(40, 2, device), 1, make_state(device, 3, 0, 0))  # compiled before
        begin = time.perf_counter()
        done = other.submit(answer)
        out = collect(box, 2, state)
        settle(device)
        assert time.perf_counter() - begin > 0.09
        done.result()
    assert (out == 4.5).all()
    assert state.tolist() == [3, 1, 0]


@pytest.mark.parametrize("call", [collect, collect_twin])
@pytest.mark.parametrize("said", [0, 9 + NOTHING])
def test_a_failed_step_or_one_nobody_answers_ends_and_the_next_is_awaited(
    call, said, device
) -> None:
    box, state = make_box(8, 2, device), make_state(device, 9, 1, 0)
    box.done[0] = said
    box.result.fill_(torch.nan)
    shared = torch.ones(2, 8, device=device)
    assert torch.equal(call(box, 2, state, None, shared, limit_ms=2), shared)
    assert state.tolist() == [9, 1, 9]
    begin = time.perf_counter()
    call(box, 2, state, None, shared, limit_ms=60_000)  # the next layer of this step
    settle(device)
    assert time.perf_counter() - begin < 10
    state[0], box.done[0] = 10, 10
    box.result.fill_(2.0)
    assert (call(box, 2, state, None, shared) == 3).all()


def test_sizes_are_checked(device) -> None:
    box, state = make_box(8, 2, device), make_state(device)
    good = (torch.ones(2, 8), torch.ones(2, 2, dtype=torch.int32), torch.ones(2, 2))
    hidden, ids, weights = (part.to(device) for part in good)
    for wrong in (
        (hidden[:, :4].contiguous(), ids, weights),
        (hidden[:1], ids, weights),
        (hidden, ids[:, :1].contiguous(), weights[:, :1].contiguous()),
        (hidden, ids, weights[:1]),
        (hidden[:, ::1].T.contiguous().T, ids, weights),
        tuple(part.repeat(2, 1) for part in (hidden, ids, weights)),
    ):
        with pytest.raises(ValueError, match=r"ring|box"):
            ring(*wrong, box, state)
    with pytest.raises(ValueError, match="state"):
        ring(hidden, ids, weights, box, state[:2])
    for tokens, part in ((0, None), (ROOM + 1, None), (2, hidden[:1])):
        with pytest.raises(ValueError, match=r"collect|box"):
            collect(box, tokens, state, part)
    broken = Box(box.hidden, box.ids, box.weights, box.result[:1], box.ring, box.done)
    with pytest.raises(ValueError, match="result"):
        collect(broken, 1, state)

"""Routes of long steps that the CPU computes while the device goes on. Without a GPU the kernels
run under the interpreter; the native thread that answers is the real one."""

import os
from unittest.mock import Mock

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from greenroom.errors import NativeError
from greenroom.experts import errands as module
from greenroom.experts.cpu import CpuExperts
from greenroom.experts.errands import Errands
from greenroom.experts.meter import Meter
from greenroom.experts.rendezvous import FAILED
from greenroom.kernels.grouped import Routes

from .small_banks import DEVICE, EXPERTS, LAYERS, D, K, bank, routes


@pytest.fixture(scope="module")
def banks(pool) -> list[CpuExperts]:
    return [bank(pool, seed, lazy=seed == 1) for seed in range(LAYERS)]


def sort(ids: torch.Tensor, weights: torch.Tensor) -> tuple[Routes, np.ndarray]:
    table = torch.zeros(4, EXPERTS, dtype=torch.int32, device=DEVICE)
    found = Routes.sort(ids, weights, table)
    return found, found.starts.cpu().numpy()


def run(errands: Errands, layer: int, seed: int, lent: list[int], tokens: int = 40):
    """Result of an errand, and the direct call's."""
    hidden, ids, weights = routes(tokens, seed)
    sorted_, starts = sort(ids, weights)
    found = errands.go(layer, hidden, sorted_.tokens, starts, lent)
    errands.meet()
    lines = np.concatenate([np.arange(starts[e], starts[e + 1]) for e in lent])
    tokens_of = sorted_.tokens.cpu()[lines].long()
    owners = torch.from_numpy(np.repeat(lent, np.diff(starts)[lent])).int()[:, None]
    wanted = errands._layers[layer](hidden.cpu()[tokens_of], owners, torch.ones(len(lines), 1))
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return found.clone(), wanted


@pytest.mark.parametrize("lent", [[0], [1, 4], list(range(EXPERTS))])
def test_errands_of_several_layers_give_the_bits_of_the_direct_call(banks, lent) -> None:
    errands = Errands(DEVICE, banks)
    for number, layer in enumerate((0, 2, 1, 1, 0)):  # layer 1 is packed when it is asked
        found, wanted = run(errands, layer, number, lent)
        assert found.shape[1] == D
        assert torch.equal(found, wanted)
    errands.settle()


def test_memory_grows_with_the_rows(banks, monkeypatch) -> None:
    monkeypatch.setattr(module, "LEAST_ROWS", 32)  # few, since the interpreter takes its time
    errands, tokens = Errands(DEVICE, banks), 32 // K + 40
    for size in (8, tokens, 8):
        found, wanted = run(errands, 0, size, list(range(EXPERTS)), size)
        assert len(found) == size * K
        assert torch.equal(found, wanted)


def test_memory_that_could_not_grow_is_asked_for_again(banks, monkeypatch) -> None:
    errands = Errands(DEVICE, banks)
    run(errands, 0, 1, [0])
    errands.settle()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "zeros", Mock(side_effect=RuntimeError("no memory")))
        with pytest.raises(RuntimeError, match="no memory"):
            errands._reserve(1 << 12, D)
    found, wanted = run(errands, 0, 2, [0])
    assert torch.equal(found, wanted)
    errands.settle()


def test_meters_are_told_once_an_errand(banks) -> None:
    errands, cpu = Errands(DEVICE, banks), banks[2]
    run(errands, 2, 1, [0])  # of before anybody asked
    errands.settle()
    cpu.meter = Meter()
    try:
        found, _ = run(errands, 2, 2, [0, 3])
        cpu.meter = Meter()  # forgets the direct call
        errands.settle()
        errands.settle()
        spent = cpu.meter.long if len(found) > 32 else cpu.meter.short
        assert spent.seconds > 0
        assert spent.nbytes == sum(cpu.slab(e).nbytes for e in (0, 3))
    finally:
        cpu.meter = None


def test_one_that_fails_is_told_once_and_the_next_succeeds(banks, monkeypatch) -> None:
    errands = Errands(DEVICE, banks)
    run(errands, 0, 1, [0])
    tell = module.tell

    def spoil(*arguments) -> None:
        errands._ids[:] = EXPERTS
        tell(*arguments)

    monkeypatch.setattr(module, "tell", spoil)
    run(errands, 0, 2, [0])  # the device does not wait for ever
    with pytest.raises(NativeError, match=f"was sent expert id {EXPERTS}"):
        errands.settle()
    errands.settle()
    assert errands._words[1, 0] == errands._number + FAILED
    monkeypatch.undo()
    found, wanted = run(errands, 1, 3, [2])
    assert torch.equal(found, wanted)


def test_one_that_was_begun_can_be_abandoned(banks, monkeypatch) -> None:
    errands = Errands(DEVICE, banks)
    run(errands, 0, 1, [0])

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("no room for what is to be sent")

    monkeypatch.setattr(module, "send", fail)
    with pytest.raises(torch.OutOfMemoryError):
        run(errands, 0, 2, [0])
    errands.abandon()
    errands.abandon()
    monkeypatch.undo()
    found, wanted = run(errands, 2, 3, [1])
    assert torch.equal(found, wanted)


def test_one_that_could_not_begin_leaves_the_device_free(banks) -> None:
    errands = Errands(DEVICE, banks)
    run(errands, 0, 1, [0])
    errands.settle()
    native = errands._native
    errands._native = Mock(wraps=native, begin=Mock(side_effect=RuntimeError("under way")))
    with pytest.raises(NativeError, match="under way"):  # the bell was rung before
        run(errands, 0, 2, [0])
    errands.abandon()
    assert errands._words[1, 0] == errands._number + FAILED
    errands.meet()  # does not wait for an answer that will not come
    errands.settle()
    errands._native = native
    found, wanted = run(errands, 1, 3, [2])
    assert torch.equal(found, wanted)
    errands.settle()

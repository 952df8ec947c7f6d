"""Rows sent to the CPU against the plain torch twin; another thread plays the CPU."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from greenroom.kernels.errand import meet, send, send_twin, tell
from greenroom.kernels.rendezvous import NUMBER


def pinned(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, pin_memory=torch.cuda.is_available())


def settle() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@pytest.mark.parametrize(("rows", "d"), [(1, 7), (9, 1024), (3, 2880)])
def test_send_equals_twin(rows, d, device) -> None:
    hidden = torch.randn(5, d, device=device)
    tokens = torch.randint(5, (20,), dtype=torch.int32, device=device)
    sources = pinned(rows, dtype=torch.int32)
    sources.copy_(torch.randperm(20)[:rows])
    found, wanted = pinned(rows + 1, d), pinned(rows + 1, d)
    send(hidden, tokens, sources, found[:rows])
    send_twin(hidden, tokens, sources, wanted[:rows])
    settle()
    assert torch.equal(found, wanted)
    assert (found[:rows] != 0).any()


@pytest.mark.parametrize("number", [1, 16, NUMBER.value])
def test_the_bell_has_the_number(number, device) -> None:
    bells = pinned(2, 16, dtype=torch.int32)
    tell(bells[1], number)
    settle()
    assert bells[1, 0] == number
    assert bells.count_nonzero() == 1


def test_meet_waits_for_the_number(device) -> None:
    bell = pinned(16, dtype=torch.int32)
    bell[0] = 2
    meet(bell, 2)  # compiled before
    settle()

    def answer() -> None:
        time.sleep(0.1)
        bell[0] = 3

    with ThreadPoolExecutor(1) as other:
        begin = time.perf_counter()
        done = other.submit(answer)
        meet(bell, 3)
        settle()
        assert time.perf_counter() - begin > 0.09
        done.result()


@pytest.mark.parametrize("said", [0, 9 - 2**31])
def test_one_that_failed_or_is_not_answered_ends(said, device) -> None:
    bell = pinned(16, dtype=torch.int32)
    bell[0] = said
    meet(bell, 9, limit_ms=2)
    settle()
    assert bell[0] == said

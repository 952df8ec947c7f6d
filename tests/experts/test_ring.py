"""Staged pages, copied by the driver; by PyTorch they are tested with a device that is late."""

import ctypes
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from greenroom.errors import NativeError
from greenroom.experts import pinned
from greenroom.experts.ring import Ring

SLAB, EXPERTS = 96, 9


class Bank:
    def __init__(self, seed: int) -> None:
        self.block: Any = np.random.default_rng(seed).integers(0, 256, (EXPERTS, SLAB), np.uint8)

    def slab(self, expert: int) -> Any:
        return self.block[expert]


def ring(moved: list[int]) -> Ring:
    def upload(there: int, here: int, nbytes: int, stream: int) -> None:
        assert stream == 5
        ctypes.memmove(there, here, nbytes)
        moved.append(nbytes // SLAB)

    found: Any = Ring(torch.zeros(3, 4 * SLAB, dtype=torch.uint8), 4)
    found.banks += [Bank(1), Bank(2)]
    found._upload, found._stream = upload, SimpleNamespace(cuda_stream=5)
    return found


@pytest.mark.parametrize(
    ("experts", "pieces"),
    [((0,), [1]), ((2, 3, 4, 5), [4]), ((0, 2, 3, 8), [1, 2, 1]), ((7, 6), [1, 1])],
)
def test_experts_that_lie_together_are_copied_together(experts: tuple, pieces: list) -> None:
    moved: list[int] = []
    pages = ring(moved)
    for layer in (0, 1):
        pages.fetch(layer, experts)
        page = pages.staged[-1]
        found = page.data.numpy()[: len(experts) * SLAB].reshape(-1, SLAB)
        np.testing.assert_array_equal(found, pages.banks[layer].block[list(experts)])
        assert not page.data[len(experts) * SLAB :].any()
    assert moved == 2 * pieces
    assert pages.copied_bytes == 2 * len(experts) * SLAB


def test_slabs_that_lie_here_and_there_are_copied_one_by_one() -> None:
    moved: list[int] = []
    pages: Any = ring(moved)
    slabs = pages.banks[0].block
    pages.banks[0] = SimpleNamespace(block=None, slab=lambda expert: slabs[expert])
    pages._stream = nullcontext()
    pages.fetch(0, (1, 2, 7))
    found = pages.staged[0].data.numpy()[: 3 * SLAB].reshape(-1, SLAB)
    np.testing.assert_array_equal(found, slabs[[1, 2, 7]])
    assert not moved


def test_the_page_of_a_copy_that_failed_is_free_again() -> None:
    pages: Any = ring([])

    def fails(*_: int) -> None:
        raise NativeError("no copy")

    pages._upload = fails
    for _ in range(3):
        with pytest.raises(NativeError):
            pages.fetch(0, (1, 2))
    assert not pages.room
    pages.drop(-1)
    assert len(pages._free) == 3


def test_a_copy_that_cannot_begin_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    class Copy:
        def __call__(self, *args: int) -> int:
            return 700

    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace(cuMemcpyHtoDAsync_v2=Copy()))
    upload = pinned.driver_upload.__wrapped__()
    with pytest.raises(NativeError, match="700"):
        upload(1, 2, 3, 4)


def test_without_a_driver_there_is_no_such_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: str) -> None:
        raise OSError("no such library")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert pinned.driver_upload.__wrapped__() is None

"""The store of prefixes in RAM: contents come back bit for bit, within the budget."""

import pytest
import torch

from greenroom.engine import EngineConfig
from greenroom.engine.prefix_store import PrefixStore
from greenroom.errors import RequestError

BLOCK = 2 * (2 * 3 * 4) * 2  # bytes of a block: keys and values of (2, 3, 4) halves


def tensors(dtype: torch.dtype = torch.float16) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(5, 2, 3, 4, generator=generator).to(dtype) for _ in range(2)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_content_comes_back_in_another_block(dtype: torch.dtype) -> None:
    keys, values = tensors(dtype)
    wanted = keys[3].clone(), values[3].clone()
    store = PrefixStore(2**20, [[keys, values]])
    store.keep((0, b"a"), 3)
    content = store.take((0, b"a"))
    keys[3] = values[3] = 0
    others = keys[:1].clone()
    store.restore((0, b"a"), 1, content)
    assert torch.equal(keys[1], wanted[0])
    assert torch.equal(values[1], wanted[1])
    assert torch.equal(keys[:1], others)
    assert (store.kept, store.restored, len(store)) == (1, 1, 1)


def test_strided_caches_are_copied_by_value() -> None:
    whole = torch.arange(48.0).view(2, 4, 6)
    part = whole.transpose(1, 2)  # (blocks, 6, 4), not contiguous
    store = PrefixStore(2**20, [[part]])
    wanted = part[0].clone()
    store.keep((0, b"a"), 0)
    store.restore((0, b"a"), 1, store.take((0, b"a")))
    assert torch.equal(part[1], wanted)


def test_the_budget_holds_and_the_least_recently_used_goes() -> None:
    store = PrefixStore(2 * BLOCK + 1, [tensors()])
    store.keep((0, b"a"), 0)
    store.keep((0, b"b"), 1)
    store.take((0, b"a"))
    store.keep((0, b"c"), 2)
    assert [(0, name) in store for name in (b"a", b"b", b"c")] == [True, False, True]
    assert store.bytes == 2 * BLOCK


def test_a_block_larger_than_the_budget_is_not_kept() -> None:
    store = PrefixStore(BLOCK - 1, [tensors()])
    store.keep((0, b"a"), 0)
    assert (len(store), store.bytes) == (0, 0)


def test_groups_are_kept_apart() -> None:
    store = PrefixStore(2**20, [tensors(), tensors()])
    store.keep((0, b"a"), 0)
    assert (1, b"a") not in store


@pytest.mark.parametrize("size", ["max", "lots", -1])
def test_wrong_budgets_are_refused(size: str | int) -> None:
    with pytest.raises(RequestError, match="prefix_ram"):
        EngineConfig(prefix_ram=size)

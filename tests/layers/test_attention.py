"""Paged attention against torch's own over contiguous keys, with windows, sinks and groups."""

import pytest
import torch

from greenroom.layers.attention import attend, attention, visibility, write_kv
from greenroom.layers.batch import Batch, KVCache, KVGroup


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("window", [None, 1, 5, 100])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (5, 1)])
def test_equals_torch(heads: tuple[int, int], window: int | None) -> None:
    count, kv_heads = heads
    q, k, v = random(9, count, 8), random(kv_heads, 20, 8, seed=1), random(kv_heads, 20, 12, seed=2)
    visible = visibility(range(11, 20), 0, 20, window)
    found = attend(q, k, v, visible, 0.3, None)
    share = count // kv_heads
    expected = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(0, 1),
        k.repeat_interleave(share, 0),
        v.repeat_interleave(share, 0),
        attn_mask=visible,
        scale=0.3,
    )
    torch.testing.assert_close(found, expected.transpose(0, 1), rtol=1e-5, atol=1e-6)


def test_a_window_counts_the_query_itself() -> None:
    assert visibility(range(4, 6), 2, 6, 3).tolist() == [
        [True, True, True, False],
        [False, True, True, True],
    ]


def test_sinks_take_their_share_and_give_nothing() -> None:
    q, k, v = random(1, 2, 4), random(2, 3, 4, seed=1), random(2, 3, 4, seed=2)
    everything = torch.ones(1, 3, dtype=torch.bool)
    sinks = torch.tensor([0.7, -50.0])
    found = attend(q, k, v, everything, 1.0, sinks)
    plain = attend(q, k, v, everything, 1.0, None)
    scores = k[0] @ q[0, 0]
    share = torch.exp(scores).sum() / (torch.exp(scores).sum() + torch.exp(sinks[0]))
    torch.testing.assert_close(found[0, 0], plain[0, 0] * share)
    torch.testing.assert_close(found[0, 1], plain[0, 1])


def test_pages_in_any_order_and_skipped_slots() -> None:
    cache = KVCache(torch.full((6, 2, 4, 8), float("nan")), torch.full((6, 2, 4, 8), float("nan")))
    table = torch.tensor([[5, 0, 3]], dtype=torch.int32)
    k, v, q = random(10, 2, 8), random(10, 2, 8, seed=1), random(10, 4, 8, seed=2)
    position = torch.arange(10)
    slots = table[0][position // 4].long() * 4 + position % 4
    write_kv(cache, slots, k, v)
    write_kv(cache, torch.tensor([-1]), k[:1] + 9, v[:1] + 9)  # padding
    group = KVGroup(table, slots)
    batch = Batch(
        tokens=position,
        positions=position,
        query_starts=torch.tensor([0, 10], dtype=torch.int32),
        context_lengths=torch.tensor([10], dtype=torch.int32),
        groups=(group,),
        output_rows=position,
    )
    found = attention(q, cache, group, batch, scale=0.5)
    expected = attend(
        q, k.transpose(0, 1), v.transpose(0, 1), visibility(range(10), 0, 10, None), 0.5, None
    )
    torch.testing.assert_close(found, expected)

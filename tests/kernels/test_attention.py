"""Paged attention against its plain torch twin."""

import pytest
import torch

from greenroom.kernels.attention import attend, attend_twin, tiles


def batch(lengths, heads, kv_heads, key, value, block, dtype, seed, device):
    """lengths: (new tokens, positions in the cache) per sequence; blocks in shuffled order."""
    torch.manual_seed(seed)
    blocks = [-(-context // block) for _, context in lengths]
    order = torch.randperm(sum(blocks)).int()
    tables = torch.zeros(len(lengths), max(blocks) + 1, dtype=torch.int32)
    at = 0
    for row, count in enumerate(blocks):
        tables[row, :count] = order[at : at + count]
        at += count
    starts = [0]
    for new, _ in lengths:
        starts.append(starts[-1] + new)
    tensors = (
        torch.randn(starts[-1], heads, key),
        torch.randn(sum(blocks), kv_heads, block, key).to(dtype),
        torch.randn(sum(blocks), kv_heads, block, value).to(dtype),
        tables,
        torch.tensor(starts, dtype=torch.int32),
        torch.tensor([context for _, context in lengths], dtype=torch.int32),
    )
    return [t.to(device) for t in tensors], starts


CASES = [
    # heads, kv_heads, key, value, window, sinks
    (8, 2, 64, 64, None, False),
    (8, 1, 32, 48, None, True),
    (6, 6, 24, 24, 20, False),
    (14, 2, 64, 64, 17, True),
]


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("rows", [16, 64])
@pytest.mark.parametrize(("heads", "kv_heads", "key", "value", "window", "sinks"), CASES)
def test_equals_twin(heads, kv_heads, key, value, window, sinks, rows, splits, device):
    lengths = [(1, 1), (1, 150), (7, 7), (19, 83), (1, 33)]
    tensors, starts = batch(lengths, heads, kv_heads, key, value, 16, torch.float32, 1, device)
    sink = torch.randn(heads, device=device) if sinks else None
    cut = [
        torch.tensor(t, dtype=torch.int32, device=device)
        for t in tiles(starts, heads // kv_heads, rows)
    ]
    options = {"scale": key**-0.5, "window": window, "sinks": sink}
    got = attend(*tensors, *cut, rows=rows, splits=splits, **options)
    wanted = attend_twin(*tensors, **options)
    torch.testing.assert_close(got, wanted, atol=2e-3, rtol=2e-3)


def test_dropped_blocks_are_never_read(device):
    tensors, starts = batch([(1, 100)], 4, 2, 32, 32, 16, torch.float16, 2, device)
    options = {"scale": 0.2, "window": 10}
    wanted = attend_twin(*tensors, **options)
    dropped = tensors[3].clone()
    dropped[0, :5] = -1  # positions 0..79; the window begins at 90
    cut = [torch.tensor(t, dtype=torch.int32, device=device) for t in tiles(starts, 2, 16)]
    got = attend(*tensors[:3], dropped, *tensors[4:], *cut, splits=2, **options)
    torch.testing.assert_close(got, wanted, atol=2e-3, rtol=2e-3)


def test_padding_sequences_give_zeros(device):
    tensors, _ = batch([(1, 40), (1, 5)], 4, 2, 32, 32, 16, torch.float32, 3, device)
    tensors[5][1] = 0
    rows = torch.arange(2, dtype=torch.int32, device=device)
    got = attend(*tensors, rows, rows, scale=0.2, splits=2)
    assert got[0].abs().sum() > 0
    assert got[1].abs().sum() == 0

"""The Python wrappers of the native operations: defaults, outputs, and one attention block put
together from them against plain torch."""

import pytest
import torch

from greenroom import native
from greenroom.layers import native_ops


def test_new_pool_follows_the_advice() -> None:
    assert native_ops.new_pool().size == native.lib().default_threads()["threads"]
    assert native_ops.new_pool(3).size == 3


def test_outputs_are_new_unless_given() -> None:
    pool, x, weight = native_ops.new_pool(2), torch.randn(5, 3, 8), torch.rand(8)
    before = x.clone()
    expected = torch.nn.functional.rms_norm(x, (8,), weight, 1e-6)
    out = native_ops.rms_norm(pool, x, weight, 1e-6)
    torch.testing.assert_close(out, expected)
    assert torch.equal(x, before)
    assert native_ops.rms_norm(pool, x, weight, 1e-6, out=x) is x
    assert torch.equal(x, out)
    centred = native_ops.layer_norm(pool, before, weight, None, 1e-6, residual=before.clone())
    expected = torch.nn.functional.layer_norm(before, (8,), weight, None, 1e-6)
    torch.testing.assert_close(centred, expected)


def test_slice_gives_a_contiguous_output() -> None:
    x = torch.randn(4, 100)[:, 7:71].view(4, 2, 32)
    out = native_ops.rms_norm(native_ops.new_pool(1), x, torch.ones(32), 1e-6)
    assert out.is_contiguous()
    torch.testing.assert_close(out, torch.nn.functional.rms_norm(x, (32,), None, 1e-6))


def test_router_returns_ids_and_weights() -> None:
    x, weight = torch.randn(6, 20), torch.randn(9, 20)
    rule = native_ops.router_rule("softmax", 3, renormalize=True)
    ids, weights = native_ops.router(native_ops.new_pool(2), x, weight, rule)
    values, expected = (x @ weight.T).topk(3)
    assert ids.dtype == torch.int32
    assert torch.equal(ids.long(), expected)
    torch.testing.assert_close(weights, values.softmax(-1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("style", ["neox", "norm"])
def test_prefill_then_decode_is_causal_attention(style: str) -> None:
    torch.manual_seed(0)
    pool, tokens, width = native_ops.new_pool(2), 40, 32
    q, k, v = (torch.randn(tokens, heads, width) for heads in (4, 2, 2))
    inv_freq = 10000 ** (-torch.arange(0, width, 2) / width)
    table = native_ops.rope_table(pool, torch.arange(tokens), inv_freq, 1.5)
    for x in (q, k):
        assert native_ops.rope(pool, x, table, style) is x
    caches = torch.zeros(2, 4, 2, 16, width)
    blocks = torch.tensor([[2, 0, 3]], dtype=torch.int32)
    slots = blocks[0, torch.arange(tokens) // 16].long() * 16 + torch.arange(tokens) % 16
    parts = []
    for begin, end in [(0, 30), *((i, i + 1) for i in range(30, tokens))]:
        native_ops.write_kv(pool, k[begin:end], v[begin:end], slots[begin:end], *caches)
        starts, context = torch.tensor([0, end - begin]).int(), torch.tensor([end]).int()
        parts.append(
            native_ops.attention(pool, q[begin:end], *caches, blocks, starts, context, 0.25)
        )
    expected = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(0, 1),
        k.repeat_interleave(2, 1).transpose(0, 1),
        v.repeat_interleave(2, 1).transpose(0, 1),
        is_causal=True,
        scale=0.25,
    )
    torch.testing.assert_close(torch.cat(parts), expected.transpose(0, 1), rtol=1e-4, atol=1e-5)

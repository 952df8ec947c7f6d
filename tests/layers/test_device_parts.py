"""Packed matrices and norms on a device (or under Triton's interpreter) against plain torch."""

import os
from contextlib import nullcontext

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from greenroom import native
from greenroom.gguf import GGMLType, random_blocks
from greenroom.kernels.planes import split
from greenroom.layers import device_parts
from greenroom.layers.cuda_backend import CudaBackend
from greenroom.layers.device_parts import FEW, DeviceMatrices, DeviceMatrix, DeviceNorm, Workbench
from greenroom.layers.ledger import Ledger
from greenroom.layers.norm import Norm
from greenroom.layers.router import Rule
from greenroom.layers.weight import Weight

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Products of many tokens round their operands to 11 bits on a GPU.
CLOSE = {"atol": 2e-2, "rtol": 1e-2} if DEVICE.type == "cuda" else {"atol": 1e-3, "rtol": 1e-4}


def workbench(scratch: int = 1 << 16) -> Workbench:
    return Workbench(native.lib().Pool(1), Ledger(DEVICE), scratch)


def weight(type: GGMLType, rows: int, cols: int) -> Weight:
    rng = np.random.default_rng(rows)
    if type == GGMLType.F32:
        values = rng.standard_normal((rows, cols), np.float32)
        return Weight("w", type, values.view(np.uint8))
    return Weight("w", type, random_blocks(type, rows, cols, rng).reshape(rows, -1))


@pytest.mark.parametrize("type", [GGMLType.F32, GGMLType.F16, GGMLType.Q8_0, GGMLType.Q4_K])
@pytest.mark.parametrize("tokens", [1, FEW + 1])
def test_products_equal_torch_and_scratch_is_bounded(type: GGMLType, tokens: int) -> None:
    torch.manual_seed(tokens)
    # Scratch for 32 of the 70 rows: three pieces, the last one not a whole group.
    bench = workbench(32 * 256 * 4)
    source = weight(type, 70, 256)
    x, bias = torch.randn(tokens, 256), torch.randn(70)
    found = DeviceMatrix(bench, [source], [bias])(x.to(DEVICE)).cpu()
    wanted = torch.nn.functional.linear(x, source.float32(), bias)
    scale = wanted.abs().max()
    torch.testing.assert_close(found / scale, wanted / scale, **CLOSE)
    assert bench.ledger.parts["workspace"] == 32 * 256 * 4


def test_matrices_of_one_input_and_mixed_types() -> None:
    types = (GGMLType.Q8_0, GGMLType.Q8_0, GGMLType.F32)
    sources = [weight(t, rows, 64) for t, rows in zip(types, (32, 20, 8), strict=True)]
    biases = [None, torch.randn(20), None]
    matrices = DeviceMatrices(workbench(), sources, biases)
    assert len(matrices.parts) == 2
    x = torch.randn(3, 64)
    for out, source, bias in zip(matrices(x.to(DEVICE)), sources, biases, strict=True):
        assert out.stride(1) == 1
        wanted = torch.nn.functional.linear(x, source.float32(), bias)
        torch.testing.assert_close(out.cpu(), wanted, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_norms_equal_the_plain_ones(centred: bool, biased: bool) -> None:
    torch.manual_seed(0)
    values, bias = torch.randn(48), torch.randn(48) if biased else None
    x, delta = torch.randn(3, 48), torch.randn(3, 48)
    there = x.to(DEVICE, copy=True)
    found = DeviceNorm(Ledger(DEVICE), values, bias, 1e-5, centred)(there, delta.to(DEVICE))
    wanted = Norm(values, bias, 1e-5, centred)(x, delta)
    torch.testing.assert_close(found.cpu(), wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(there.cpu(), x)


def test_a_norm_cuts_its_result_for_the_matrix_that_reads_it(monkeypatch) -> None:
    torch.manual_seed(0)
    bench, source = workbench(), weight(GGMLType.Q8_0, 48, 64)
    matrix = DeviceMatrix(bench, [source], [None])
    plain = DeviceNorm(bench.ledger, torch.ones(64), None, 1e-5, False)
    asked = DeviceNorm(bench.ledger, torch.ones(64), None, 1e-5, False, bench.cut)
    splits: list[int] = []

    def counted(x: torch.Tensor, kind: int) -> tuple[torch.Tensor, torch.Tensor]:
        splits.append(kind)
        return split(x, kind)

    monkeypatch.setattr("greenroom.kernels.planes.split", counted)
    x = torch.randn(2, 64).to(DEVICE)
    first, then, apart = matrix(asked(x)), matrix(asked(x)), matrix(plain(x))
    assert len(splits) == 2  # by the first, before it was asked, and by the plain one
    assert asked.kind == splits[0]
    assert torch.equal(first, then)
    assert torch.equal(first, apart)
    other = matrix(asked(x) * 2)  # not what the norm has made
    assert len(splits) == 3
    torch.testing.assert_close(other, 2 * first)


@pytest.mark.parametrize(("gating", "exact"), [("sparse_mixer", True), ("softmax", False)])
def test_long_products_keep_float32_before_a_router_that_jumps(
    gating: str, exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered = []
    monkeypatch.setattr(
        device_parts, "tensor_cores", lambda device: entered.append(device) or nullcontext()
    )
    bench = workbench()
    CudaBackend(bench.pool, bench, 1).router(torch.ones(4, 32), None, Rule(gating, 2))
    DeviceMatrix(bench, [weight(GGMLType.Q8_0, 16, 32)], [None])(torch.ones(FEW + 1, 32).to(DEVICE))
    assert bench.exact == exact
    assert bool(entered) != exact

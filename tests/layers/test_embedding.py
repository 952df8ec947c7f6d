"""Embedding rows of every type against the dequantised table, and that only they are decoded."""

import numpy as np
import pytest
import torch

from greenroom import native
from greenroom.gguf import GGMLType, dequantize, quantize
from greenroom.layers import embedding
from greenroom.layers.embedding import Embedding
from greenroom.layers.weight import Weight

TYPES = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "MXFP4", "IQ4_NL"]


def table(type: GGMLType) -> Weight:
    values = np.random.default_rng(0).standard_normal((50, 64)).astype(np.float32)
    return Weight("token_embd.weight", type, quantize(type, values))


@pytest.mark.parametrize("copy", [False, True])
@pytest.mark.parametrize("name", TYPES)
def test_rows_equal_the_dequantised_table(name: str, copy: bool) -> None:
    weight = table(GGMLType[name])
    found = Embedding(weight, native.lib().Pool(2) if copy else None)
    tokens = torch.tensor([7, 0, 49, 7])
    assert torch.equal(found(tokens), weight.float32()[tokens])
    assert found.nbytes == weight.raw.nbytes
    assert np.shares_memory(found.raw, weight.raw) is not copy


def test_only_the_wanted_rows_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[tuple[int, ...]] = []

    def spy(type: GGMLType, raw: np.ndarray) -> np.ndarray:
        decoded.append(raw.shape)
        return dequantize(type, raw)

    found = Embedding(table(GGMLType.Q8_0))
    monkeypatch.setattr(embedding, "dequantize", spy)
    found(torch.tensor([3, 4]))
    assert decoded == [(2, 68)]

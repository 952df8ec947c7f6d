"""On a CUDA device: experts in slots, streamed experts and promotions give the CPU's answers."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from greenroom.convert.synth import Synthesis, write_synthetic
from greenroom.convert.synth_shapes import shape_of
from greenroom.gguf import GGUFFile
from greenroom.layers.batch import Batch, KVGroup
from greenroom.models import LoadOptions, load_model

pytestmark = pytest.mark.gpu

os.environ.pop("TRITON_INTERPRET", None)
SHAPES = ("gpt-oss-20b-tiny", "phi-3.5-moe-tiny", "deepseek-moe-16b-tiny", "qwen3-30b-a3b-tiny")


def batch_of(tokens: list[int], groups: int) -> Batch:
    count, blocks = len(tokens), -(-len(tokens) // 32)
    table = torch.arange(blocks, dtype=torch.int32)[None]
    group = KVGroup(table, torch.arange(count))
    return Batch(
        tokens=torch.tensor(tokens),
        positions=torch.arange(count),
        query_starts=torch.tensor([0, count], dtype=torch.int32),
        context_lengths=torch.tensor([count], dtype=torch.int32),
        groups=(group,) * groups,
        output_rows=torch.arange(count),
    )


def logits(model, tokens: list[int]) -> torch.Tensor:
    blocks = -(-len(tokens) // 32)
    caches = model.new_caches([blocks] * len(model.kv_groups), 32, torch.float32)
    found = model.forward(batch_of(tokens, len(model.kv_groups)), caches)
    return torch.log_softmax(found.cpu().double(), -1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("length", [20, 200])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_tiers_give_the_answers_of_the_cpu(
    shape: str, length: int, share: float, tmp_path: Path
) -> None:
    path = tmp_path / "model.gguf"
    write_synthetic(Synthesis(shape_of(shape, 2)), path)
    tokens = np.random.default_rng(0).integers(0, 300, length).tolist()
    with GGUFFile(path) as file:
        p = logits(load_model(file, LoadOptions(backend="reference")), tokens)
        plain = load_model(file, LoadOptions(backend="native"))
        everything = plain.memory()["experts"]
        options = LoadOptions(
            backend="cuda", slot_bytes=int(everything * share), staging_bytes=256 << 20
        )
        model = load_model(file, options)
    q = logits(model, tokens)
    slots = model.backend.tiers.slots
    if slots is not None:
        rng = np.random.default_rng(1)
        for _ in range(300):
            for arena in slots.arenas:
                arena.residency.warm(1000 * rng.random(arena.residency.heat.shape))
            slots.advance(4)
            torch.cuda.synchronize()
        assert share == 1.0 or slots.stats["promotions"] > 100
        assert torch.equal(slots.table.cpu(), torch.from_numpy(slots.seats))
        again = logits(model, tokens)
        assert (p.exp() * (p - again)).sum(-1).mean() < 1e-3
    divergence = (p.exp() * (p - q)).sum(-1).mean()
    print(f"{shape} {length} tokens, share {share}: mean KL {divergence:.1e}")
    assert divergence < 1e-3

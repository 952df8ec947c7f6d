"""On a CUDA device: tokens drawn there are those the same draws give in RAM, and texts are the
same every time."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from greenroom import LLM, SamplingParams
from greenroom.convert.synth import Synthesis, write_synthetic
from greenroom.convert.synth_shapes import shape_of
from greenroom.layers.choice import UNDECIDED, Choice, choose, numbers

pytestmark = pytest.mark.gpu

os.environ.pop("TRITON_INTERPRET", None)
FILTERS = [
    (1.0, 0, 1.0, 0.0), (0.6, 40, 1.0, 0.0), (1.0, 0, 0.8, 0.0), (1.0, 0, 1.0, 0.05),
    (0.8, 50, 0.9, 0.02), (0.0, 0, 1.0, 0.0),
]  # fmt: skip


def test_draws_are_those_of_the_cpu() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(len(FILTERS) + 1, 201_088, generator=generator)
    logits[-1, 5] = float("nan")
    source, same = np.random.default_rng(2), []
    for _ in range(20):
        filters = [*FILTERS, FILTERS[0]]
        choices = [Choice(*f, source.random()) for f in filters]  # type: ignore[arg-type]
        there = torch.tensor(numbers(choices), dtype=torch.float64)
        here = choose(logits, choices, there)
        found = choose(logits.cuda(), choices, there.cuda()).cpu()
        assert found[-1] == here[-1] == UNDECIDED
        same += (found == here).tolist()
    # exp() and sums round differently: a draw that falls on a border may go the other way
    assert np.mean(same) > 0.98


def test_texts_are_the_same_every_time(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    write_synthetic(Synthesis(shape_of("gpt-oss-20b-tiny", 2)), file)
    prompts = [list(range(3, 10)), [5], list(range(60))]
    with LLM(file, backend="cuda", context_length=256, prefix_cache=False) as llm:
        for params in (
            SamplingParams(max_tokens=20, seed=3, ignore_eos=True),
            SamplingParams(max_tokens=20, seed=3, ignore_eos=True, top_k=30, temperature=0.7),
            SamplingParams(max_tokens=20, seed=3, ignore_eos=True, top_p=0.8),
            SamplingParams(max_tokens=20, temperature=0, ignore_eos=True, logprobs=2),
        ):
            first, again = (llm.generate(prompts, params) for _ in range(2))
            assert [c.token_ids for c in first] == [c.token_ids for c in again]
        greedy = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)
        assert [c.token_ids for c in llm.generate(prompts, greedy)] == [c.token_ids for c in first]

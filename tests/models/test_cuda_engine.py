"""The whole engine on the cuda backend (a GPU, or Triton's interpreter) against the reference."""

import os
from types import SimpleNamespace

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from greenroom import LLM, SamplingParams
from greenroom.engine.config import EngineConfig
from greenroom.engine.load import assemble
from greenroom.errors import BudgetError
from greenroom.placement.placement import Placement

from .conftest import Loader

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CONFIG = EngineConfig(
    context_length=32, max_sequences=2, prefill_chunk=8, block_size=4, kv_type="f32", threads=1
)


class Letters:
    """A tokenizer of one letter per token."""

    eog_ids: frozenset[int] = frozenset()

    def stream(self, context: object = None) -> SimpleNamespace:
        return SimpleNamespace(push=lambda token: chr(64 + token), flush=lambda: "")


def test_requests_together_get_the_text_of_the_reference(load: Loader) -> None:
    params = SamplingParams(max_tokens=3, temperature=0, ignore_eos=True)
    prompts = [list(range(20, 31)), [7]]
    texts = []
    for options in ({}, {"backend": "cuda", "device": DEVICE}):
        _, model = load("deepseek", **options)
        with LLM.from_engine(assemble(model, Letters(), CONFIG, None, 1 << 30)) as llm:
            texts.append([c.token_ids for c in llm.generate(prompts, params)])
    assert texts[0] == texts[1]
    assert [len(ids) for ids in texts[0]] == [3, 3]


def test_a_cache_beyond_its_room_in_vram_is_refused(load: Loader) -> None:
    _, model = load("deepseek", backend="cuda", device=DEVICE)
    with pytest.raises(BudgetError, match="of VRAM are free"):
        assemble(model, Letters(), CONFIG, None, 1 << 10)


def test_stats_tell_what_was_planned_and_booked(load: Loader) -> None:
    _, model = load("deepseek", backend="cuda", device=DEVICE)
    engine = assemble(model, Letters(), CONFIG, None, 1 << 30)
    try:
        assert "vram" not in engine.stats()  # nobody planned
        engine.placement = Placement("cuda", "", vram=1 << 30)
        found = engine.stats()["vram"]
        assert found["booked"] == model.backend.bench.ledger.used > 0
    finally:
        engine.close()
    assert found["budget"] == 1 << 30
    if DEVICE == "cuda":
        assert found["peak_reserved"] >= found["reserved"] >= found["booked"]

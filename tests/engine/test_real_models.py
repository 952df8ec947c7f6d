"""The engine on real architectures with random weights: what batching, chunks, reuse and
preemption give is what one pass over the whole text gives.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from greenroom.convert.synth import Synthesis, write_synthetic
from greenroom.convert.synth_shapes import shape_of
from greenroom.engine import LLM, Completion, SamplingParams

SHAPES = ["gpt-oss-20b-tiny", "qwen3-30b-a3b-tiny", "deepseek-moe-16b-tiny"]
PARAMS = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True, logprobs=0)
PROMPTS = [[(7 * i * i + 3 * j + i * j * j) % 250 for j in range(2 + 19 * i)] for i in range(5)]

# Every variant of the same work; block 8 and chunk 24 cut prompts at many places.
VARIANTS: dict[str, dict[str, Any]] = {
    "one at a time": {"max_sequences": 1, "prefix_cache": False},
    "batched in chunks": {"max_sequences": 5, "prefix_cache": False},
    "batched with reuse": {"max_sequences": 5},
    "preempted": {"max_sequences": 5, "cache_tokens": 256},
}


@pytest.fixture(scope="module", params=SHAPES)
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / f"{request.param}.gguf"
    write_synthetic(Synthesis(shape_of(request.param, None), mix="F32", seed=1), path)
    return path


def engine(path: Path, **settings: Any) -> LLM:
    common = {"backend": "reference", "kv_type": "f32", "threads": 1, "context_length": 256}
    return LLM(path, **{"block_size": 8, "prefill_chunk": 24, **common, **settings})


def hold(prompts: list[list[int]], answers: list[Completion], llm: LLM) -> None:
    """Each token must be the likeliest, with the log-probability of one pass over the text."""
    for prompt, answer in zip(prompts, answers, strict=True):
        logits = llm.logits([*prompt, *answer.token_ids]).astype(np.float64)
        scores = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        for index, output in enumerate(answer.outputs):
            row = scores[len(prompt) + index - 1]
            assert row[output.token_id] >= row.max() - 1e-3  # equal up to near ties
            assert output.logprob == pytest.approx(row[output.token_id], abs=1e-3)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_way_to_compute_agrees_with_one_pass(path: Path, variant: str) -> None:
    with engine(path, **VARIANTS[variant]) as llm:
        answers = llm.generate(PROMPTS, PARAMS)
        stats = llm.engine.stats()
        if variant == "preempted":
            assert stats["preemptions"] > 0
        assert all(group["held"] == 0 for group in stats["cache"])
    with engine(path, prefill_chunk=256, prefix_cache=False) as plain:
        hold(PROMPTS, answers, plain)


def test_a_second_turn_reuses_the_first_and_agrees(path: Path) -> None:
    with engine(path, max_sequences=5) as llm:
        first = llm.generate(PROMPTS, PARAMS)
        turns = [[*p, *a.token_ids, 9, 8, 7] for p, a in zip(PROMPTS, first, strict=True)]
        second = llm.generate(turns, PARAMS)
        for turn, answer in zip(turns, second, strict=True):
            assert answer.cached_tokens >= len(turn) - 4 - 8  # all but new text and a block
    with engine(path, prefill_chunk=256, prefix_cache=False) as plain:
        hold(turns, second, plain)


def test_window_layers_keep_only_their_window(path: Path) -> None:
    if "gpt-oss" not in path.name:
        pytest.skip("no window layers in this architecture")
    long = [(5 * j + j * j) % 250 for j in range(220)]
    with engine(path, max_sequences=1) as llm:
        window = next(spec.window for spec in llm.engine.model.kv_groups if spec.window)
        held = []
        for _ in llm.stream(long, PARAMS):
            held.append(
                max(group["held"] for group in llm.engine.stats()["cache"] if group["window"])
            )
        assert max(held) <= -(-window // 8) + 2

"""On a CUDA device: steps launched before the host has seen their tokens give the tokens of steps
that wait for it, with the experts in VRAM and in RAM."""

import os
from pathlib import Path

import pytest

from greenroom import LLM, SamplingParams
from greenroom.convert.synth import Synthesis, write_synthetic
from greenroom.convert.synth_shapes import shape_of

pytestmark = pytest.mark.gpu

os.environ.pop("TRITON_INTERPRET", None)
GREEDY = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True)
PARAMS = (
    GREEDY,
    SamplingParams(max_tokens=40, seed=3, ignore_eos=True),
    SamplingParams(max_tokens=40, seed=4, ignore_eos=True, top_k=30, temperature=0.7),
    SamplingParams(max_tokens=40, seed=5, ignore_eos=True, top_p=0.8),
)
PROMPTS = [list(range(3, 10)), [5], list(range(60))]


@pytest.mark.parametrize("shape", ["gpt-oss-20b-tiny", "qwen3-30b-a3b-tiny"])
@pytest.mark.parametrize("slots", [True, False])
def test_tokens_are_those_of_steps_one_by_one(
    shape: str, slots: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.gguf"
    write_synthetic(Synthesis(shape_of(shape, 2)), path)
    with LLM(path, backend="cuda", context_length=256, prefix_cache=False) as llm:
        runner, model = llm.engine._runner, llm.engine.model
        if not slots:  # no budget would make so small a model need the CPU
            for bank in model.backend._beside:
                bank.slots = None
        early, launch = [], runner._launch_early
        monkeypatch.setattr(runner, "_launch_early", lambda *a: (early.append(1), launch(*a)))
        answers = []
        for ahead in (False, True, True):
            runner.looks_ahead = ahead
            answers.append([c.token_ids for p in PARAMS for c in llm.generate(PROMPTS, p)])
        assert answers[0] == answers[1] == answers[2]
        assert model.chains
        assert len(early) > 100
        end = answers[0][0][20]
        stopped = llm.generate(PROMPTS[:1], SamplingParams(
            max_tokens=40, temperature=0, ignore_eos=True, stop_token_ids=(end,)
        ))  # fmt: skip
        whole = llm.generate(PROMPTS[:1], GREEDY)[0].token_ids
        assert stopped[0].token_ids == whole[: whole.index(stopped[0].token_ids[-1]) + 1]
        assert all(group["held"] == 0 for group in llm.engine.stats()["cache"])

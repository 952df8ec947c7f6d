"""When results are handed out: beside a step that is only launched, before one that is computed,
in order, and at once where nothing follows."""

import threading
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
from torch import Tensor

from greenroom.engine import LLM, SamplingParams
from greenroom.engine.collect import Collector
from greenroom.layers.batch import Batch, KVCache, Launched
from greenroom.layers.choice import likeliest

from .fake_model import FakeModel, fake_engine

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


class LaunchedModel(FakeModel):
    """Decode steps are launched; notes what happens in which order."""

    def __init__(self) -> None:
        super().__init__((None, 6))
        self.events: list[str] = []
        self.fails_at = 10**9
        self.prepared: list[Batch] = []

    def launch(self, batch: Batch, caches: Sequence[KVCache]) -> Launched | None:
        if len(batch.tokens) != len(batch.context_lengths):
            return None
        if int(batch.positions.max()) >= self.fails_at:
            raise RuntimeError("the device is gone")
        self.events.append(
            "launch"
            if not any(batch is known for known in self.prepared[-1:])
            else "prepared launch"
        )
        logits = super().forward(batch, caches)
        return Launched(logits, likeliest(logits), nullcontext())

    def prepare(self, batch: Batch, caches: Sequence[KVCache]) -> None:
        self.prepared.append(batch)

    def forward(self, batch: Batch, caches: Sequence[KVCache]) -> Tensor:
        self.events.append("forward")
        return super().forward(batch, caches)


def served(model: FakeModel, prompt: list[int], sink: Any, params: SamplingParams = GREEDY) -> None:
    """Runs one request with a sink of its own, to its end or until the sink fails."""
    done = threading.Event()

    def tell(item: Any) -> None:
        ended = isinstance(item, Exception) or item.finish_reason
        try:
            sink(item)
        except Exception:
            ended = True
            raise
        finally:
            if ended:
                done.set()

    engine = fake_engine(model)
    engine._runner._collector = Collector(remote=True)
    with LLM.from_engine(engine) as llm:
        engine.start(prompt, params, None, tell)
        assert done.wait(10)
        assert len(llm.generate([[1, 2]], replace(GREEDY, max_tokens=2))[0].token_ids) == 2
    assert engine.stats()["running"] == 0


def test_results_are_handed_out_beside_the_next_launch() -> None:
    model = LaunchedModel()
    served(model, [3, 4, 5], lambda item: model.events.append(f"token {item.finish_reason}"))
    first = model.events.index("token None")
    assert model.events[:first] == ["forward", "launch"]
    assert model.events.index("token length") > model.events.index("launch")
    # One request alone: all but the first launch had been laid out before.
    assert model.events[:12].count("launch") == 1


def test_texts_of_launched_steps_are_those_of_computed_ones() -> None:
    answers = []
    for model in (FakeModel((None, 6)), LaunchedModel()):
        engine = fake_engine(model)
        engine._runner._collector = Collector(remote=isinstance(model, LaunchedModel))
        with LLM.from_engine(engine) as llm:
            answers.append([c.text for c in llm.generate([[3, 4, 5], [9], [7] * 20], GREEDY)])
    assert answers[0] == answers[1]


def test_tokens_come_before_the_error_that_ends_them() -> None:
    model = LaunchedModel()
    model.fails_at = 5
    items: list[Any] = []
    served(model, [3, 4, 5], items.append)
    assert [item.finish_reason for item in items[:3]] == [None] * 3  # positions 2, 3 and 4
    assert str(items[3]) == "the device is gone"
    assert len(items) == 4


def test_a_listener_that_is_gone_ends_its_request_only() -> None:
    model, heard = LaunchedModel(), []

    def sink(item: Any) -> None:
        heard.append(item)
        raise RuntimeError("nobody listens")

    served(model, [3, 4, 5], sink, SamplingParams(temperature=0, ignore_eos=True))
    assert len(heard) == 1


@pytest.mark.parametrize("blocks", [None, 14])
def test_steps_laid_out_ahead_give_the_same_texts(blocks: int | None) -> None:
    """Requests of different lengths that come and go, with and without room for all of them."""
    prompts = [list(range(1, 4 + 5 * i)) for i in range(6)]
    answers = []
    for model in (FakeModel((None, 6)), LaunchedModel()):
        engine = fake_engine(
            model, context_length=48, cache_tokens=None if blocks is None else 4 * blocks
        )
        engine._runner._collector = Collector(remote=isinstance(model, LaunchedModel))
        with LLM.from_engine(engine) as llm:
            found = []
            for most in (3, 17):
                params = replace(GREEDY, max_tokens=most)
                found += [c.token_ids for c in llm.generate(prompts, params)]
            answers.append(found)
    assert answers[0] == answers[1]
    assert model.events.count("prepared launch") > 8


def test_a_context_that_is_full_is_not_laid_out_beyond_its_end() -> None:
    model = LaunchedModel()
    engine = fake_engine(model, context_length=8)
    with LLM.from_engine(engine) as llm:
        answer = llm.generate([[3, 4, 5]], SamplingParams(temperature=0, ignore_eos=True))[0]
    assert (len(answer.token_ids), answer.finish_reason) == (5, "length")

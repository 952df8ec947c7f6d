"""What goes wrong in one place stays there: closing in the middle of a submission, a step that
fails while it is given up, a request that ends between two tries of its step."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from fake_model import Chained, FakeModel, fake_engine

from greenroom.engine import LLM, SamplingParams
from greenroom.engine.collect import Collector
from greenroom.engine.prefix_store import PrefixStore
from greenroom.errors import EngineClosedError, GreenroomError

GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)


def test_closing_while_a_request_is_handed_in_leaves_nobody_waiting() -> None:
    engine = fake_engine()
    items: list[Any] = []
    closing = threading.Thread(target=engine.close)
    call = engine._call

    def late(action: Any) -> None:
        closing.start()
        closing.join(0.5)  # the engine is closed meanwhile, if it can be
        call(action)

    engine._call = late  # type: ignore[method-assign]
    engine.start([1, 2, 3], GREEDY, None, items.append)
    closing.join(20)
    assert not closing.is_alive()
    assert isinstance(items[-1], EngineClosedError)


def test_a_step_that_fails_while_it_is_given_up_does_not_keep_callers_waiting() -> None:
    class Lost(Chained):
        @contextmanager
        def answer(self) -> Iterator[None]:
            late = closed.is_set()
            yield
            if late:
                raise RuntimeError("the device is gone")

    model, closed = Lost(), threading.Event()
    engine = fake_engine(model)
    engine._runner._collector = Collector(remote=True)
    items: list[Any] = []

    def sink(item: Any) -> None:
        items.append(item)
        if len(items) == 5:  # a step is under way then
            closed.set()
            engine.close()

    with engine.together():
        engine.start([3, 4, 5], GREEDY, None, sink)
    engine._thread.join(20)
    assert isinstance(items[-1], EngineClosedError)
    assert model.early > 0


def test_a_request_that_ends_between_two_tries_of_its_step_writes_nowhere() -> None:
    """Without a row of its own it would take the last one, which is somebody else's."""

    class Poor(FakeModel):
        """The second step with two requests finds no memory the first time."""

        both = 0

        def forward(self, batch: Any, caches: Any) -> Any:
            self.both += len(batch.context_lengths) == 2
            if self.both == 2:
                self.both += 1
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().forward(batch, caches)

        def relieve(self) -> int:
            return 1 << 20

    prompt = list(range(2, 32))
    with LLM.from_engine(fake_engine(FakeModel())) as llm:
        expected = llm.generate([prompt], GREEDY)[0].token_ids
    model = Poor()
    engine = fake_engine(model, max_sequences=2, prefix_cache=False)
    own: list[Any] = []
    others: list[Any] = []
    done = threading.Event()

    def first(item: Any) -> None:
        own.append(item)
        if len(own) == 1:
            engine.start(prompt, GREEDY, None, second)
        if len(own) == 3:  # given out when the second step with both is laid out
            raise RuntimeError("nobody listens")

    def second(item: Any) -> None:
        others.append(item)
        if isinstance(item, Exception) or item.finish_reason:
            done.set()

    with LLM.from_engine(engine):
        engine.start([3, 4, 5], GREEDY, None, first)
        assert done.wait(20)
    assert len(own) == 3
    assert tuple(item.token_id for item in others) == expected


@pytest.mark.parametrize("fails", ["cat", "to"])
def test_prefixes_are_kept_and_come_back_when_vram_is_full(
    fails: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = torch.arange(48.0).view(4, 12).half()
    wanted, calls = keys[1].clone(), []
    store = PrefixStore(2**20, [[keys, keys.clone()]])
    whole = getattr(torch if fails == "cat" else torch.Tensor, fails)

    def once(*given: Any, **settings: Any) -> Any:
        calls.append(given)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(*given, **settings)

    monkeypatch.setattr(torch if fails == "cat" else torch.Tensor, fails, once)
    store.keep((0, b"a"), 1)
    store.restore((0, b"a"), 2, store.take((0, b"a")))
    assert torch.equal(keys[2], wanted)
    assert calls


def test_rows_of_several_scored_prompts_share_one_limit() -> None:
    model = FakeModel((None,))
    engine = fake_engine(model, prefill_chunk=32, context_length=128)
    limit = 8
    make = engine._sequence

    def limited(tokens: Any, want: Any) -> Any:
        sequence = make(tokens, want)
        sequence.chunk_limit = None if want == "next" else limit
        return sequence

    engine._sequence = limited  # type: ignore[method-assign]
    scored = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    prompts = [[3] * 30, [4] * 25, [5] * 28]
    with LLM.from_engine(engine) as llm:
        answers = llm.generate(prompts, scored)
    assert [len(a.outputs[0].prompt_logprobs or ()) for a in answers] == [30, 25, 28]
    assert max(len(step.output_rows) for step in model.steps) <= limit
    with pytest.raises(GreenroomError):
        engine.start([1], scored, None, print)

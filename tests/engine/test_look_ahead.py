"""Steps launched before the host has seen their tokens: the same tokens as without, one step in
vain where an answer ends unforeseen, none where that is known, and no block left behind."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
from fake_model import Chained, FakeModel, fake_engine

from greenroom import LLM, SamplingParams
from greenroom.engine.collect import Collector
from greenroom.errors import GreenroomError, NativeError
from greenroom.layers.batch import Batch, Launched

GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
PROMPTS = [[3, 4, 5], [9], list(range(1, 21)), [40, 41, 42, 43, 44]]


@contextmanager
def served(model: FakeModel, **settings: object) -> Iterator[LLM]:
    """An LLM on the model; in the end nothing may be left of what was asked of it."""
    engine = fake_engine(model, prefix_cache=False, **settings)
    runner = engine._runner
    runner._collector = Collector(remote=isinstance(model, Chained))
    with LLM.from_engine(engine) as llm:
        yield llm
    assert runner.under_way is None
    assert [group["held"] for group in engine.stats()["cache"]] == [0, 0]
    assert getattr(model, "open", 0) == 0


def tokens(llm: LLM, prompts: list[list[int]], *params: SamplingParams) -> list[tuple[int, ...]]:
    return [c.token_ids for p in params for c in llm.generate(prompts, p)]


@pytest.mark.parametrize("blocks", [None, 20])
@pytest.mark.parametrize(
    "params",
    [
        GREEDY,
        replace(GREEDY, temperature=0.9, seed=5),
        replace(GREEDY, temperature=1.2, seed=5, top_k=20, min_p=0.1),
        replace(GREEDY, temperature=0.9, seed=6, top_p=0.9),
        replace(GREEDY, logprobs=2),
        replace(GREEDY, repetition_penalty=1.3),
    ],
)
def test_tokens_are_those_of_steps_one_by_one(params: SamplingParams, blocks: int | None) -> None:
    settings = {"context_length": 48, "cache_tokens": None if blocks is None else 4 * blocks}
    asked = [replace(params, max_tokens=most) for most in (3, 17, 24)]
    answers = []
    for model in (FakeModel((None, 6)), Chained()):
        with served(model, **settings) as llm:
            answers.append(tokens(llm, PROMPTS, *asked) + tokens(llm, PROMPTS[2:3], *asked))
    assert answers[0] == answers[1]
    on_the_host = params.logprobs is not None or params.repetition_penalty != 1
    assert model.early == 0 if on_the_host else model.early > 20


def test_only_an_end_that_nobody_foresaw_costs_a_step() -> None:
    model = Chained()
    with served(model) as llm:
        answer = tokens(llm, [[3, 4, 5]], GREEDY)[0]
        assert model.launched == len(answer) - 1  # max_tokens is foreseen
        end = next(i for i, token in enumerate(answer) if token not in answer[:i] and i > 4)
        model.launched = model.early = 0
        stopped = tokens(llm, [[3, 4, 5]], replace(GREEDY, stop_token_ids=(answer[end],)))[0]
        assert stopped == answer[: end + 1]
        assert model.launched == end + 1  # end steps behind the prompt's, and one in vain
        text = llm.generate([[3, 4, 5]], GREEDY)[0].text
        stop = text[6:8]
        cut = llm.generate([[3, 4, 5]], replace(GREEDY, stop=(stop,)))[0]
        assert cut.text == text[: text.index(stop)]
        assert tokens(llm, [[3, 4, 5]], GREEDY)[0] == answer


def test_what_is_left_of_a_batch_takes_the_step_that_is_under_way() -> None:
    model = Chained()
    with served(FakeModel((None, 6))) as llm:
        alone = tokens(llm, PROMPTS, GREEDY)
    ends = tuple(answer[5 + i] for i, answer in enumerate(alone))
    with served(model) as llm:
        found = tokens(llm, PROMPTS, replace(GREEDY, stop_token_ids=ends))
    cut = [next(i for i, token in enumerate(answer) if token in ends) for answer in alone]
    assert len(set(cut)) > 2  # they end one after another
    assert found == [answer[: at + 1] for answer, at in zip(alone, cut, strict=True)]
    assert model.early > 1


def test_requests_come_and_are_cancelled_in_the_middle() -> None:
    with served(FakeModel((None, 6))) as llm:
        alone = tokens(llm, PROMPTS, GREEDY)
    model, answers = Chained(), [[], [], []]
    done = threading.Event()
    with served(model) as llm:
        engine = llm.engine

        def first(item: Any) -> None:
            answers[0].append(item.token_id)
            if len(answers[0]) == 6:
                jobs.append(engine.start(PROMPTS[2], GREEDY, None, third))

        def second(item: Any) -> None:
            answers[1].append(item.token_id)
            if len(answers[1]) == 12:
                engine.cancel(jobs[1])

        def third(item: Any) -> None:
            answers[2].append(item.token_id)
            if item.finish_reason:
                done.set()

        jobs: list[Any] = []
        with engine.together():  # from here on all happens on the engine's thread, in one order
            jobs.append(engine.start(PROMPTS[0], GREEDY, None, first))
            jobs.append(engine.start(PROMPTS[1], GREEDY, None, second))
        assert done.wait(60)
    assert tuple(answers[0]) == alone[0]
    assert tuple(answers[1]) == alone[1][: len(answers[1])]
    assert 12 <= len(answers[1]) <= 14
    assert tuple(answers[2]) == alone[2]
    assert model.early > 10


def test_a_token_only_the_host_can_choose_discards_what_began_without_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("greenroom.layers.choice.HEAD", 2)
    monkeypatch.setattr("greenroom.engine.runner.PAUSE", 3)
    params = replace(GREEDY, temperature=0.8, seed=3, top_p=0.5, max_tokens=60)
    answers = []
    for model in (FakeModel((None, 6)), Chained()):
        with served(model) as llm:
            answers.append(tokens(llm, PROMPTS[:1], params) + tokens(llm, PROMPTS, params))
    assert answers[0] == answers[1]
    assert model.early > 0


def test_logits_that_are_no_numbers_end_the_request_as_ever() -> None:
    model = Chained()
    with served(model) as llm:
        model.embedding[tokens(llm, [[3, 4, 5]], GREEDY)[0][4]] = float("nan")
        with pytest.raises(GreenroomError, match="not numbers"):
            llm.generate([[3, 4, 5]], GREEDY)


def test_a_failure_of_the_early_step_does_not_take_the_token_before_it() -> None:
    model, items = Chained(), []
    done = threading.Event()

    def sink(item: Any) -> None:
        items.append(item)
        if isinstance(item, Exception):
            done.set()

    with served(model) as llm:
        model.fails_at = 4
        llm.engine.start([3, 4, 5], GREEDY, None, sink)
        assert done.wait(10)
        assert [isinstance(item, Exception) for item in items] == [False] * 5 + [True]
        assert str(items[-1]) == "the device is gone"
        model.fails_at = 10**9
        assert len(tokens(llm, [[3, 4, 5]], GREEDY)[0]) == 24


def test_rows_outlast_the_steps_that_are_taken_apart_after_a_failure() -> None:
    """They are fetched through memory that the next step writes to."""

    class Once(Chained):
        """Fails in the fourth step of several sequences."""

        def launch(self, batch: Batch, *given: Any) -> Launched | None:
            self.several += len(batch.tokens) > 1
            if self.several == 4:
                self.several += 1
                raise RuntimeError("once")
            return super().launch(batch, *given)

    params = replace(GREEDY, logprobs=1)
    with served(FakeModel((None, 6))) as llm:
        expected = tokens(llm, PROMPTS, params)
    model = Once()
    model.several = 0
    with served(model) as llm:
        assert tokens(llm, PROMPTS, params) == expected
    assert model.several > 4


def test_a_step_in_vain_that_fails_concerns_nobody(caplog: pytest.LogCaptureFixture) -> None:
    model = Chained()

    @contextmanager
    def failing() -> Iterator[None]:
        yield
        if model.launched > 4:
            raise NativeError("experts: too late")

    with served(model) as llm:
        answer = tokens(llm, [[3, 4, 5]], GREEDY)[0]
        end = answer[4]
        assert end not in answer[:4]
        model.launched, model.answer = 0, failing
        params = replace(GREEDY, stop_token_ids=(end,))
        assert tokens(llm, [[3, 4, 5]], params)[0] == answer[:5]
    assert "not needed failed: experts: too late" in caplog.text


def test_switched_off_no_step_is_launched_early() -> None:
    model = Chained()
    with served(model) as llm:
        llm.engine._runner.looks_ahead = False
        tokens(llm, PROMPTS, GREEDY)
    assert model.launched > 10
    assert model.early == 0

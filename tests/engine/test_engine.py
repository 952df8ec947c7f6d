"""The engine on a fake model: whatever is batched, reused, chunked or preempted, a request
gets the tokens it would get alone.
"""

import asyncio
import itertools
import threading
import time
from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from fake_model import FakeModel, FakeTokenizer, fake_engine

from greenroom.engine import LLM, SamplingParams, TokenOutput
from greenroom.errors import ContextLengthError, EngineClosedError, GreenroomError, RequestError

GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
PROMPTS = [[1 + (i * 7 + j * j) % 80 for j in range(3 + 9 * i)] for i in range(6)]


def llm(windows: tuple[int | None, ...] = (None, 6), **settings: Any) -> LLM:
    return LLM.from_engine(fake_engine(FakeModel(windows), **settings))


def expected(windows: tuple[int | None, ...] = (None, 6)) -> list[tuple[int, ...]]:
    """Each prompt in an engine of its own, in one chunk, without reuse."""
    answers = []
    for prompt in PROMPTS:
        with llm(windows, max_sequences=1, prefill_chunk=512, prefix_cache=False) as alone:
            answers.append(alone.generate([prompt], GREEDY)[0].token_ids)
    return answers


@pytest.mark.parametrize("windows", [(None,), (5,), (None, 6), (None, 3, 17)])
def test_batched_equals_single(windows: tuple[int | None, ...]) -> None:
    with llm(windows, max_sequences=4) as batched:
        answers = batched.generate(PROMPTS, GREEDY)
    assert [answer.token_ids for answer in answers] == expected(windows)


def test_prefix_reuse_changes_nothing_but_the_work() -> None:
    with llm() as engine:
        first = engine.generate(PROMPTS, GREEDY)
        again = engine.generate(PROMPTS, GREEDY)
        longer = [answer.token_ids for answer in again]
        turns = [[*p, *t, 5] for p, t in zip(PROMPTS, longer, strict=True)]
        continued = engine.generate(turns, GREEDY)
    with llm(prefix_cache=False) as fresh:
        plain = fresh.generate(turns, GREEDY)
    assert [a.token_ids for a in first] == [a.token_ids for a in again]
    assert [a.token_ids for a in continued] == [a.token_ids for a in plain]
    assert [a.cached_tokens for a in again] == [(len(p) - 1) // 4 * 4 for p in PROMPTS]
    assert all(a.cached_tokens >= len(t) - 5 for a, t in zip(continued, turns, strict=True))
    assert all(a.cached_tokens == 0 for a in plain)


def test_prefixes_pushed_out_come_back_from_ram() -> None:
    settings = {"context_length": 96, "cache_tokens": 96, "max_sequences": 1}
    with llm(**settings, prefix_ram="1MiB") as engine:
        first = engine.generate(PROMPTS, GREEDY)
        pushed_out = engine.engine.stats()["prefix_store"]["kept_blocks"]
        again = engine.generate(PROMPTS, GREEDY)
        stats = engine.engine.stats()
    with llm(**settings) as plain:
        plain.generate(PROMPTS, GREEDY)
        without = [answer.cached_tokens for answer in plain.generate(PROMPTS, GREEDY)]
        assert "prefix_store" not in plain.engine.stats()
    assert pushed_out > 0
    assert [a.token_ids for a in first] == [a.token_ids for a in again]
    assert [a.cached_tokens for a in again] == [(len(p) - 1) // 4 * 4 for p in PROMPTS]
    assert sum(without) < sum(a.cached_tokens for a in again)
    store = stats["prefix_store"]
    assert store["restored_blocks"] > 0
    assert 0 < store["bytes"] == stats["memory"]["prefixes.ram"] <= store["budget"] == 2**20


def test_preemption_changes_nothing() -> None:
    with llm(max_sequences=6, cache_tokens=96, context_length=96) as tight:
        answers = tight.generate(PROMPTS, GREEDY)
        assert tight.engine.stats()["preemptions"] > 0
    assert [answer.token_ids for answer in answers] == expected()


def test_blocks_come_back() -> None:
    with llm() as engine:
        engine.generate(PROMPTS, GREEDY)
        assert all(group["held"] == 0 for group in engine.engine.stats()["cache"])


def test_a_long_prefill_never_stalls_decodes_for_more_than_a_chunk() -> None:
    model = FakeModel((None,))
    engine = fake_engine(model, prefill_chunk=16, context_length=400)
    with LLM.from_engine(engine) as served:
        # The first is still decoding when the second, whenever it is queued, is prefilled.
        served.generate([[3] * 5, [4] * 300], replace(GREEDY, max_tokens=90))
    for step in model.steps:
        lengths = torch.diff(step.query_starts).tolist()
        assert sum(n for n in lengths if n > 1) <= 16
    decoding = [i for i, step in enumerate(model.steps) if 1 in torch.diff(step.query_starts)]
    assert decoding == list(range(decoding[0], decoding[-1] + 1))  # not one step left out


def test_a_short_prompt_does_not_wait_for_a_long_one() -> None:
    order: list[str] = []
    engine = fake_engine(FakeModel((None,)), prefill_chunk=16, context_length=400)
    one = SamplingParams(temperature=0, max_tokens=1)
    done = threading.Barrier(3)

    def sink(name: str) -> Any:
        return lambda output: (order.append(name), threading.Thread(target=done.wait).start())

    with LLM.from_engine(engine):
        engine.start([4] * 300, one, None, sink("long"))
        engine.start([3] * 12, one, None, sink("short"))
        done.wait(20)
    assert order == ["short", "long"]


def test_stop_strings_across_tokens_never_leak() -> None:
    with llm() as engine:
        whole = engine.generate([PROMPTS[2]], GREEDY)[0]
        stop = whole.text[5:8]
        where = whole.text.index(stop)
        params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, stop=(stop, "zzz"))
        outputs = list(engine.stream(PROMPTS[2], params))
    assert "".join(output.text for output in outputs) == whole.text[:where]
    assert outputs[-1].finish_reason == "stop"
    assert all(output.finish_reason is None for output in outputs[:-1])
    assert all(a.time <= b.time for a, b in itertools.pairwise(outputs))


def test_text_held_back_is_given_out_at_the_end() -> None:
    with llm() as engine:
        whole = engine.generate([PROMPTS[2]], GREEDY)[0]
        params = SamplingParams(
            temperature=0, max_tokens=24, ignore_eos=True, stop=whole.text[-3:] + "never"
        )
        answer = engine.generate([PROMPTS[2]], params)[0]
    assert (answer.text, answer.finish_reason) == (whole.text, "length")


def test_an_end_token_ends_and_is_not_text() -> None:
    bias = SamplingParams(temperature=0, logit_bias={0: 1e6})
    with llm() as engine:
        answer = engine.generate([[5, 6, 7]], bias)[0]
        assert (answer.text, answer.token_ids, answer.finish_reason) == ("", (0,), "stop")
        also = SamplingParams(temperature=0, logit_bias={9: 1e6}, stop_token_ids=(9,))
        assert engine.generate([[5, 6, 7]], also)[0].finish_reason == "stop"


def test_the_context_is_an_end_and_a_limit() -> None:
    with llm(context_length=40) as engine:
        free = SamplingParams(temperature=0, ignore_eos=True)
        answer = engine.generate([[5] * 30], free)[0]
        assert (len(answer.token_ids), answer.finish_reason) == (10, "length")
        with pytest.raises(ContextLengthError, match=r"40 prompt tokens .* 40 tokens"):
            engine.generate([[5] * 40], free)
        with pytest.raises(ContextLengthError, match=r"30 prompt tokens and 11 .* 40 tokens"):
            engine.generate([[5] * 30], SamplingParams(max_tokens=11))


@pytest.mark.parametrize("prompt", [[], [97], [-1], ["a"]])
def test_bad_prompts_are_refused(prompt: list[Any]) -> None:
    with llm() as engine, pytest.raises(RequestError):
        engine.generate([prompt], GREEDY)


def test_prompt_logprobs_and_logits_agree() -> None:
    params = SamplingParams(temperature=0, max_tokens=2, prompt_logprobs=3, logprobs=2)
    with llm() as engine:
        engine.generate([PROMPTS[5]], GREEDY)  # reuse must not swallow the prompt's scores
        answer = engine.generate([PROMPTS[5]], params)[0]
        logits = engine.logits(PROMPTS[5])
    reference = torch.log_softmax(torch.from_numpy(logits).double(), -1).numpy()
    scores = answer.outputs[0].prompt_logprobs
    assert scores is not None
    assert scores[0] is None
    assert len(scores) == len(PROMPTS[5])
    for position, score in enumerate(scores[1:]):
        row = reference[position]
        assert score is not None
        assert score.logprob == pytest.approx(row[PROMPTS[5][position + 1]], abs=1e-5)
        best = np.argsort(-row)[:3]
        assert [token for token, _ in score.top] == best.tolist()
    assert answer.outputs[0].logprob == pytest.approx(reference[-1].max(), abs=1e-5)
    assert answer.outputs[1].prompt_logprobs is None


def test_embeddings_are_pooled_over_all_chunks() -> None:
    with llm(prefill_chunk=8) as small, llm(prefill_chunk=512) as large:
        one, other = small.embed(PROMPTS[4]), large.embed(PROMPTS[4])
    assert one.dtype == np.float32
    assert one == pytest.approx(other, abs=1e-6)


def test_the_asynchronous_stream_and_cancelling() -> None:
    engine = fake_engine(FakeModel((None, 6)))
    free = SamplingParams(temperature=0, ignore_eos=True)

    async def read(count: int) -> list[TokenOutput]:
        outputs = []
        stream = engine.stream(PROMPTS[1], free)
        async for output in stream:
            outputs.append(output)
            if len(outputs) == count:
                await stream.aclose()
        return outputs

    async def main() -> None:
        answers = await asyncio.gather(*(read(n) for n in (3, 7, 20)))
        tokens = [[output.token_id for output in answer] for answer in answers]
        assert [len(answer) for answer in tokens] == [3, 7, 20]
        assert tokens[2][:7] == tokens[1]
        assert tokens[1][:3] == tokens[0]
        assert (await engine.embed(PROMPTS[1])).shape == (16,)

    asyncio.run(main())
    wait_until(lambda: not engine.stats()["running"])
    assert all(group["held"] == 0 for group in engine.stats()["cache"])
    engine.close()


def wait_until(condition: Any) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_closing_ends_waiting_requests() -> None:
    engine = fake_engine(FakeModel((None,)))
    stream = LLM.from_engine(engine).stream(PROMPTS[1], SamplingParams(ignore_eos=True))
    next(stream)
    threading.Timer(0.05, engine.close).start()
    with pytest.raises(EngineClosedError):
        list(stream)
    with pytest.raises(EngineClosedError):
        LLM.from_engine(engine).generate([[1]], GREEDY)


@pytest.mark.parametrize("failure", [None, RuntimeError("CUDA error: illegal access\nmore")])
def test_closing_waits_for_what_the_gpu_still_copies(failure, monkeypatch) -> None:
    synchronised = Mock(side_effect=failure)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronised)
    engine = fake_engine(FakeModel((None,)))
    stream = LLM.from_engine(engine).stream(PROMPTS[1], SamplingParams(ignore_eos=True))
    next(stream)
    assert not synchronised.called
    engine.close()
    assert synchronised.call_count == 1
    with pytest.raises(EngineClosedError):
        list(stream)


class BrokenModel(FakeModel):
    """Fails on any batch with token 13."""

    def forward(self, batch: Any, caches: Any) -> Any:
        if (batch.tokens == 13).any():
            raise RuntimeError("token 13")
        return super().forward(batch, caches)


def test_a_failing_request_leaves_the_others_alone() -> None:
    engine = fake_engine(BrokenModel((None, 6)))
    results: dict[int, list[Any]] = {0: [], 1: [], 2: []}
    prompts = [PROMPTS[1], [5, 13, 7], PROMPTS[2]]
    params = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True, logit_bias={13: -1e9})
    for index, prompt in enumerate(prompts):
        engine.start(prompt, params, None, results[index].append)
    wait_until(lambda: not engine.stats()["running"] and len(results[2]) == 9)
    assert [str(item) for item in results[1]] == ["token 13"]
    for index in (0, 2):
        assert results[index][-1].finish_reason == "length"
    assert all(group["held"] == 0 for group in engine.stats()["cache"])
    engine.close()


class Alternating:
    """A grammar of even and odd tokens by turns that is complete after six."""

    def __init__(self) -> None:
        self.count = 0

    def mask(self) -> Any:
        return np.arange(97) % 2 == self.count % 2

    def accept(self, token_id: int) -> None:
        self.count += 1

    def finished(self) -> bool:
        return self.count == 6


class Impossible(Alternating):
    def mask(self) -> Any:
        return np.zeros(97, np.bool_)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_grammar_is_kept_and_ends_the_answer(temperature: float) -> None:
    engine = fake_engine()
    params = SamplingParams(temperature=temperature, top_p=0.9, ignore_eos=True)
    outputs: list[Any] = []
    engine.start([1, 2, 3], params, Alternating(), outputs.append)
    wait_until(lambda: outputs and getattr(outputs[-1], "finish_reason", "error"))
    assert [output.token_id % 2 for output in outputs] == [0, 1, 0, 1, 0, 1]
    assert outputs[-1].finish_reason == "stop"
    refused: list[Any] = []
    engine.start([1, 2, 3], params, Impossible(), refused.append)
    wait_until(lambda: refused)
    assert isinstance(refused[0], GreenroomError)
    engine.close()


def test_a_seed_gives_the_same_tokens_in_any_company() -> None:
    seeded = SamplingParams(seed=5, max_tokens=20, ignore_eos=True)
    with llm() as engine:
        alone = engine.generate([PROMPTS[2]], seeded)[0].token_ids
        again = engine.generate([PROMPTS[2]], seeded)[0].token_ids
        company = engine.generate([PROMPTS[2], *PROMPTS], seeded)
        other = engine.generate([PROMPTS[2]], SamplingParams(seed=6, max_tokens=20))[0].token_ids
    assert alone == again == company[0].token_ids
    assert company[3].token_ids != alone  # the same prompt with a seed of its own
    assert other != alone


def test_the_largest_seed_is_followed_by_the_least() -> None:
    with llm() as engine:
        largest = SamplingParams(seed=2**64 - 1, max_tokens=9, ignore_eos=True)
        answers = engine.generate([PROMPTS[2]] * 2, largest)
        zero = engine.generate([PROMPTS[2]], replace(largest, seed=0))[0]
    assert answers[1].token_ids == zero.token_ids


def test_half_a_character_is_never_text() -> None:
    # Force the two bytes of 'é' one after the other, whatever the model wants.
    class Spell(Alternating):
        def mask(self) -> Any:
            return np.arange(97) == (90, 91, 92, 93, 92, 93)[self.count]

    engine = fake_engine()
    outputs: list[Any] = []
    engine.start([1], SamplingParams(), Spell(), outputs.append)
    wait_until(lambda: outputs and outputs[-1].finish_reason)
    assert [output.text for output in outputs] == ["", "é", "", "€", "", "€"]
    assert FakeTokenizer().decode([90, 91]) == "é"
    engine.close()


def test_prompts_given_together_share_the_first_step() -> None:
    """Or the texts would depend on which step each of them happened to join."""
    prompts = [[1, 2], [3], [4, 5, 6]] * 2
    for _ in range(20):
        model = FakeModel()
        with LLM.from_engine(fake_engine(model)) as llm:
            llm.generate(prompts, SamplingParams(max_tokens=2, temperature=0, ignore_eos=True))
        assert len(model.steps[0].context_lengths) == 6

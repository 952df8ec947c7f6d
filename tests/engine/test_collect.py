"""Results on their way to the host: tokens chosen where the logits are, rows where they are not."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from greenroom import LLM, SamplingParams
from greenroom.engine.collect import Collector
from greenroom.engine.scheduler import Chunk
from greenroom.engine.sequence import Sequence
from greenroom.errors import GreenroomError
from greenroom.layers.choice import Choice, likeliest

from .fake_model import FakeModel, fake_engine

GREEDY = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)


def chunk(want: str = "next", choice: Choice | None = None, tokens: int = 1) -> Chunk:
    sequence = Sequence(range(tokens), 1, want)
    sequence.choice = choice
    return Chunk(sequence, 0, tokens)


def test_the_likeliest_is_undecided_where_it_is_no_number() -> None:
    inf, nan = float("inf"), float("nan")
    rows = [[1.0, 3.0, 2.0], [1.0, nan, 2.0], [-inf, -inf, -inf], [-inf, 0.5, -inf], [1, inf, 0]]
    assert likeliest(torch.tensor(rows)).tolist() == [1, -1, -1, 1, -1]


def test_each_chunk_gets_what_it_wants() -> None:
    rows = torch.randn(6, 11, generator=torch.Generator().manual_seed(1))
    rows[5, 4] = float("nan")
    greedy = Choice()
    chunks = [chunk(choice=greedy), chunk(), chunk("all", greedy, 2), chunk(), chunk(choice=greedy)]
    chunks[3] = Chunk(chunks[3].sequence, 0, 1)
    ends = [1, 2, 4, 5, 6]
    found = Collector(remote=True).begin(rows, None, chunks, ends).take()
    assert found[0] == int(rows[0].argmax())
    for index, (first, end) in enumerate(((1, 2), (2, 4), (4, 5), (5, 6)), 1):
        np.testing.assert_array_equal(found[index], rows[first:end].numpy())
    known = torch.tensor([8, 0, 0, 0, 0, -1])
    assert Collector(remote=True).begin(rows, known, chunks, ends).take()[0] == 8


def test_rows_in_ram_are_handed_out_as_they_are() -> None:
    rows = torch.randn(2, 5)
    found = Collector().begin(rows, None, [chunk(choice=Choice()), chunk()], [1, 2]).take()
    np.testing.assert_array_equal(np.concatenate(found), rows.numpy())


def test_memory_kept_for_rows_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("greenroom.engine.collect.MOST_PINNED", 2 * 4 * 7)
    rows = torch.randn(3, 7)
    collector = Collector(remote=True)
    fetch = collector.begin(rows, None, [chunk() for _ in range(3)], [1, 2, 3])
    assert [view is None for view in fetch.views] == [False, False, True]
    np.testing.assert_array_equal(np.concatenate(fetch.take()), rows.numpy())


@pytest.mark.parametrize(
    "params",
    [
        GREEDY,
        replace(GREEDY, logprobs=3),
        replace(GREEDY, repetition_penalty=1.3, prompt_logprobs=2),
        replace(GREEDY, logit_bias={4: 2.0}),
        replace(GREEDY, temperature=0.9, seed=5),
        replace(GREEDY, temperature=0.9, seed=5, top_p=0.9),
        replace(GREEDY, temperature=1.2, seed=5, top_k=20, min_p=0.1),
    ],
)
def test_texts_do_not_depend_on_where_logits_are(params: SamplingParams) -> None:
    prompts = [[5, 6, 7], [9, 1], list(range(1, 30)), [40]]
    answers = []
    for remote in (False, True):
        with LLM.from_engine(fake_engine()) as llm:
            llm.engine._runner._collector = Collector(remote)
            answers.append(llm.generate(prompts, params))
    for here, there in zip(*answers, strict=True):
        assert (here.text, here.token_ids) == (there.text, there.token_ids)
        for one, other in zip(here.outputs, there.outputs, strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
            assert (one.prompt_logprobs is None) == (other.prompt_logprobs is None)


def test_logits_that_are_no_numbers_end_the_request_as_ever() -> None:
    model = FakeModel()
    model.head[:] = float("nan")
    with LLM.from_engine(fake_engine(model)) as llm:
        llm.engine._runner._collector = Collector(remote=True)
        with pytest.raises(GreenroomError, match="not numbers"):
            llm.generate([[1, 2]], GREEDY)


def test_without_memory_for_draws_the_host_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def choose(*arguments: object) -> None:
        asked.append(arguments)
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr("greenroom.engine.collect.choose", choose)
    params = replace(GREEDY, temperature=0.9, seed=5)
    answers = []
    for remote in (False, True):
        with LLM.from_engine(fake_engine()) as llm:
            llm.engine._runner._collector = Collector(remote)
            answers.append(llm.generate([[5, 6, 7], [9, 1]], params))
    assert [c.token_ids for c in answers[0]] == [c.token_ids for c in answers[1]]
    assert len(asked) == 1

"""Steps that find no memory: run again once something was given back, or refused in one line."""

import logging

import pytest
import torch
from fake_model import FakeModel, fake_engine

from greenroom import SamplingParams
from greenroom.engine.llm import LLM
from greenroom.errors import BudgetError

PARAMS = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)


class Poor(FakeModel):
    """Fails in every step from the third on until it was relieved `asked` times."""

    def __init__(self, asked: int, rooms: int) -> None:
        super().__init__()
        self.asked, self.rooms, self.abandoned = asked, rooms, 0

    def forward(self, batch, caches):
        if len(self.steps) >= 2 and self.asked > 0:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().forward(batch, caches)

    def abandon(self) -> None:
        self.abandoned += 1

    def relieve(self) -> int:
        if not self.rooms:
            return 0
        self.rooms -= 1
        self.asked -= 1
        return 3 << 20


def texts(model: FakeModel, prompts: list[list[int]]) -> list[tuple[int, ...]]:
    with LLM.from_engine(fake_engine(model)) as llm:
        return [c.token_ids for c in llm.generate(prompts, PARAMS)]


def test_a_step_runs_again_when_memory_was_given_back(caplog: pytest.LogCaptureFixture) -> None:
    prompts = [[1, 2, 3, 4, 5], [7, 8, 9]]
    model = Poor(asked=3, rooms=5)
    with caplog.at_level(logging.WARNING):
        assert texts(model, prompts) == texts(FakeModel(), prompts)
    assert model.abandoned == 3
    assert model.rooms == 2
    said = [record.message for record in caplog.records if "VRAM ran out" in record.message]
    assert len(said) == 1
    assert "3 MiB of experts" in said[0]


def test_where_nothing_can_be_given_back_a_request_fails_in_one_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = Poor(asked=9, rooms=2)
    with LLM.from_engine(fake_engine(model)) as llm:
        with pytest.raises(BudgetError, match="found no VRAM") as caught:
            llm.generate([[1, 2, 3]], PARAMS)
        model.asked = 0  # the other program is gone
        again = llm.generate([[1, 2, 3]], PARAMS)[0].token_ids
    assert "\n" not in str(caught.value)
    assert not any(record.exc_info for record in caplog.records)
    assert [again] == texts(FakeModel(), [[1, 2, 3]])

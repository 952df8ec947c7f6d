"""Tokens chosen where the logits are, against the plain sampler: the same token for the same random
number, the same distribution, and honesty about what is not decided there."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from greenroom.engine.candidates import draw
from greenroom.layers import choice as module
from greenroom.layers.choice import HEAD, UNDECIDED, Choice, choose, likeliest, numbers

VOCABULARY = 3001  # no multiple of anything
FILTERS = [
    (1.0, 0, 1.0, 0.0),
    (0.6, 0, 1.0, 0.0),
    (1.7, 0, 1.0, 0.0),
    (1.0, 40, 1.0, 0.0),
    (1.0, 0, 0.8, 0.0),
    (0.7, 0, 0.5, 0.1),
    (1.0, 0, 1.0, 0.05),
    (0.8, 50, 0.9, 0.02),
    (0.9, HEAD, 0.999, 0.0),
    (1.2, 1, 1.0, 0.0),
]


def peaked(rows: int, seed: int = 0, scale: float = 5.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(rows, VOCABULARY, generator=generator)


def chosen(logits: torch.Tensor, choices: Sequence[Choice | None]) -> list[int]:
    there = torch.tensor(numbers(choices), dtype=torch.float64)
    tokens: list[int] = choose(logits, choices, there).tolist()
    return tokens


def plain(row: torch.Tensor, choice: Choice) -> int:
    return draw(
        row.numpy(),
        choice.uniform,
        temperature=choice.temperature,
        top_k=choice.top_k,
        top_p=choice.top_p,
        min_p=choice.min_p,
    )


@pytest.mark.parametrize("scratch", [1, 4 << 20])
def test_the_same_number_gives_the_token_of_the_plain_sampler(
    scratch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of all kinds in one batch, drawn together or one by one."""
    monkeypatch.setattr(module, "_SCRATCH", scratch)
    source = np.random.default_rng(3)
    logits = peaked(len(FILTERS) + 2)
    for _ in range(40):
        uniforms = source.random(len(FILTERS))
        choices: list[Choice | None] = [
            Choice(*filters, uniform)  # type: ignore[arg-type]
            for filters, uniform in zip(FILTERS, uniforms, strict=True)
        ]
        choices += [Choice(), None]
        found = chosen(logits, choices)
        expected = [
            plain(row, c) for row, c in zip(logits, choices, strict=False) if c and c.temperature
        ]
        assert found[: len(FILTERS)] == expected
        assert found[len(FILTERS) :] == logits[len(FILTERS) :].argmax(-1).tolist()


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-53])
@pytest.mark.parametrize("filters", FILTERS)
def test_the_ends_of_the_range_give_tokens_that_are_allowed(
    filters: tuple[float, int, float, float], uniform: float
) -> None:
    logits = peaked(2, seed=5)
    logits[:, ::3] = -math.inf
    choice = Choice(*filters, uniform)
    for token, row in zip(chosen(logits, [choice, choice]), logits, strict=True):
        assert row[token] > -math.inf
        assert plain(row, choice) == token


@pytest.mark.parametrize("filters", [(1.0, 0, 1.0, 0.0), (0.8, 60, 0.9, 0.01), (1.0, 0, 0.9, 0.0)])
def test_draws_follow_the_distribution(filters: tuple[float, int, float, float]) -> None:
    temperature, top_k, top_p, min_p = filters
    count, rows = 30_000, 500
    logits = peaked(1, seed=9)
    weights = np.sort(np.exp(logits[0].double().numpy() / temperature))[::-1]
    order = logits[0].numpy().argsort()[::-1]
    kept = weights[: top_k or None]
    kept = kept[: np.searchsorted(kept.cumsum(), top_p * kept.sum()) + 1] if top_p < 1 else kept
    kept = kept[kept >= min_p * kept[0]]
    uniforms = np.random.default_rng(2).random(count)
    counts = np.zeros(VOCABULARY)
    for part in uniforms.reshape(-1, rows):
        choices = [Choice(*filters, uniform) for uniform in part]
        np.add.at(counts, chosen(logits.expand(rows, -1), choices), 1)
    expected = count * kept / kept.sum()
    seen = counts[order][: len(kept)]
    assert seen.sum() == count  # nothing that is cut was drawn
    likely = expected >= 5  # the rest counts together
    bins = np.append(seen[likely], seen[~likely].sum())
    means = np.append(expected[likely], expected[~likely].sum())
    bins, means = bins[means > 0], means[means > 0]
    statistic, freedom = float(((bins - means) ** 2 / means).sum()), len(bins) - 1
    # Wilson and Hilferty 1931: about normal after a cube root; 4 sigma
    assert statistic < freedom * (1 - 2 / (9 * freedom) + 4 * math.sqrt(2 / (9 * freedom))) ** 3


def test_a_nucleus_wider_than_the_head_is_undecided() -> None:
    flat = peaked(2, scale=0.01)
    wide, narrow = Choice(1.0, 0, 0.9, 0.0, 0.3), Choice(1.0, 0, 0.9 * HEAD / VOCABULARY, 0.0, 0.3)
    found = chosen(flat, [wide, narrow])
    assert found[0] == UNDECIDED
    assert flat[1, found[1]] >= flat[1].topk(HEAD).values[-1]


def test_rows_that_are_no_numbers_are_undecided() -> None:
    rows = peaked(3)
    rows[1, 7], rows[2] = math.nan, -math.inf
    found = chosen(rows, [Choice(0.8, uniform=0.4)] * 3)
    assert found[0] >= 0
    assert found[1:] == [UNDECIDED, UNDECIDED]
    assert likeliest(rows).tolist() == [int(rows[0].argmax()), UNDECIDED, UNDECIDED]


def test_a_vocabulary_smaller_than_the_head() -> None:
    rows = peaked(1)[:, :90]
    for uniform in (0.1, 0.6, 0.95):
        choice = Choice(1.0, 0, 0.9, 0.0, uniform)
        assert chosen(rows, [choice]) == [plain(rows[0], choice)]

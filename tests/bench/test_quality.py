"""Perplexity and divergence against hand-computed cases, and the evaluation of a fake engine."""

import importlib.util
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from greenroom.bench import quality
from greenroom.bench.quality import Scores, Spool, cut, evaluate, mean_error, scored
from greenroom.engine import LLM
from greenroom.errors import BudgetError, RequestError

_spec = importlib.util.spec_from_file_location(
    "fake_model", Path(__file__).parents[1] / "engine" / "fake_model.py"
)
assert _spec is not None
assert _spec.loader is not None
fake = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fake)


def test_figures_by_hand() -> None:
    # Probabilities (3/4, 1/4) and (1/2, 1/2); the reference says (1/2, 1/2) and (1/2, 1/2).
    logits = np.log(np.array([[0.75, 0.25], [0.5, 0.5]], np.float32)) + 3
    reference = np.zeros((2, 2), np.float32)
    scores = Scores()
    scores.add(logits, np.array([1, 0]), reference)
    base = np.log([2.0, 2.0])
    found = scores.summary(base)
    nll = [math.log(4), math.log(2)]
    assert found["perplexity"] == pytest.approx(math.sqrt(8))
    # the standard deviation of two numbers is their distance over sqrt(2); over sqrt(2) again
    error = abs(nll[0] - nll[1]) / 2
    assert found["perplexity_error"] == pytest.approx(math.sqrt(8) * error)
    assert found["perplexity_ratio"] == pytest.approx(math.sqrt(8) / 2)
    kl = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    assert found["kl_mean"] == pytest.approx(kl / 2)
    assert found["kl_mean_error"] == pytest.approx(kl / 2)
    assert found["kl_median"] == pytest.approx(kl / 2)
    assert found["kl_99"] == pytest.approx(0.99 * kl)
    assert found["top1_agreement"] == 1.0
    assert found["largest_logit_difference"] == pytest.approx(3 + math.log(0.75), abs=1e-5)


def test_disagreement_is_counted() -> None:
    scores = Scores()
    scores.add(np.eye(4, dtype=np.float32), np.zeros(4, int), np.eye(4, dtype=np.float32)[::-1])
    assert scores.summary(np.zeros(4))["top1_agreement"] == 0.0
    assert mean_error(np.array([1.0])) == (1.0, 0.0)


@given(hnp.arrays(np.float32, (5, 7), elements=st.floats(-30, 30, width=32)), st.integers(1, 40))
def test_pieces_do_not_matter(logits: np.ndarray, elements: int) -> None:
    targets = np.arange(5)
    whole, parts = Scores(), Scores()
    whole.add(logits, targets, logits[::-1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quality, "_ELEMENTS", elements)
        parts.add(logits, targets, logits[::-1])
    base = np.zeros(5)
    assert parts.summary(base) == pytest.approx(whole.summary(base))
    expected = -torch.log_softmax(torch.from_numpy(logits).double(), -1)[range(5), range(5)]
    np.testing.assert_allclose(np.concatenate(whole.nll), expected, atol=1e-9)
    assert (np.concatenate(whole.kl) >= 0).all()


def test_windows() -> None:
    found = cut(range(10), 4, 9, [77])
    assert found.tokens == ((77, 0, 1, 2), (77, 3, 4, 5), (77, 6, 7, 8))
    assert found.positions == 9
    assert cut(range(5), 4, 99).tokens == ((0, 1, 2, 3),)  # a lone token predicts nothing
    with pytest.raises(RequestError, match="too short"):
        cut([1], 4, 99)


def test_a_run_against_itself_differs_in_nothing() -> None:
    with LLM.from_engine(fake.fake_engine()) as llm:
        windows = cut([(7 * i) % 90 + 1 for i in range(50)], 20, 99)
        spool = Spool(windows, 97)
        first = evaluate(llm, windows, keep=spool)
        told: list[tuple[int, int]] = []
        again = evaluate(llm, windows, spool, progress=lambda *at: told.append(at))
        spool.close()
        base = np.concatenate(first.nll)
        found = again.summary(base)
        expected = [
            -torch.log_softmax(torch.from_numpy(llm.logits(window)[:-1]).double(), -1)[
                range(len(window) - 1), window[1:]
            ]
            for window in windows.tokens
        ]
    np.testing.assert_allclose(base, torch.cat(expected), atol=1e-9)
    assert found["kl_max"] == 0.0
    assert found["top1_agreement"] == 1.0
    assert found["largest_logit_difference"] == 0.0
    assert found["perplexity_ratio"] == 1.0
    assert told[-1] == (windows.positions, windows.positions)


def test_whoever_stops_listening_stops_the_engine() -> None:
    with LLM.from_engine(fake.fake_engine()) as llm:
        rows = scored(llm, list(range(1, 90)))
        assert len(next(rows)) > 0
        rows.close()
        assert len(llm.logits([1, 2])) == 2


def test_a_full_disk_is_said_before(monkeypatch: pytest.MonkeyPatch) -> None:
    usage: Any = type("Usage", (), {"free": 10})
    monkeypatch.setattr(quality.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(BudgetError, match=r"lower --max-tokens"):
        Spool(cut(range(9), 4, 9), 1000)

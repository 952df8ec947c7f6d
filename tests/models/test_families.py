"""Logits of tiny random models against HF transformers, and one way of running against another."""

import pytest
import torch

from greenroom.models import ARCHITECTURES

from .cases import CASES, MAIN
from .conftest import Loader
from .hf_export import VOCABULARY
from .sessions import Session, one_pass, prompt, relative_error

LENGTH = 37

backends = pytest.mark.parametrize("backend", ["reference", "native"])


@backends
@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("case", CASES)
def test_float32_logits_equal_the_reference(
    load: Loader, case: str, seed: int, backend: str
) -> None:
    tiny, model = load(case, seed, backend=backend)
    tokens = prompt(seed, LENGTH, VOCABULARY)
    assert relative_error(one_pass(model, tokens), tiny.logits(tokens)) < 1e-4


def test_every_architecture_has_a_case() -> None:
    assert {CASES[case].make(1).architecture for case in CASES} == set(ARCHITECTURES)


@backends
@pytest.mark.parametrize("case", MAIN)
@pytest.mark.parametrize("chunks", [(1,) * LENGTH, (5, 17, 1, 14), (36, 1)])
def test_chunks_and_decode_equal_one_pass(
    load: Loader, case: str, chunks: tuple[int, ...], backend: str
) -> None:
    _, model = load(case, backend=backend)
    tokens = prompt(4, LENGTH, VOCABULARY)
    whole = one_pass(model, tokens)
    session, start, parts = Session(model), 0, []
    for size in chunks:
        parts.append(session.step([(0, tokens[start : start + size])]))
        start += size
    assert start == LENGTH
    assert relative_error(torch.cat(parts), whole) < 1e-5


@backends
@pytest.mark.parametrize("case", MAIN)
def test_batched_equals_single(load: Loader, case: str, backend: str) -> None:
    _, model = load(case, backend=backend)
    prompts = [prompt(i, length, VOCABULARY) for i, length in enumerate((19, 1, 33))]
    alone = [one_pass(model, tokens) for tokens in prompts]
    session = Session(model, sequences=3)
    # A prompt, a decode step of another sequence and a chunk of a third in one step.
    first = session.step([(0, prompts[0][:18]), (2, prompts[2][:20])])
    second = session.step([(2, prompts[2][20:]), (0, prompts[0][18:]), (1, prompts[1])])
    assert relative_error(first[:18], alone[0][:18]) < 1e-5
    assert relative_error(first[18:], alone[2][:20]) < 1e-5
    assert relative_error(second, torch.cat([alone[2][20:], alone[0][18:], alone[1]])) < 1e-5


@backends
@pytest.mark.parametrize("case", MAIN)
def test_only_wanted_rows_are_returned(load: Loader, case: str, backend: str) -> None:
    _, model = load(case, backend=backend)
    tokens = prompt(5, LENGTH, VOCABULARY)
    last = Session(model).step([(0, tokens)], last_only=True)
    assert last.shape == (1, VOCABULARY)
    assert relative_error(last, one_pass(model, tokens)[-1:]) < 1e-5


@backends
@pytest.mark.parametrize("case", MAIN)
def test_hidden_states_equal_the_reference(load: Loader, case: str, backend: str) -> None:
    tiny, model = load(case, backend=backend)
    tokens = prompt(6, LENGTH, VOCABULARY)
    session = Session(model)
    found = model.hidden(session.batch([(0, tokens)]), session.caches)
    assert relative_error(found, tiny.hidden(tokens)) < 1e-4

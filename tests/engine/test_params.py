"""Sampling parameters and engine settings: what is accepted, and how the rest is refused."""

from typing import Any

import pytest

from greenroom.engine.config import EngineConfig, resolve
from greenroom.engine.params import SamplingParams
from greenroom.errors import BudgetError, RequestError


def test_values_at_the_borders_are_accepted() -> None:
    params = SamplingParams(
        max_tokens=1, temperature=0, top_k=0, top_p=1, min_p=1, stop="end", logit_bias={0: -100}
    )
    assert params.stop == ("end",)
    assert hash(SamplingParams(stop=["a", "b"]).stop)
    assert not params.penalised
    assert SamplingParams(logit_bias={3: -float("inf")}).logit_bias[3] < 0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", 1.5),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", "hot"),
        ("top_k", -1),
        ("top_k", True),
        ("top_p", 0),
        ("top_p", 1.01),
        ("min_p", -0.5),
        ("repetition_penalty", 0),
        ("presence_penalty", float("nan")),
        ("frequency_penalty", 1e9),
        ("seed", 2**70),
        ("logprobs", -1),
        ("prompt_logprobs", 5000),
        ("stop", ["a", ""]),
        ("stop", [3]),
        ("stop_token_ids", [-1]),
        ("logit_bias", {-2: 1.0}),
        ("logit_bias", {"a": 1.0}),
        ("logit_bias", {1: float("nan")}),
        ("logit_bias", {1: 10**400}),
        ("logit_bias", [1]),
        ("stop", None),
        ("stop_token_ids", 5),
    ],
)
def test_a_wrong_value_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(RequestError, match=field) as caught:
        SamplingParams(**{field: value})
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("context_length", 0),
        ("max_sequences", -1),
        ("block_size", 2.0),
        ("threads", 0),
        ("kv_type", "q4"),
        ("backend", "rocm"),
        ("context_length", 10**12),
        ("max_sequences", 10**6),
        ("block_size", 10**12),
        ("threads", 10**5),
        ("prefill_chunk", 10**30),
        ("cache_tokens", 10**30),
        ("vram", "9" * 400 + "GiB"),
        ("ram", float("inf")),
        ("prefix_ram", "9" * 400),
    ],
)
def test_a_wrong_setting_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(RequestError, match=field):
        EngineConfig(**{field: value})


def resolved(
    model_context: int, free: int, monkeypatch: pytest.MonkeyPatch, **settings: Any
) -> Any:
    monkeypatch.setattr("greenroom.engine.config.available_memory", lambda: free)
    config = EngineConfig(threads=1, **settings)
    return resolve(config, model_context, [None, 100], [32 * 1000, 32 * 500])


def test_the_context_is_the_models_where_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    config = resolved(8192, 10**10, monkeypatch)
    assert config.context_length == 8192
    assert config.cache_blocks[0] == 8192 * 8 // 32
    assert config.cache_blocks[1] < 8192 // 8  # a window group needs far less


def test_the_context_shrinks_with_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    config = resolved(131072, 10**8, monkeypatch)
    assert 2048 <= config.context_length < 25_000  # a quarter of 100 MB, 1000 bytes a token
    assert config.cache_blocks[0] * 32 >= config.context_length


def test_a_small_cache_has_a_small_context(monkeypatch: pytest.MonkeyPatch) -> None:
    config = resolved(8192, 10**10, monkeypatch, cache_tokens=1000)
    assert (config.context_length, config.cache_blocks[0]) == (1000, 32)


def test_a_context_that_cannot_fit_is_refused_with_both_sizes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(BudgetError, match=r"1\.\d GiB.*0\.9 GiB"):
        resolved(131072, 10**9, monkeypatch, context_length=2_000_000)
    with pytest.raises(RequestError, match=r"cache_tokens is 10, .* 64"):
        resolved(131072, 10**9, monkeypatch, context_length=64, cache_tokens=10)

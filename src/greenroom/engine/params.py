"""What a caller may ask of one request: how long, and how tokens are chosen.

Validated when constructed, frozen afterwards. Knows neither the model nor its vocabulary.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from greenroom.errors import ContextLengthError, RequestError

_NO_BIAS: Mapping[int, float] = MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How one request's tokens are chosen, and when it ends.

    The order is: logit bias and penalties, grammar, temperature, top-k, top-p, min-p; each
    filter sees the distribution the one before it left, renormalised. Log-probabilities are
    those of the model itself, before any of this.

    Args:
        max_tokens: most tokens to generate; None means until the context is full.
        temperature: divides the logits; 0 always takes the likeliest token.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the fewest likeliest tokens whose probabilities reach this sum.
        min_p: drop tokens less likely than this share of the likeliest one.
        presence_penalty: subtracted from the logit of each token generated before.
        frequency_penalty: subtracted once for each time a token was generated before.
        repetition_penalty: divides positive, multiplies negative logits of every token in
            the prompt or generated before (Keskar et al. 2019, section 4.1).
        logit_bias: added to the logits, by token id; -inf rules a token out.
        seed: the same seed gives the same tokens whatever else is in the batch; None draws one.
        stop: texts that end the answer; they are not part of it. One string or several.
        stop_token_ids: tokens that end the answer, besides the model's own.
        ignore_eos: do not end at the model's end-of-generation tokens.
        logprobs: also return the chosen token's log-probability and those of this many
            likeliest tokens.
        prompt_logprobs: the same for every prompt token but the first.

    Raises:
        RequestError: a value is out of range; `field` names the parameter.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=lambda: _NO_BIAS)
    seed: int | None = None
    stop: str | tuple[str, ...] | list[str] = ()
    stop_token_ids: tuple[int, ...] | list[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name, (make, noun) in _MADE.items():
            try:
                made = make(getattr(self, name))
            except (TypeError, ValueError):
                raise RequestError(f"{name} must be {noun}", name) from None
            object.__setattr__(self, name, made)
        for name, (low, high, kind) in _RANGES.items():
            _check(name, getattr(self, name), low, high, kind)
        _check_contents(self)

    @property
    def penalised(self) -> bool:
        """Whether earlier tokens change the logits."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )


_MADE: dict[str, tuple[Callable[[Any], Any], str]] = {
    "stop": (tuple, "a text or several"),
    "stop_token_ids": (tuple, "several token ids"),
    "logit_bias": (lambda given: MappingProxyType(dict(given)), "numbers by token id"),
}
_ANY = math.inf
_LARGEST = 3e38  # nearly the largest float32
_RANGES: dict[str, tuple[float, float, str]] = {
    # name: least, most, kind; "?" allows None, "+" excludes the least value itself
    "max_tokens": (1, _ANY, "int?"),
    "temperature": (0, 100, "float"),
    "top_k": (0, _ANY, "int"),
    "top_p": (0, 1, "float+"),
    "min_p": (0, 1, "float"),
    "presence_penalty": (-100, 100, "float"),
    "frequency_penalty": (-100, 100, "float"),
    "repetition_penalty": (0, 100, "float+"),
    "seed": (-(2**63), 2**64 - 1, "int?"),
    "logprobs": (0, 1000, "int?"),
    "prompt_logprobs": (0, 1000, "int?"),
}


def _check(name: str, value: object, low: float, high: float, kind: str) -> None:
    if value is None and kind.endswith("?"):
        return
    whole = kind.startswith("int")
    allowed = (int,) if whole else (int, float)
    noun = "a whole number" if whole else "a number"
    if isinstance(value, bool) or not isinstance(value, allowed):
        raise RequestError(f"{name} must be {noun}, not {value!r}", name)
    open_below = kind.endswith("+")
    if not (low < value if open_below else low <= value) or value > high:  # also refuses NaN
        least = f"more than {low:g}" if open_below else f"at least {low:g}"
        most = "" if high == _ANY else f" and at most {high:g}"
        raise RequestError(f"{name} must be {least}{most}, not {value!r}", name)


def _check_contents(params: SamplingParams) -> None:
    for text in params.stop:
        if not isinstance(text, str) or not text:
            raise RequestError(f"stop must hold non-empty strings, not {text!r}", "stop")
    for token in params.stop_token_ids:
        _check("stop_token_ids", token, 0, _ANY, "int")
    for token, bias in params.logit_bias.items():
        _check("logit_bias", token, 0, _ANY, "int")
        if bias != -_ANY:
            _check("logit_bias", bias, -_LARGEST, _LARGEST, "float")


def check_lengths(tokens: Sequence[int], asked: int, vocabulary: int, context: int) -> None:
    """Raises what is wrong with a prompt of which `asked` more tokens are to be generated.

    Args:
        tokens: the prompt's ids.
        asked: tokens, 0 if none are to be generated.
        vocabulary: ids are below it.
        context: most tokens of both together.
    """
    if not len(tokens):
        raise RequestError("the prompt is empty; give at least one token", "prompt")
    if min(tokens) < 0 or max(tokens) >= vocabulary:
        bad = next(token for token in tokens if not 0 <= token < vocabulary)
        raise RequestError(
            f"token {bad} of the prompt is outside the vocabulary of {vocabulary}", "prompt"
        )
    if len(tokens) + asked > context:
        raise ContextLengthError(
            f"{len(tokens)} prompt tokens and {asked} to generate do not fit the context of "
            f"{context} tokens; shorten the prompt, lower max_tokens or raise context_length",
            "prompt" if asked <= 1 else "max_tokens",
        )

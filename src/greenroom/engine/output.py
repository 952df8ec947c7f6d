"""What a request gives back, and how its text is made: token by token, never half a
character, never a part of a stop string. Knows nothing of how tokens come about.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """How likely the model held one token, and what it held likeliest, in natural logs."""

    logprob: float
    top: tuple[tuple[int, float], ...]  # (token id, log-probability), likeliest first


@dataclass(frozen=True, slots=True)
class TokenOutput:
    """One generated token of a stream.

    Attributes:
        token_id: the token sampled, also when it ended the answer.
        text: text that became certain with it; whole characters only, without stop strings.
        logprob, top_logprobs: natural logs, if the request asked for them.
        finish_reason: on the last output "stop" (end token, stop string, grammar complete),
            "length" (max_tokens or the context is reached) or "cancelled".
        time: when it was sampled, by time.perf_counter(), in seconds.
        prompt_logprobs: on the first output, if asked for: one per prompt token, the first
            of them None.
        cached_tokens: prompt tokens whose keys and values were reused from earlier requests.
    """

    token_id: int
    text: str
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    finish_reason: str | None = None
    time: float = 0.0
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole answer: the outputs of one request put together."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    prompt_tokens: int
    cached_tokens: int
    outputs: tuple[TokenOutput, ...]  # one per token, with times and log-probabilities


class Constraint(Protocol):
    """A grammar that says which tokens may come next."""

    def mask(self) -> NDArray[np.bool_]:
        """(vocabulary,) bool, True where the token is allowed now."""
        ...

    def accept(self, token_id: int) -> None:
        """Takes note of the token chosen."""
        ...

    def finished(self) -> bool:
        """Whether the text is complete, so that nothing may follow."""
        ...


class Decoder(Protocol):
    """Turns token ids into whole characters, one id at a time."""

    def push(self, token_id: int) -> str: ...

    def flush(self) -> str: ...


class StopFilter:
    """Cuts a stream of text at the first of several strings, which it never lets through.

    Text that may turn out to be the beginning of a stop string is held back until the text
    after it decides.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = tuple(stops)
        self.held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Text that is certain now, and whether a stop string was met (then all is said)."""
        if not self.stops:
            return text, False
        text = self.held + text
        found = [at for stop in self.stops if (at := text.find(stop)) >= 0]
        if found:
            self.held = ""
            return text[: min(found)], True
        keep = max(_overlap(text, stop) for stop in self.stops)
        cut = len(text) - keep
        self.held = text[cut:]
        return text[:cut], False

    def flush(self) -> str:
        """What was held back, when nothing follows any more."""
        held, self.held = self.held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-length:]):
            return length
    return 0


class TextStream:
    """The text of one answer as its tokens come in."""

    def __init__(self, decoder: Decoder, stops: Sequence[str]) -> None:
        self.decoder = decoder
        self.filter = StopFilter(stops)

    def push(self, token_id: int) -> tuple[str, bool]:
        """New text, and whether a stop string ended the answer."""
        return self.filter.push(self.decoder.push(token_id))

    def finish(self) -> tuple[str, bool]:
        """The rest of the text when the answer ends by anything but a stop string."""
        text, stopped = self.filter.push(self.decoder.flush())
        return (text, True) if stopped else (text + self.filter.flush(), False)

"""What becomes of the rows a model computed for one request: a sampled token and its text,
the logits of every position, or a pooled hidden state. Knows one request at a time.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from greenroom.engine.collect import Found, Rows
from greenroom.engine.output import TextStream, TokenLogprob, TokenOutput
from greenroom.engine.params import SamplingParams
from greenroom.engine.sampler import Sampler, token_logprob
from greenroom.engine.sequence import Sequence

Sink = Callable[[Any], None]  # takes the request's results, or the exception that ended it


class Job(ABC):
    """A request in the engine: its sequence, where its results go, and why it ended."""

    def __init__(self, sequence: Sequence, sink: Sink) -> None:
        self.sequence = sequence
        self.sink = sink
        self.finish_reason: str | None = None

    @property
    def lasting(self) -> bool:
        """Whether a step that begins before the result of this one is known is likely of use."""
        return False

    @abstractmethod
    def consume(self, found: Found) -> list[Any]:
        """Takes the wanted rows of one chunk; returns results for the sink and sets
        finish_reason with the last.

        Args:
            found: (rows, vocabulary) float32 logits or (rows, hidden) float32 states; or the
                next token, if the sequence has a choice.
        """


class Generation(Job):
    """Samples a token whenever the sequence is complete, and turns tokens into text.

    Args:
        sequence: the prompt; generated tokens are appended to it.
        sink: takes a TokenOutput per token.
        params: how to sample and when to stop.
        sampler: chooses the tokens.
        text: decodes them.
        limit: most tokens of prompt and answer together.
        end_tokens: tokens that end the answer.
    """

    def __init__(
        self,
        sequence: Sequence,
        sink: Sink,
        *,
        params: SamplingParams,
        sampler: Sampler,
        text: TextStream,
        limit: int,
        end_tokens: frozenset[int],
    ) -> None:
        super().__init__(sequence, sink)
        self.params = params
        self.sampler = sampler
        self.text = text
        self.limit = limit
        self.end_tokens = end_tokens
        self.prompt_logprobs: list[TokenLogprob | None] | None = None
        if params.prompt_logprobs is not None:
            self.prompt_logprobs = [None]

    @property
    def lasting(self) -> bool:
        """See `Job.lasting`: only an end token or string can end it."""
        return len(self.sequence) + 1 < self.limit

    def consume(self, found: Found) -> list[TokenOutput]:
        if isinstance(found, int):
            sampled = self.sampler.accept(found)
        else:
            rows = self._score_prompt(found) if self.sequence.want == "all" else found
            if not len(rows):
                return []
            sampled = self.sampler.sample(rows[-1])
        now = time.perf_counter()
        self.sequence.tokens.append(sampled.token_id)
        text, self.finish_reason = self._advance(sampled.token_id)
        output = TokenOutput(
            sampled.token_id,
            text,
            sampled.logprob,
            sampled.top,
            self.finish_reason,
            now,
            self._first_logprobs(),
            self.sequence.reused,
        )
        return [output]

    def _advance(self, token: int) -> tuple[str, str | None]:
        """Text that became certain with a token, and the finish reason if it is the last."""
        if token in self.end_tokens:
            return self.text.finish()[0], "stop"
        text, stopped = self.text.push(token)
        if stopped:
            return text, "stop"
        constraint = self.sampler.constraint
        complete = constraint is not None and constraint.finished()
        if not complete and len(self.sequence) < self.limit:
            return text, None
        rest, stopped = self.text.finish()
        return text + rest, "stop" if complete or stopped else "length"

    def _score_prompt(self, rows: Rows) -> Rows:
        """Scores the prompt with its rows; returns the rows that are left to sample from."""
        sequence, scores = self.sequence, self.prompt_logprobs
        assert scores is not None
        for row in rows:
            sequence.delivered += 1
            if sequence.delivered == sequence.prompt_length:
                sequence.want = "next"
                return rows[-1:]
            token = sequence.tokens[sequence.delivered]
            scores.append(token_logprob(row, token, self.params.prompt_logprobs or 0))
        return rows[:0]

    def _first_logprobs(self) -> tuple[TokenLogprob | None, ...] | None:
        scores, self.prompt_logprobs = self.prompt_logprobs, None
        return None if scores is None else tuple(scores)


class Scoring(Job):
    """Hands out the logits of every prompt position; the sink takes (rows, vocabulary) pieces
    in order and None after the last.
    """

    def consume(self, found: Found) -> list[Rows | None]:
        rows = _rows(found)
        self.sequence.delivered += len(rows)
        if self.sequence.delivered < len(self.sequence):
            return [rows]
        self.finish_reason = "stop"
        return [rows, None]


class Embedding(Job):
    """Pools the hidden states of all positions; the sink takes one (hidden,) float32.

    Args:
        sequence: the text.
        sink: takes the result.
        pooling: "mean" or "last".
    """

    def __init__(self, sequence: Sequence, sink: Sink, pooling: str) -> None:
        super().__init__(sequence, sink)
        self.pooling = pooling
        self.total: NDArray[np.float64] | None = None

    def consume(self, found: Found) -> list[Rows]:
        rows = _rows(found)
        self.sequence.delivered += len(rows)
        if self.pooling == "mean" and len(rows):
            part = rows.sum(axis=0, dtype=np.float64)
            self.total = part if self.total is None else self.total + part
        if self.sequence.delivered < len(self.sequence):
            return []
        self.finish_reason = "stop"
        if self.total is None:
            return [rows[-1].copy()]
        return [(self.total / len(self.sequence)).astype(np.float32)]


def _rows(found: Found) -> Rows:
    assert not isinstance(found, int)  # only a sequence with a choice is given tokens
    return found

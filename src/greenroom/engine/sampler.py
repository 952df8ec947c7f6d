"""Chooses the next token of one request from its logits: bias and penalties, grammar, then
greedy or random. Its state belongs to the request alone, so what else is in the batch never
changes the outcome. Does not know where logits come from.
"""

import random
from collections.abc import Sequence as Items
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from greenroom.engine.candidates import draw, log_sum_exp, top
from greenroom.engine.output import Constraint, TokenLogprob
from greenroom.engine.params import SamplingParams
from greenroom.errors import GreenroomError, RequestError
from greenroom.layers.choice import HEAD, Choice

Row = NDArray[np.float32]


class Sampled(NamedTuple):
    """A chosen token; `logprob` and `top` only if the request asked for them."""

    token_id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]


class Penalties:
    """Presence, frequency and repetition penalties over the tokens seen so far."""

    def __init__(self, params: SamplingParams, prompt: Items[int], vocabulary: int) -> None:
        self.params = params
        self.counts = np.zeros(vocabulary, np.float32)  # times generated
        self.seen = np.zeros(vocabulary, np.bool_)  # in the prompt or generated
        self.seen[np.asarray(prompt, np.int64)] = True
        self.ids = np.flatnonzero(self.seen)  # the same as a list, grown on demand

    def note(self, token_id: int) -> None:
        """Counts a generated token."""
        self.counts[token_id] += 1
        if not self.seen[token_id]:
            self.seen[token_id] = True
            self.ids = np.append(self.ids, token_id)

    def apply(self, row: Row) -> None:
        """Changes the logits of seen tokens in place."""
        params, ids = self.params, self.ids
        values, counts = row[ids], self.counts[ids]
        if params.repetition_penalty != 1.0:
            penalty = np.float32(params.repetition_penalty)
            values = np.where(values > 0, values / penalty, values * penalty)
        values -= np.float32(params.frequency_penalty) * counts
        values -= np.float32(params.presence_penalty) * (counts > 0)
        row[ids] = values


class Sampler:
    """Chooses one request's tokens.

    Args:
        params: how.
        prompt: the prompt's token ids, for the repetition penalty.
        vocabulary: length of a row of logits.
        constraint: a grammar, or None.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt: Items[int],
        vocabulary: int,
        constraint: Constraint | None = None,
    ) -> None:
        self.params = params
        self.constraint = constraint
        self._random = random.Random(params.seed)
        self.penalties = Penalties(params, prompt, vocabulary) if params.penalised else None
        self.bias_ids = np.fromiter(params.logit_bias.keys(), np.int64)
        self.bias = np.fromiter(params.logit_bias.values(), np.float32)
        if self.bias_ids.size and int(self.bias_ids.max()) >= vocabulary:
            raise RequestError(
                f"logit_bias names token {self.bias_ids.max()}, but the vocabulary has only "
                f"{vocabulary} tokens",
                "logit_bias",
            )
        simple = self.penalties is None and constraint is None and not self.bias_ids.size
        self.choice = Choice(
            params.temperature, params.top_k, params.top_p, params.min_p, self._random.random()
        )
        # Whether a device that has the logits can choose by itself.
        self.alone = simple and params.logprobs is None and params.top_k <= HEAD

    def accept(self, token: int) -> Sampled:
        """Takes a token that was chosen by `choice` elsewhere."""
        self.choice.uniform = self._random.random()
        return Sampled(token, None, ())

    def sample(self, logits: Row) -> Sampled:
        """The next token.

        Args:
            logits: (vocabulary,) float32; not changed.
        """
        params = self.params
        row = self._adjust(logits)
        if params.temperature == 0.0:
            token = int(row.argmax())
        else:
            if not np.isfinite(row.max()):
                raise _unusable(row)
            token = draw(
                row,
                self.choice.uniform,
                temperature=params.temperature,
                top_k=params.top_k,
                top_p=params.top_p,
                min_p=params.min_p,
            )
        if not np.isfinite(row[token]):
            raise _unusable(row)
        self.choice.uniform = self._random.random()
        if self.penalties is not None:
            self.penalties.note(token)
        if self.constraint is not None:
            self.constraint.accept(token)
        if params.logprobs is None:
            return Sampled(token, None, ())
        known = token_logprob(logits, token, params.logprobs)
        return Sampled(token, known.logprob, known.top)

    def _adjust(self, logits: Row) -> Row:
        if self.penalties is None and self.constraint is None and not self.bias_ids.size:
            return logits
        row = logits.copy()
        if self.bias_ids.size:
            row[self.bias_ids] += self.bias
        if self.penalties is not None:
            self.penalties.apply(row)
        if self.constraint is not None:
            mask = self.constraint.mask()
            row[: mask.size][~mask[: row.size]] = -np.inf
            row[mask.size :] = -np.inf  # padding of the head beyond the tokenizer's tokens
        return row


def token_logprob(logits: Row, token_id: int, count: int) -> TokenLogprob:
    """The model's log-probability of a token and of the `count` likeliest ones.

    Args:
        logits: (vocabulary,) float32.
    """
    norm = log_sum_exp(logits)
    ids = top(logits, count) if count else np.empty(0, np.int64)
    likeliest = tuple((int(index), float(logits[index]) - norm) for index in ids)
    return TokenLogprob(float(logits[token_id]) - norm, likeliest)


def _unusable(row: Row) -> GreenroomError:
    if np.isnan(row).any():
        return GreenroomError("the model's logits are not numbers (NaN); its file may be damaged")
    return RequestError("no token is allowed here: the grammar or logit_bias excludes all of them")

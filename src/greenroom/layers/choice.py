"""Chooses tokens where the logits are, so that a few integers leave the device instead of rows
of the vocabulary. What cannot be decided there is left to the host. Knows no request.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

UNDECIDED = -1  # the host must look at the logits
HEAD = 256  # likeliest tokens among which top-k and top-p choose; a wider nucleus is undecided
_SPAN = 512  # tokens per partial sum when drawing from the whole vocabulary
_SCRATCH = 4 << 20  # bytes of weights at once


@dataclass(slots=True)
class Choice:
    """How a sequence's next token follows from its logits alone; fields as in SamplingParams.

    Attributes:
        uniform: the random number in [0, 1) of the next draw; whoever draws it sets another.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    uniform: float = 0.0


def likeliest(logits: Tensor) -> Tensor:
    """(n,) int64: the largest of each row (n, vocabulary); undecided if that is no number."""
    largest, tokens = logits.max(-1)
    # Few launches: only of a finite number nothing is left; and a where() would copy from RAM.
    return tokens.masked_fill_(largest.sub_(largest) != 0, UNDECIDED)


def numbers(choices: Sequence[Choice | None]) -> list[list[float]]:
    """What `choose` needs of them: temperature, top-k, top-p, min-p, uniform, each (n,)."""
    rows = [
        (c.temperature, c.top_k, c.top_p, c.min_p, c.uniform) if c else (0, 0, 1, 0, 0)
        for c in choices
    ]
    return [list(column) for column in zip(*rows, strict=True)]


def choose(logits: Tensor, choices: Sequence[Choice | None], there: Tensor) -> Tensor:
    """Draws a token of each row; never waits for the device.

    The same filters in the same order as the engine's sampler. For the same uniform number it
    is the same token, but for rounding and the order within a nucleus of more than 64 tokens.

    Args:
        logits: (n, vocabulary) float32; not changed.
        choices: of each row; with none the likeliest is taken.
        there: (5, n) float64, their `numbers`, where the logits are.

    Returns:
        (n,) int64, -1 where it is undecided.
    """
    step = max(1, _SCRATCH // (4 * logits.shape[1]))
    found = []
    for start in range(0, len(choices), step):
        rows, part = logits[start : start + step], choices[start : start + step]
        tokens = likeliest(rows)
        drawn = [choice for choice in part if choice is not None and choice.temperature > 0]
        if drawn:
            tokens = _drawn(rows, drawn, there[:, start : start + step, None], tokens)
        found.append(tokens)
    return torch.cat(found) if len(found) > 1 else found[0]


def _drawn(logits: Tensor, drawn: Sequence[Choice], there: Tensor, best: Tensor) -> Tensor:
    temperature, top_k, top_p, min_p, uniform = there  # (n, 1) each
    scale = temperature.masked_fill(temperature == 0, 1).reciprocal().float()
    cut = (top_k > 0) | (top_p < 1)  # rows that need the likeliest tokens in order
    total: Tensor | None = None
    tokens = best[:, None]
    if any(not choice.top_k for choice in drawn):
        floor = min_p.masked_fill(cut, 0).float()
        tokens, total = _from_all(logits, best[:, None], scale, floor, uniform)
    if any(choice.top_k or choice.top_p < 1 for choice in drawn):
        head = _from_head(logits, scale, (top_k, top_p, min_p, uniform), total)
        tokens = torch.where(cut, head, tokens)
    tokens = torch.where(temperature > 0, tokens, best[:, None])[:, 0]
    return tokens.masked_fill(best == UNDECIDED, UNDECIDED)


def _from_all(
    logits: Tensor, best: Tensor, scale: Tensor, floor: Tensor, uniform: Tensor
) -> tuple[Tensor, Tensor]:
    """Tokens (n, 1) drawn from all with a weight of `floor` or more, in order of their ids, and
    the sum of the weights (n, 1) float64; the likeliest weighs 1."""
    count, size = logits.shape
    spans = -(-size // _SPAN)
    padded = logits.new_zeros(count, spans * _SPAN)
    weights = padded[:, :size]
    torch.sub(logits, logits.gather(1, best.clamp(min=0)), out=weights)
    weights.mul_(scale).exp_()
    weights.masked_fill_(weights < floor, 0)
    padded = padded.view(count, spans, _SPAN)
    sums = padded.sum(-1, dtype=torch.float64)
    reached = sums.cumsum(-1)
    goal = uniform * reached[:, -1:]
    span = _place(reached, goal)
    own = padded.gather(1, span[:, :, None].expand(-1, -1, _SPAN))[:, 0].double().cumsum(-1)
    before = (reached - sums).gather(1, span)
    return span * _SPAN + _place(own, goal - before), reached[:, -1:]


def _from_head(
    logits: Tensor, scale: Tensor, filters: tuple[Tensor, ...], total: Tensor | None
) -> Tensor:
    """Tokens (n, 1) drawn from the likeliest, in order; undecided where `HEAD` are too few."""
    top_k, top_p, min_p, uniform = filters
    values, ids = logits.topk(min(HEAD, logits.shape[1]))
    weights = ((values - values[:, :1]) * scale).double().exp()
    place = torch.arange(weights.shape[1], device=logits.device)
    weights = weights.masked_fill((top_k > 0) & (place >= top_k), 0)
    reached = weights.cumsum(-1)
    mass = reached[:, -1:] if total is None else torch.where(top_k > 0, reached[:, -1:], total)
    goal = top_p * mass
    before = torch.nn.functional.pad(reached[:, :-1], (1, 0))
    decided = (top_k > 0) | (reached[:, -1:] >= goal)
    weights = weights.masked_fill((before >= goal) | (weights < min_p), 0)
    reached = weights.cumsum(-1)
    tokens = ids.gather(1, _place(reached, uniform * reached[:, -1:]))
    return tokens.masked_fill(~decided, UNDECIDED)


def _place(reached: Tensor, goal: Tensor) -> Tensor:
    """(n, 1): the first place whose running sum exceeds the goal, or the last that adds to it;
    some place where sums are no numbers."""
    last = torch.searchsorted(reached, reached[:, -1:].contiguous())
    place = torch.searchsorted(reached, goal.contiguous(), right=True)
    return torch.minimum(place, last).clamp_(max=reached.shape[1] - 1)

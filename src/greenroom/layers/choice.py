"""Chooses tokens where the logits are, so that a few integers leave the device instead of rows
of the vocabulary. What cannot be decided there is left to the host. Knows no request.
"""

from dataclasses import dataclass

from torch import Tensor

UNDECIDED = -1  # the host must look at the logits


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
    return tokens.masked_fill(~largest.isfinite(), UNDECIDED)  # a where() would copy from RAM

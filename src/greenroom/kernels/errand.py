"""The device's half of an errand: rows of a long step go to pinned memory, a bell tells the CPU
so, and what comes later on the stream waits for the bell that answers. Bells are those of
`kernels/rendezvous.py`, one errand's number after the other.
"""

import triton.language as tl
from torch import Tensor

from greenroom.kernels.launch import INTERPRETED, kernel
from greenroom.kernels.rendezvous import LIMIT_MS, POLLING, WARPS, answered, write_bell

COLUMNS = 1024  # of a row that a program copies


@kernel
def _send(hidden, tokens, sources, there, d, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(tokens + tl.load(sources + row)).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(hidden + token * d + column, mask=column < d)
    tl.store(there + row * d + column, value, mask=column < d)


@kernel(do_not_specialize=["number"])
def _tell(bell, number, ASM: tl.constexpr):
    write_bell(bell, number, ASM)


@kernel(do_not_specialize=["number", "limit"])
def _meet(bell, number, limit, POLLING: tl.constexpr, THREADS: tl.constexpr, ASM: tl.constexpr):
    answered(bell, number, tl.cast(limit, tl.int64) * 1000000, POLLING, THREADS, ASM)


def send(hidden: Tensor, tokens: Tensor, sources: Tensor, there: Tensor) -> None:
    """Copies rows to the CPU.

    Args:
        hidden: (tokens, d) float32, contiguous.
        tokens: (routes,) int32, as `Routes.tokens`.
        sources: (rows,) int32, indices into `tokens`; may be pinned.
        there: (rows, d) float32 in pinned memory.
    """
    rows, d = there.shape
    _send[(rows, -(-d // COLUMNS))](hidden, tokens, sources, there, d, BLOCK=COLUMNS)


def send_twin(hidden: Tensor, tokens: Tensor, sources: Tensor, there: Tensor) -> None:
    """`send` in plain torch; the truth it is held against."""
    there.copy_(hidden[tokens[sources.to(tokens.device).long()].long()])


def tell(bell: Tensor, number: int) -> None:
    """Writes the number to a bell, behind all that the stream was given before."""
    _tell[(1,)](bell, number, ASM=not INTERPRETED, num_warps=WARPS)


def meet(bell: Tensor, number: int, limit_ms: int = LIMIT_MS) -> None:
    """Has the stream wait until a bell has the number, or says that it failed, at most so long;
    whether it did is for the host to find out."""
    _meet[(1,)](
        bell, number, limit_ms, POLLING=POLLING, THREADS=32 * WARPS, ASM=not INTERPRETED,
        num_warps=WARPS,
    )  # fmt: skip

"""The device's half of a meeting with the CPU in the middle of a step: `ring` hands over a layer's
hidden states and routes and tells so, `collect` waits for the answer and adds it up. Both may be
part of a recorded step, in which the host takes no part.

A bell is a 32-bit word in memory that both processors reach. Everything written before it is
there for whoever has seen it: the device orders its accesses at system scope. Both kernels run
on one stream, one behind the other, so whoever waits never keeps anything from the processor it
waits for. Knows nothing of who answers, nor of how steps are recorded.
"""

import time
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from greenroom.kernels.guests import ROUTES_AT_ONCE, Guests, absent, choose_guests_twin, invite
from greenroom.kernels.launch import INTERPRETED, kernel, power_of_two

STATE_WORDS = 3  # on the device: the step's number, routes sent in this layer, step given up
FLAG: tl.constexpr = tl.constexpr(-(2**31))  # of a bell: "nothing for you", or "step failed"
NUMBER: tl.constexpr = tl.constexpr(2**31 - 1)  # the other bits
COPIED = 4096  # numbers at once
WARPS = 8
POLLING = 1  # warps of which one thread polls
LIMIT_MS = 20_000  # of one wait; a graph must end even if nobody ever answers


@dataclass(frozen=True, slots=True)
class Box:
    """What both processors see of one layer: pinned memory where there is a GPU.

    Attributes:
        hidden, result: (tokens, d) float32, to the CPU and back.
        ids: (tokens, k) int32; -1 for routes that are not the CPU's.
        weights: (tokens, k) float32.
        ring, done: int32, the first word of each is a bell.
    """

    hidden: Tensor
    ids: Tensor
    weights: Tensor
    result: Tensor
    ring: Tensor
    done: Tensor

    def check(self, tokens: int, k: int | None = None) -> None:
        """Refuses steps the box does not hold; shorter ones use its first rows."""
        room, d = self.hidden.shape
        shapes = {"result": (self.result, (room, d)), "weights": (self.weights, self.ids.shape)}
        for name, (tensor, shape) in shapes.items():
            if tensor.shape != shape:
                raise ValueError(f"box: {name} is {tuple(tensor.shape)}, not {tuple(shape)}")
        if not 0 < tokens <= room or (k is not None and self.ids.shape[1] != k):
            raise ValueError(f"box: {tokens} tokens of {k} routes do not fit {self.ids.shape}")
        for tensor in (self.hidden, self.ids, self.weights, self.result):
            if not tensor.is_contiguous() or len(tensor) != room:
                raise ValueError("box: every part needs as many rows, side by side")


@triton.jit
def _read(bell, mine, ASM: tl.constexpr):
    """A word the CPU may write, for the threads of which `mine` is 1, 0 for others; what the CPU
    wrote before is seen by loads behind the next barrier."""
    if ASM:
        word = tl.inline_asm_elementwise(
            "{ .reg .pred asked; setp.ne.u32 asked, $2, 0; mov.u32 $0, 0; "
            "@asked ld.acquire.sys.global.u32 $0, [$1]; }",
            "=&r,l,r", [bell, mine], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    else:
        word = tl.load(bell, mask=mine != 0, other=0, volatile=True)
    return word


@triton.jit
def write_bell(bell, word, ASM: tl.constexpr):
    """Writes a word the CPU waits for, after all that this program has written; one thread does,
    behind a barrier, so that its release covers what the others wrote."""
    tl.debug_barrier()
    if ASM:
        tl.inline_asm_elementwise(
            "{ .reg .pred first; .reg .u32 thread; mov.u32 thread, %tid.x; "
            "setp.eq.u32 first, thread, 0; "
            "@first st.release.sys.global.u32 [$1], $2; mov.u32 $0, $2; }",
            "=r,l,r", [bell, word], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    else:
        tl.store(bell, word)


@triton.jit
def _spent(start, spent, ASM: tl.constexpr):
    """Nanoseconds since `start`; without a clock, a microsecond more at every call."""
    if ASM:
        spent = _now(ASM) - start
    else:
        spent += 1000
    return spent


@triton.jit
def _now(ASM: tl.constexpr):
    if ASM:
        now = tl.inline_asm_elementwise(
            "mov.u64 $0, %globaltimer;", "=l", [], dtype=tl.int64, is_pure=False, pack=1
        )
    else:
        now = tl.full((), 0, tl.int64)
    return now


@kernel
def _ring(
    hidden, ids, weights, table, quota, places, to_hidden, to_ids, to_weights, bell, state, source,
    values, routes, experts, TABLE: tl.constexpr, GUESTS: tl.constexpr, FETCHED: tl.constexpr,
    FIRST: tl.constexpr, ROUTES: tl.constexpr, NAMES: tl.constexpr, STEP: tl.constexpr,
    SINGLE: tl.constexpr, BLOCK: tl.constexpr, THREADS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    if FIRST:
        thread = tl.arange(0, THREADS)
        step = tl.sum(_read(source + thread * 0, (thread == 0).to(tl.int32), ASM), 0)
        tl.store(state, step)
    else:
        step = tl.load(state)
    at = tl.arange(0, ROUTES)
    place = tl.arange(0, BLOCK)
    value = tl.load(hidden + place, mask=place < values)  # before anything depends on routes
    weight = tl.load(weights + at, mask=at < routes)
    expert = absent(ids, table, at, routes, TABLE)
    if GUESTS:
        expert = invite(
            expert, ids, table, quota, places, routes, experts, TABLE, FETCHED, NAMES, STEP, SINGLE
        )
    sent = tl.sum((expert >= 0).to(tl.int32), 0)
    tl.store(state + 1, sent)
    word = step
    if sent > 0:
        tl.store(to_ids + at, expert, mask=at < routes)
        tl.store(to_weights + at, weight, mask=at < routes)
        tl.store(to_hidden + place, value, mask=place < values)
        for first in range(BLOCK, values, BLOCK):
            there = first + place
            more = tl.load(hidden + there, mask=there < values)
            tl.store(to_hidden + there, more, mask=there < values)
    else:
        word = step | FLAG
    write_bell(bell, word, ASM)


@triton.jit
def answered(bell, step, most, POLLING: tl.constexpr, THREADS: tl.constexpr, ASM: tl.constexpr):
    """Waits until the bell has the number `step`, at most so many nanoseconds: 1 if it has, 2 if
    it says that the step has failed, 3 if it was too late. All threads agree on it, although the
    clock and the bell may tell each something else."""
    thread = tl.arange(0, THREADS)
    mine = (thread < POLLING * 32) & (thread % 32 == 0)  # every look crosses the bus
    start = _now(ASM)
    spent = start * 0
    said = step * 0
    while said == 0:
        word = _read(bell + thread * 0, mine.to(tl.int32), ASM)
        spent = _spent(start, spent, ASM)
        late = tl.where(thread * 0 + spent > most, 3, 0)
        one = tl.where(word == step, 1, tl.where((word & NUMBER) == step, 2, late))
        said = tl.max(tl.where(mine, one, 0), 0)
    return said


@kernel
def _collect(
    result, hits, shared, out, bell, state, values, limit, WAIT: tl.constexpr,
    HITS: tl.constexpr, SHARED: tl.constexpr, BLOCK: tl.constexpr, POLLING: tl.constexpr,
    THREADS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < values
    if HITS:
        hit = tl.load(hits + at, mask=inside, other=0.0)
    if SHARED:
        beside = tl.load(shared + at, mask=inside, other=0.0)
    step = tl.load(state)
    arrived = 0
    if (tl.load(state + 1) > 0) & (tl.load(state + 2) != step):
        arrived = values
        if WAIT:
            most = tl.cast(limit, tl.int64) * 1000000
            if answered(bell, step, most, POLLING, THREADS, ASM) != 1:
                arrived = 0
                tl.store(state + 2, step)  # the layers behind this one do not wait
            tl.debug_barrier()
    total = tl.load(result + at, mask=at < arrived, other=0.0, cache_modifier=".cv")
    if HITS:
        total += hit
    if SHARED:
        total += beside
    tl.store(out + at, total, mask=inside)


def _checked(hidden: Tensor, ids: Tensor, weights: Tensor, box: Box, state: Tensor) -> int:
    """Routes of the arguments of `ring`."""
    tokens, d = hidden.shape
    box.check(tokens, ids.shape[1])
    if ids.shape != weights.shape or len(ids) != tokens or d != box.hidden.shape[1]:
        raise ValueError(f"ring: {hidden.shape}, {ids.shape}, {weights.shape} do not fit together")
    if not (hidden.is_contiguous() and ids.is_contiguous() and weights.is_contiguous()):
        raise ValueError("ring: hidden, ids and weights must be contiguous")
    if len(state) < STATE_WORDS:
        raise ValueError(f"ring: the state needs {STATE_WORDS} words")
    return ids.numel()


def ring(
    hidden: Tensor,
    ids: Tensor,
    weights: Tensor,
    box: Box,
    state: Tensor,
    table: Tensor | None = None,
    source: Tensor | None = None,
    guests: Guests | None = None,
) -> None:
    """Hands a layer to the CPU: fills the box and rings its bell with the step's number, or, if
    there is nothing for the CPU, with the number and `FLAG`, and leaves the rest of the box alone.

    Args:
        hidden: (tokens, d) float32, contiguous.
        ids: (tokens, k) int32, contiguous; -1 for rows that only pad the batch.
        weights: (tokens, k) float32, contiguous.
        box: of this layer.
        state: (STATE_WORDS,) int32 on the device, the same for all layers of a step.
        table: (experts,) int32; experts whose entry is not -1 are not the CPU's.
        source: (1,) int32 in pinned memory, from which the first layer takes the step's number.
        guests: of the layer; who comes is decided here, and is not the CPU's either.

    Raises:
        ValueError: shapes do not fit together.
    """
    routes = _checked(hidden, ids, weights, box, state)
    quota, places, experts = ids, ids, 1
    if guests is not None:
        quota, places, experts = guests.quota, guests.places, len(guests.places)
    _ring[(1,)](
        hidden, ids, weights, ids if table is None else table, quota, places, box.hidden, box.ids,
        box.weights, box.ring, state, state if source is None else source, hidden.numel(), routes,
        experts, TABLE=table is not None, GUESTS=guests is not None,
        FETCHED=guests is not None and guests.fetched, FIRST=source is not None,
        ROUTES=power_of_two(routes), NAMES=power_of_two(experts),
        STEP=ROUTES_AT_ONCE, SINGLE=len(hidden) == 1, BLOCK=COPIED, THREADS=32 * WARPS,
        ASM=not INTERPRETED, num_warps=WARPS,
    )  # fmt: skip


def ring_twin(
    hidden: Tensor,
    ids: Tensor,
    weights: Tensor,
    box: Box,
    state: Tensor,
    table: Tensor | None = None,
    source: Tensor | None = None,
    guests: Guests | None = None,
) -> None:
    """`ring` in plain torch; the truth it is held against."""
    _checked(hidden, ids, weights, box, state)
    if source is not None:
        state[0] = source[0]
    if guests is not None:
        ids = choose_guests_twin(ids, table, guests)
    elif table is not None:
        here = (ids >= 0) & (table[ids.clamp(min=0).long()] >= 0)
        ids = ids.masked_fill(here, -1)
    sent, step = int((ids >= 0).sum()), int(state[0])
    state[1] = sent
    if sent:
        for source_, target in ((hidden, box.hidden), (ids, box.ids), (weights, box.weights)):
            target[: len(hidden)].copy_(source_)
    box.ring[0] = step if sent else step + FLAG.value


def _room(box: Box, tokens: int, *parts: Tensor | None) -> int:
    """Numbers in the result of `collect`."""
    box.check(tokens)
    shape = (tokens, box.hidden.shape[1])
    for part in parts:
        if part is not None and (part.shape != shape or not part.is_contiguous()):
            raise ValueError(f"collect: a part is {tuple(part.shape)}, not {shape} side by side")
    return tokens * shape[1]


def _launch(
    programs: int,
    box: Box,
    values: int,
    state: Tensor,
    out: Tensor,
    hits: Tensor | None,
    shared: Tensor | None,
    limit_ms: int,
    wait: bool,
) -> None:
    _collect[(programs,)](
        box.result, out if hits is None else hits, out if shared is None else shared, out,
        box.done, state, values, limit_ms, WAIT=wait, HITS=hits is not None,
        SHARED=shared is not None, BLOCK=COPIED, POLLING=POLLING, THREADS=32 * WARPS,
        ASM=not INTERPRETED, num_warps=WARPS,
    )  # fmt: skip


def collect(
    box: Box,
    tokens: int,
    state: Tensor,
    hits: Tensor | None = None,
    shared: Tensor | None = None,
    limit_ms: int = LIMIT_MS,
) -> Tensor:
    """Waits for the CPU's sum and adds what the device computed; nothing is waited for where
    `ring` found nothing for the CPU.

    A step the CPU fails, or that is not answered in time, is noted in the state: what is left of
    it waits no more, and its results are worthless.

    Args:
        box: of this layer; `ring` was called with it.
        tokens: of the step.
        state: as `ring` had it.
        hits, shared: (tokens, d) float32 on the device, contiguous, or None.
        limit_ms: after which the step is given up.

    Returns:
        (tokens, d) float32 on the device: the CPU's sum, plus hits, plus shared.

    Raises:
        ValueError: shapes do not fit together.
    """
    values = _room(box, tokens, hits, shared)
    out = torch.empty(tokens, box.hidden.shape[1], device=state.device)
    programs = -(-values // COPIED)
    if programs > 1:  # one alone polls: several take longer to see the same word
        _launch(1, box, 0, state, out, None, None, limit_ms, True)
    _launch(programs, box, values, state, out, hits, shared, limit_ms, programs == 1)
    return out


def collect_twin(
    box: Box,
    tokens: int,
    state: Tensor,
    hits: Tensor | None = None,
    shared: Tensor | None = None,
    limit_ms: int = LIMIT_MS,
) -> Tensor:
    """`collect` in plain torch; the truth it is held against."""
    _room(box, tokens, hits, shared)
    out = torch.zeros(tokens, box.hidden.shape[1], device=state.device)
    step, sent, given_up = (int(word) for word in state[:STATE_WORDS])
    end = time.monotonic() + limit_ms / 1e3
    word = 0
    while sent and given_up != step and word & NUMBER.value != step:
        if time.monotonic() > end:
            break
        word = int(box.done[0])
    if sent and word != step:
        state[2] = step
    elif sent:
        out.copy_(box.result[:tokens])
    for part in (hits, shared):
        if part is not None:
            out += part
    return out

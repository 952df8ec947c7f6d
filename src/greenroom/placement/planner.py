"""Decides what of a model goes to VRAM under a budget, before anything is allocated.

In this order: scratch, a short step's activations and recorded steps, the head, whole layers with
their keys and values (from the last one on), then longer contexts and steps, and experts with the
rest. What does not fit stays on the CPU. Knows a file's sizes and the hardware; allocates nothing.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from greenroom.errors import BudgetError, RequestError
from greenroom.gguf import TensorInfo
from greenroom.models.config import ModelConfig
from greenroom.placement.budget import mib
from greenroom.placement.hardware import Gpu, Hardware
from greenroom.placement.placement import Placement
from greenroom.placement.sizes import (
    ALLOCATOR,
    GAPS,
    CacheShape,
    Sizes,
    graph_bytes,
    logit_bytes,
    reserved,
    reserved_each,
    step_bytes,
)

MARGIN = 512 << 20  # of "max", left to other programs and the allocator's rounding
LEAST_SCRATCH, MOST_SCRATCH = 16 << 20, 64 << 20
# Tokens of a step: the least, what comes before any expert, the most. A step reads every expert
# from RAM or has it pass through VRAM, so twice the tokens mean up to twice the speed of prompts.
LEAST_CHUNK, GOOD_CHUNK, MOST_CHUNK, CHUNK_STEP = 256, 2048, 8192, 64
CPU_CHUNK = 512  # most tokens of a step whose experts are all computed from RAM
LEAST_CONTEXT = 4096  # tokens of a session on the GPU, if nobody asked for a number
MOST_STAGING = 512 << 20
STAGED_EXPERTS = 2  # one arrives while the other is computed


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What the user asked for.

    Attributes:
        backend: "auto", "cuda", "native" or "reference".
        vram: bytes, None for all there is.
        named: whether the user named the budget.
        sequences: most sequences of one step.
        chunk: most tokens of one step, None for 8192.
        context: most tokens of a sequence, None for what suits.
        cache_tokens: tokens of the whole cache, None for what suits.
        block_size: tokens of a cache block.
        value_bytes: of one key or value element.
    """

    backend: str = "auto"
    vram: int | None = None
    named: bool = False
    sequences: int = 1
    chunk: int | None = None
    context: int | None = None
    cache_tokens: int | None = None
    block_size: int = 32
    value_bytes: int = 2


def place(
    tensors: Mapping[str, TensorInfo], config: ModelConfig, wish: Wish, hardware: Hardware
) -> Placement:
    """Chooses the backend and what goes to VRAM.

    Raises:
        BudgetError: more VRAM was named than is free, or the cuda backend was named and nothing
            fits; the message says what is needed.
        RequestError: a GPU was asked for and there is none, or a budget for a backend without.
    """
    layers = config.layers
    if wish.backend in ("native", "reference"):
        if wish.named and wish.vram != 0:
            raise RequestError(f"the {wish.backend} backend uses no VRAM; leave vram out", "vram")
        reason = f"computing on the CPU ({wish.backend} backend, as asked)"
        return Placement(wish.backend, reason, layers=layers)
    if wish.vram == 0:
        if wish.backend == "cuda":
            raise RequestError("the cuda backend needs VRAM; leave vram out or raise it", "vram")
        return Placement("native", "computing on the CPU: the VRAM budget is 0", layers=layers)
    if hardware.gpu is None:
        if wish.backend == "cuda" or wish.vram is not None:
            field = "backend" if wish.backend == "cuda" else "vram"
            raise RequestError(
                f"no GPU can be used: {hardware.reason}; leave {field} out to use the CPU", field
            )
        reason = f"computing on the CPU: {hardware.reason}"
        return Placement("native", reason, layers=layers)
    return _on_gpu(Sizes.of(tensors, config), config, wish, hardware.gpu)


def _on_gpu(sizes: Sizes, config: ModelConfig, wish: Wish, gpu: Gpu) -> Placement:
    budget = max(0, gpu.free - MARGIN) if wish.vram is None else wish.vram
    if budget > gpu.free:
        raise BudgetError(
            f"vram is {mib(budget)}, but only {gpu.free >> 20} MiB of {gpu.name} are free; lower it"
        )
    plan = Plan(sizes, config, wish)
    head, count = plan.dense(budget)
    if head or count:
        found = plan.filled(budget) if plan.whole(head, count) else plan.part(budget, head, count)
        return replace(found, reason=f"{gpu.name}: {found.reason}")
    least = mib(plan.next_step(False, 0))
    small = f"{budget >> 20} MiB of {gpu.name} hold not even one layer; {least} do"
    if wish.backend == "cuda":
        raise BudgetError(f"{small}; raise it, or leave the backend out to use the CPU")
    reason = f"computing on the CPU: {small}"
    return Placement("native", reason, layers=config.layers)


class Plan:
    """Sums for one model and wish.

    Args:
        sizes: of the model's parts.
        config: its configuration.
        wish: what the user asked for.
    """

    def __init__(self, sizes: Sizes, config: ModelConfig, wish: Wish) -> None:
        self.sizes, self.config, self.wish = sizes, config, wish
        self.shape = CacheShape(wish.block_size, wish.sequences, wish.value_bytes)
        model_context = wish.context or config.context_length
        context = wish.context or min(config.context_length, LEAST_CONTEXT)
        self.least_tokens = wish.cache_tokens or context
        self.most_tokens = wish.cache_tokens or model_context * wish.sequences
        whole = -(-max(self.least_tokens, self.most_tokens) // CHUNK_STEP) * CHUNK_STEP
        self.most_chunk = min(wish.chunk or MOST_CHUNK, whole)  # a longer one cannot come
        self.least_chunk = min(LEAST_CHUNK, self.most_chunk)
        self._pieces: dict[tuple[bool, int], int] = {}
        self.graphs = graph_bytes(config, wish.sequences, model_context)

    # What a choice costs

    def activations(self, chunk: int) -> int:
        """Bytes the allocator holds for what one step computes, at most."""
        sequences = self.wish.sequences
        step = step_bytes(self.config, max(chunk, sequences))
        return int(step * GAPS) + 2 * logit_bytes(self.config, sequences)

    def caches(self, count: int, tokens: int, chunk: int) -> list[int]:
        """Bytes of keys and values of each of the last `count` layers, one by one."""
        layers = range(self.config.layers - count, self.config.layers)
        return [n for i in layers for n in self.shape.layer(self.config, i, tokens, chunk)]

    def cache(self, count: int, tokens: int, chunk: int) -> int:
        """Bytes of the keys and values of the last `count` layers."""
        return sum(self.caches(count, tokens, chunk))

    def rounding(self, head: bool, count: int, tokens: int, chunk: int) -> int:
        """Bytes the allocator holds beyond what it was asked for, and the vendor's own."""
        dense, caches = self._dense_pieces(head, count), self.caches(count, tokens, chunk)
        return dense + sum(reserved_each(n) - n for n in caches) + ALLOCATOR

    def _dense_pieces(self, head: bool, count: int) -> int:
        known = self._pieces.get((head, count))
        if known is None:
            *layers, last = self.sizes.tensors
            chosen = [last] if head else []
            chosen += reversed(layers[len(layers) - count :])
            tensors = [n for part in chosen for n in part]
            known = self._pieces[head, count] = reserved(tensors) - sum(tensors)
        return known

    def dense_parts(self, head: bool, count: int, chunk: int = 0) -> dict[str, int]:
        """Bytes by part with as little scratch and context as can be, and with steps of `chunk`
        tokens or, if it is 0, as short ones as can be."""
        layers = self.sizes.layers[self.config.layers - count :]
        chunk = chunk or self.least_chunk
        return {
            "dense": sum(layers) + (self.sizes.head if head else 0),
            "cache": self.cache(count, self.least_tokens, chunk),
            "scratch": LEAST_SCRATCH,
            "activations": self.activations(chunk),
            "allocator": self.rounding(head, count, self.least_tokens, chunk),
            "graphs": self.graphs,  # without them a step on the GPU is slower than on the CPU
        }

    def need(self, head: bool, count: int) -> int:
        """All of `dense_parts` together."""
        return sum(self.dense_parts(head, count).values())

    # What fits

    def whole(self, head: bool, count: int) -> bool:
        """Whether this is the whole dense part."""
        return head and count == self.config.layers

    def dense(self, budget: int) -> tuple[bool, int]:
        """Whether the head fits, and how many of the last layers.

        The head is the largest matrix a token reads; the last layers lie next to it, so that
        activations cross between the processors once.
        """
        head = self.need(True, 0) <= budget
        count = 0
        while count < self.config.layers and self.need(head, count + 1) <= budget:
            count += 1
        return head, count

    def next_step(self, head: bool, count: int) -> int:
        """Bytes with which more of the dense part would fit: the head, in place of layers if
        need be, or a layer."""
        steps = [] if head else [self.need(True, 0)]
        if count < self.config.layers:
            steps.append(self.need(head, count + 1))
        return min(steps)

    def part(self, budget: int, head: bool, count: int) -> Placement:
        """A placement of a part of the dense layers."""
        total = self.config.layers
        where = f"the last {count} of {total} layers" if count else "no layers"
        reason = (
            f"{where} and {'the head' if head else 'not the head'} in VRAM, the rest on the CPU, "
            f"budget {budget >> 20} MiB; {mib(self.next_step(head, count))} hold more, "
            f"{mib(self.need(True, total))} all of it"
        )
        least, rest = self.least_chunk, budget - self.need(head, count)

        def cost(chunk: int) -> int:
            return sum(self.dense_parts(head, count, chunk).values()) - self.need(head, count)

        chunk = _largest(cost, rest, least, min(CPU_CHUNK, self.most_chunk), CHUNK_STEP)
        return self._placement(
            reason, budget, self.dense_parts(head, count, chunk), head, count,
            chunk=chunk, tokens=self.least_tokens, scratch=LEAST_SCRATCH,
        )  # fmt: skip

    def filled(self, budget: int) -> Placement:
        """A placement of all dense layers, and of what else the budget holds.

        Each part is granted a share of what is left when its turn comes, also where it uses
        less: so a larger budget never leaves fewer bytes to the experts.
        """
        total = self.config.layers
        rest = budget - self.need(True, total)
        slab = self.sizes.slab
        least = STAGED_EXPERTS * slab + self.sizes.staged
        staging = min(max(MOST_STAGING, 2 * least), max(rest // 3, min(least, rest)))
        rest -= staging if slab else 0
        if staging < least or not slab:
            staging = 0
        scratch = min(MOST_SCRATCH - LEAST_SCRATCH, rest // 8)
        rest -= scratch
        tokens, granted = self._tokens(rest // 4)
        rest -= granted
        chunk, granted = self._chunk(rest, tokens)
        rest -= granted
        slots = min(rest // slab, self.sizes.expert_count) if slab else 0
        parts = {
            "dense": sum(self.sizes.layers) + self.sizes.head,
            "cache": self.cache(total, tokens, chunk),
            "scratch": LEAST_SCRATCH + scratch,
            "activations": self.activations(chunk),
            "allocator": self.rounding(True, total, tokens, chunk),
            "graphs": self.graphs,
            "staging": staging,
            "experts": slots * slab,
        }
        reason = (
            f"dense layers ({mib(parts['dense'])}), KV cache ({mib(parts['cache'])}) and "
            f"{slots} of {self.sizes.expert_count} experts in VRAM, budget {budget >> 20} MiB; "
            "the other experts and the embedding in RAM, computed by the CPU"
        )
        return self._placement(
            reason, budget, parts, True, total, chunk=chunk, tokens=tokens,
            scratch=LEAST_SCRATCH + scratch,
        )  # fmt: skip

    def _tokens(self, share: int) -> tuple[int, int]:
        """Tokens of the cache within a share of bytes beyond the least, and the bytes granted."""
        size = self.wish.block_size

        def cost(tokens: int) -> int:
            return self._cache_pieces(tokens, self.least_chunk) - base

        base = self._cache_pieces(self.least_tokens, self.least_chunk)
        tokens = _largest(cost, share, self.least_tokens, self.most_tokens, size)
        return tokens, min(share, cost(self.most_tokens))

    def _chunk(self, rest: int, tokens: int) -> tuple[int, int]:
        """Tokens of a step, and the bytes granted: all there is for steps in which a copied
        expert pays, three quarters of what is left then for longer ones. In a prompt of 8192
        tokens a MiB saves more time there than as a place for experts in hundreds of tokens
        that follow, but a few places are worth most where routing has favourites."""

        def cost(chunk: int, at: int = tokens) -> int:
            cache = self._cache_pieces(at, chunk) - self._cache_pieces(at, self.least_chunk)
            return cache + self.activations(chunk) - self.activations(self.least_chunk)

        most = max(self.most_tokens, tokens)
        first = min(rest, cost(min(GOOD_CHUNK, self.most_chunk), most))
        share = min(first + 3 * (rest - first) // 4, cost(self.most_chunk, most))
        return _largest(cost, share, self.least_chunk, self.most_chunk, CHUNK_STEP), share

    def _cache_pieces(self, tokens: int, chunk: int) -> int:
        """Bytes the allocator takes for all layers' keys and values."""
        return sum(map(reserved_each, self.caches(self.config.layers, tokens, chunk)))

    def _placement(
        self, reason: str, budget: int, parts: Mapping[str, int], head: bool, count: int,
        *, chunk: int, tokens: int, scratch: int,
    ) -> Placement:  # fmt: skip
        asked = self.wish.context or self.config.context_length
        slots = parts.get("experts", 0)
        return Placement(
            "cuda",
            reason,
            vram=budget,
            parts=parts,
            layers=self.config.layers,
            layers_on_gpu=count,
            head_on_gpu=head,
            slots=slots // self.sizes.slab if self.sizes.slab else 0,
            slot_bytes=slots,
            staging=parts.get("staging", 0),
            scratch=scratch,
            prefill_chunk=chunk,
            context_length=min(asked, tokens),
            cache_tokens=tokens,
        )


def _largest(cost: Callable[[int], int], share: int, least: int, most: int, step: int) -> int:
    """The largest of least, least + step, ... below `most`, or `most`, that costs at most
    `share`; `least` if none of the others does."""
    if least >= most or cost(most) <= share:
        return max(least, most)
    low, high = 0, (most - least) // step
    while low < high:
        middle = (low + high + 1) // 2
        if cost(least + middle * step) <= share:
            low = middle
        else:
            high = middle - 1
    return least + low * step

"""The kernel benchmark: what the memory and the processor can do, and what the kernels reach.

Experts with random weights fill far more memory than the caches hold; every step routes to
experts that were not touched for a while. Knows the native kernels only, no model and no engine.
"""

import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from greenroom import native
from greenroom.experts.slabs import Bytes, SlabLayout, allocate
from greenroom.gguf import GGMLType, random_blocks

# The formats the floor of 85 % of the read bandwidth is set for come first.
FORMATS = (
    *("MXFP4", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "Q4_0", "BF16"),
    *("Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "IQ4_NL", "IQ4_XS", "NVFP4", "F16", "F32"),
)
FLOATING = {"BF16", "F16", "F32"}
D, F, ROUTES, EXPERTS = (
    2048,
    768,
    8,
    128,
)  # Qwen3-30B-A3B: the smallest experts among the common models


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure.

    Attributes:
        formats: type names.
        tiers: of the native extension.
        tokens: batch sizes.
        repeats: timed runs per figure; the median counts.
        megabytes: of expert slabs, at least; several times the last-level cache.
        threads: of the pool.
    """

    formats: tuple[str, ...]
    tiers: tuple[str, ...]
    tokens: tuple[int, ...]
    repeats: int
    megabytes: int
    threads: int


@dataclass(frozen=True, slots=True)
class Ceiling:
    """One tier's limits: GB/s read by thread count, and GOP/s on registers alone.

    The AMX tier computes large batches in bfloat16 tiles (`bf16_tiles`, 0 on other tiers), with
    two products for one of BF16 and NVFP4 and three for one of the others; MXFP4's two are of
    int8, twice as wide, which takes the time of one.
    """

    tier: str
    read: dict[int, float]
    int8: float
    float32: float
    bf16_tiles: float = 0


@dataclass(frozen=True, slots=True)
class Figure:
    """One line of the table.

    Attributes:
        operation: "moe" (gate, up, down of 8 experts) or "linear" (one tall matrix).
        gigabytes: weight bytes read per second, in 1e9.
        gigaops: 2 * multiply-adds per second, in 1e9.
        of: the ceiling it is compared with: "read", "int8", "float32" or "bf16 tiles".
        fraction: of that ceiling.
        spread: (slowest - fastest) / median of the runs.
    """

    tier: str
    operation: str
    format: str
    tokens: int
    gigabytes: float
    gigaops: float
    of: str
    fraction: float
    spread: float


def quick_plan(threads: int) -> Plan:
    """Three formats on the best tier; about ten seconds."""
    best = native.usable_tiers()[-1:]
    return Plan(("MXFP4", "Q4_K", "Q8_0"), best, (1, 512), 5, 256, threads)


def full_plan(threads: int) -> Plan:
    """Every format on every usable tier."""
    return Plan(FORMATS, native.usable_tiers(), (1, 8, 64, 512), 5, 512, threads)


def timed(work: Callable[[], object], repeats: int) -> list[float]:
    """Seconds of each of `repeats` calls, after one that warms up."""
    work()
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return taken


def ceiling(tier: str, plan: Plan, memory: Bytes) -> Ceiling:
    """Measures one tier's limits: sequential reads of `memory`, and loops on registers."""
    lib = native.module(tier)
    read = {}
    counts = sorted({1, *(n for n in (2, 4, 8, 12, 16, 32, 64) if n < plan.threads), plan.threads})
    for threads in counts:
        pool = lib.Pool(threads)
        seconds = [lib.read_seconds(pool, memory) for _ in range(plan.repeats + 1)][1:]
        read[threads] = memory.nbytes / statistics.median(seconds) / 1e9
    rounds = 200_000 if tier == "portable" else 3_000_000
    names = ["int8_rate", "float_rate"]
    if tier == "amx":
        names.append("bf16_tile_rate")
    rates = [
        statistics.median(getattr(lib, name)(pool, rounds) for _ in range(plan.repeats)) / 1e9
        for name in names
    ]
    return Ceiling(tier, read, *rates)


class ExpertBank:
    """Random experts of one format in `memory`: copies of one expert, or of its gate matrix.

    Every row has scales a model could have; bytes of one layout read as another are partly
    denormal numbers, which Intel processors multiply ten times slower.

    Args:
        name: of the format.
        memory: to be filled.
        d, f: model width and hidden width.
    """

    def __init__(self, name: str, memory: Bytes, d: int = D, f: int = F) -> None:
        self.name, self.type = name, GGMLType[name]
        lib = native.lib()
        pool = lib.Pool(1)
        self.layout = SlabLayout.plan((self.type,) * 3, d, f, biases=False)
        self.count = memory.nbytes // self.layout.nbytes
        self.memory = memory
        self.expert: Bytes = np.zeros(self.layout.nbytes, np.uint8)
        rng = np.random.default_rng(0)
        for i, (rows, cols) in enumerate(((f, d), (f, d), (d, f))):
            raw = random_blocks(self.type, rows, cols, rng)
            part = self.layout.matrix(self.expert, i)
            lib.pack(pool, int(self.type), rows, cols, raw.reshape(-1), part)

    def fill(self, part: Bytes) -> Bytes:
        """The memory as whole copies of `part`: (copies, bytes of part)."""
        copies = self.memory.nbytes // part.nbytes
        filled = self.memory[: copies * part.nbytes].reshape(copies, -1)
        filled[:] = part
        return filled

    def layer(self, lib: Any) -> Any:
        """The memory as experts of a native layer of one tier."""
        layer = lib.MoeLayer(self.count, self.layout.d, self.layout.f, "silu")
        for e, slab in enumerate(self.fill(self.expert)):
            parts = [(int(self.type), self.layout.matrix(slab, i), None, 1.0) for i in range(3)]
            layer.set_expert(e, *parts)
        return layer

    def matrix(self) -> tuple[int, Bytes]:
        """The memory as one tall matrix (rows, d): rows and packed bytes."""
        filled = self.fill(self.layout.matrix(self.expert, 0))
        return self.layout.f * len(filled), filled.reshape(-1)


def figure(bank: ExpertBank, limits: Ceiling, what: tuple[str, int], work: tuple[float, float],
           taken: list[float]) -> Figure:  # fmt: skip
    """One line from the bytes and operations of a call and the seconds of its runs."""
    operation, tokens = what
    seconds = statistics.median(taken)
    gigabytes, gigaops = (amount / seconds / 1e9 for amount in work)
    of = "float32" if bank.name in FLOATING else "int8"
    if limits.bf16_tiles and bank.name not in {"F16", "F32"}:
        of = "bf16 tiles"
    if tokens <= 8:
        of = "read"
    fraction = {
        "read": gigabytes / max(limits.read.values()),
        "int8": gigaops / limits.int8,
        "float32": gigaops / limits.float32,
        "bf16 tiles": gigaops / (limits.bf16_tiles or 1),
    }[of]
    spread = (max(taken) - min(taken)) / seconds
    return Figure(
        limits.tier, operation, bank.name, tokens, gigabytes, gigaops, of, fraction, spread
    )


def moe_figure(bank: ExpertBank, limits: Ceiling, tokens: int, plan: Plan) -> Figure:
    """Routed experts: at few tokens a sweep over all experts, each used once."""
    lib = native.module(limits.tier)
    pool, layer = lib.Pool(plan.threads), bank.layer(lib)
    rng = np.random.default_rng(1)
    x = rng.standard_normal((tokens, bank.layout.d)).astype(np.float32)
    weights = np.full((tokens, ROUTES), 1 / ROUTES, np.float32)
    out = np.empty_like(x)
    if tokens * ROUTES <= bank.count:
        order = rng.permutation(bank.count).astype(np.int32)
        steps = bank.count // (tokens * ROUTES)
    else:  # as many experts as such a model has
        experts = min(EXPERTS, bank.count)
        order = np.concatenate([rng.permutation(experts)[:ROUTES] for _ in range(tokens)])
        steps = 1
    ids = order[: steps * tokens * ROUTES].astype(np.int32).reshape(steps, tokens, ROUTES)

    def sweep() -> None:
        for step in ids:
            lib.moe(pool, layer, x, step, weights, out)

    products = ids.size * 3 * bank.layout.d * bank.layout.f
    touched = sum(len(np.unique(step)) for step in ids) * sum(
        b - a for a, b in bank.layout.matrices
    )
    taken = timed(sweep, plan.repeats)
    return figure(bank, limits, ("moe", tokens), (touched, 2.0 * products), taken)


def linear_figure(bank: ExpertBank, limits: Ceiling, tokens: int, plan: Plan) -> Figure:
    """One matrix: all of the memory at few tokens, as an output head; 4,096 rows at many."""
    lib = native.module(limits.tier)
    pool = lib.Pool(plan.threads)
    (rows, packed), d = bank.matrix(), bank.layout.d
    if tokens > 8:
        rows = min(rows, 4096)
        packed = packed[: lib.packed_bytes(int(bank.type), rows, d)]
    x = np.random.default_rng(1).standard_normal((tokens, d)).astype(np.float32)
    out = np.empty((tokens, rows), np.float32)
    taken = timed(lambda: lib.linear(pool, int(bank.type), rows, d, packed, x, out), plan.repeats)
    work = (packed.nbytes, 2.0 * tokens * rows * d)
    return figure(bank, limits, ("linear", tokens), work, taken)


def figures(plan: Plan, limits: dict[str, Ceiling], memory: Bytes) -> Iterator[Figure]:
    """All lines, format by format; portable code skips the large batches, which take minutes."""
    for name in plan.formats:
        bank = ExpertBank(name, memory)
        for tier in plan.tiers:
            for tokens in plan.tokens:
                if tier == "portable" and tokens > 8:
                    continue
                yield moe_figure(bank, limits[tier], tokens, plan)
                yield linear_figure(bank, limits[tier], tokens, plan)


def processor() -> str:
    """The processor's name as the system gives it."""
    try:
        with open("/proc/cpuinfo") as lines:
            names = [line.split(":", 1)[1].strip() for line in lines if "model name" in line]
        return names[0]
    except (OSError, IndexError):
        return platform.processor() or platform.machine()


def run(plan: Plan, write: Callable[[str], None]) -> dict[str, Any]:
    """Measures everything in the plan; writes a line as soon as it is known.

    Args:
        plan: what to measure.
        write: takes one line of text without its end.

    Returns:
        All figures as a JSON-serialisable dict, which is also the last line written.
    """
    memory = allocate(plan.megabytes << 20)
    memory[:] = 1  # touch every page
    write(f"{processor()}, {plan.threads} threads, {plan.megabytes} MiB of weights on huge pages")
    write("ceilings: sequential reads of that memory; loops of the tier's own int8 dot-product")
    write("and float32 multiply-add instructions on registers alone")
    limits = {}
    for tier in plan.tiers:
        limits[tier] = c = ceiling(tier, plan, memory)
        tiles = f", {c.bf16_tiles:.0f} bf16 tiles"
        read = ", ".join(f"{n}: {rate:.1f}" for n, rate in c.read.items())
        write(f"  {tier:9} read GB/s by threads {read}; {c.int8:.0f} GOP/s int8, "
              f"{c.float32:.0f} float32{tiles if c.bf16_tiles else ''}")  # fmt: skip
    write(
        f"{'format':8}{'tier':10}{'work':8}{'tokens':>6}{'GB/s':>8}{'GOP/s':>8}  of ceiling  spread"
    )
    lines = []
    for f in figures(plan, limits, memory):
        lines.append(f)
        write(f"{f.format:8}{f.tier:10}{f.operation:8}{f.tokens:6}{f.gigabytes:8.1f}"
              f"{f.gigaops:8.0f}  {f.fraction:4.0%} {f.of:10} {f.spread:5.0%}")  # fmt: skip
    document = {
        "processor": processor(),
        "plan": asdict(plan),
        "ceilings": [asdict(c) for c in limits.values()],
        "figures": [asdict(f) for f in lines],
    }
    write(json.dumps(document))
    return document

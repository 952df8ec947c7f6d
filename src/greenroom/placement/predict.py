"""Predicts tokens per second of a placement from a machine's measured rates.

Bytes over rates, with what runs at the same time taken as the longer of the two, and on the CPU
the measured time that a step and each of its matrices take whatever their size. Reads a file's
tensors and the planner's decision; measures nothing.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from greenroom.experts.share import Share
from greenroom.gguf import TensorInfo
from greenroom.models.config import ModelConfig
from greenroom.placement.calibrate import MachineProfile
from greenroom.placement.placement import Placement
from greenroom.placement.sharing import measured_rates

_SPLIT = re.compile(r"\.\d+\.weight$")  # one expert of several, each a tensor of its own
_EXPERTS = re.compile(r"_exps\.weight$|\.ffn_(gate|up|down)\.\d+\.weight$")
# On an H100 over PCIe 5, see docs/performance.md. Of a recorded decode step, by layer:
HANDSHAKE_SECONDS = 11e-6  # with experts in RAM: bells, and 11 KB each way
GPU_LAYER_SECONDS = 43e-6  # kernels too short to fill the bandwidth
GPU_FEW = 0.38  # share of VRAM's bandwidth that products of 3 to 16 tokens reach
# Of other steps: the launch, waking up, the next call. Recorded ones are launched ahead.
GPU_STEP_SECONDS = 0.35e-3
# Of a long step, by layer: what the host needs while GPU and bus work, and what passes between the
# last copy or product and the next layer's first.
LONG_LAYER_HOST_SECONDS = 4.7e-3
LONG_LAYER_GAP_SECONDS = 0.4e-3
# Of long steps: share of the peak rate that products reach, operations of attention in a second,
# share of VRAM's bandwidth that expanding experts reaches.
GPU_PRODUCTS = 0.33
GPU_ATTENTION = 80e12
GPU_EXPANDING = 0.6
# Where all experts have slots and few tokens: share of VRAM's bandwidth that reading them reaches
# besides their products, and a layer's norms, rotation and the like.
GPU_STRAIGHT = 0.22
LONG_LAYER_KERNEL_SECONDS = 0.2e-3
FEW_ROWS = 128  # of an expert: that of experts.resident, which needs Triton; a test compares them


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What computing a token takes of a model.

    Attributes:
        experts: bytes of all routed experts by format.
        dense: bytes of everything else that every token reads, by format.
        expert_values, dense_values: weights behind them.
        share: of the experts that one token uses.
        layers: with experts.
        cache: bytes of keys and values per token of context, as float16, windows left out.
        head, head_values: of `dense` and `dense_values`, what only a prompt's last token reads.
        matrices: products of a step, the experts of a layer counted as one gate, up and down.
        windows: of every layer's attention, None for all tokens.
        scores: operations of a layer's attention for one query and one key.
        expert_outputs, dense_outputs, head_outputs: rows of the matrices behind the values.
        passed: numbers of a token that norms, rotation and the cache take in all layers.
        late: share of the experts, those of the last layer, that a prompt's last token reads alone.
    """

    experts: Mapping[str, int]
    dense: Mapping[str, int]
    expert_values: int
    dense_values: int
    share: float
    count: int
    layers: int
    cache: int
    head: Mapping[str, int] = field(default_factory=dict)
    head_values: int = 0
    matrices: int = 0
    windows: tuple[int | None, ...] = ()
    scores: int = 0
    expert_outputs: int = 0
    dense_outputs: int = 0
    head_outputs: int = 0
    passed: int = 0
    late: float = 0.0

    @staticmethod
    def of(tensors: Mapping[str, TensorInfo], config: ModelConfig) -> "Work":
        """Reads it off a file's tensors."""
        sizes = _Sizes.of(tensors)
        tied = "output.weight" not in tensors
        head = tensors["token_embd.weight" if tied else "output.weight"]
        moe, shape = config.moe, config.attention
        width = shape.key_length + shape.value_length
        rotated = (shape.heads + shape.kv_heads) * shape.key_length
        return Work(
            experts=sizes.experts,
            dense=sizes.dense,
            expert_values=sizes.expert_values,
            dense_values=sizes.dense_values,
            share=moe.used / moe.experts if moe else 0.0,
            count=moe.experts if moe else 0,
            layers=len(sizes.layers),
            cache=2 * shape.kv_heads * width * sum(w is None for w in config.windows),
            head={head.type.name: head.nbytes},
            head_values=head.ne[0] * head.ne[1],
            matrices=len(sizes.matrices),
            windows=tuple(config.windows),
            scores=2 * shape.heads * width,
            expert_outputs=sizes.expert_outputs,
            dense_outputs=sizes.dense_outputs,
            head_outputs=head.ne[1],
            passed=config.layers * (2 * config.hidden_size + rotated + shape.kv_heads * width),
            late=1 / len(sizes.layers) if sizes.layers else 0.0,
        )

    def touched(self, rows: float) -> float:
        """Share of the experts' bytes that a step of `rows` tokens reads, routed uniformly."""
        return 1.0 - float((1 - self.share) ** rows)

    def per_expert(self, rows: float) -> float:
        """Tokens of an expert that a step of `rows` tokens uses at all."""
        there = self.touched(rows)
        return rows * self.share / there if there else 0.0

    def attended(self, first: int, last: int) -> float:
        """Operations of attention for the tokens at positions `first` to `last` of a sequence."""
        return self.scores * sum(_pairs(last, w) - _pairs(first, w) for w in self.windows)


def _pairs(tokens: int, window: int | None) -> float:
    """Keys that the first `tokens` queries see in all."""
    wide = tokens if window is None else min(tokens, window)
    return wide * (wide + 1) / 2 + (tokens - wide) * wide


@dataclass(slots=True)
class _Sizes:
    """Bytes by format and weights of a file's tensors, routed experts apart."""

    experts: Counter[str] = field(default_factory=Counter)
    dense: Counter[str] = field(default_factory=Counter)
    expert_values: int = 0
    dense_values: int = 0
    expert_outputs: int = 0
    dense_outputs: int = 0
    layers: set[str] = field(default_factory=set)
    matrices: set[str] = field(default_factory=set)

    @staticmethod
    def of(tensors: Mapping[str, TensorInfo]) -> "_Sizes":
        found = _Sizes()
        for name, tensor in tensors.items():
            if not name.startswith("token_embd") or "output.weight" not in tensors:
                found.add(name, tensor)
        return found

    def add(self, name: str, tensor: TensorInfo) -> None:
        count = math.prod(tensor.ne)
        if _EXPERTS.search(name):
            self.experts[tensor.type.name] += tensor.nbytes
            self.expert_values += count
            self.expert_outputs += count // tensor.ne[0]
            self.layers.add(name.split(".")[1])
        else:
            self.dense[tensor.type.name] += tensor.nbytes
            self.dense_values += count
            self.dense_outputs += count // tensor.ne[0] * (len(tensor.ne) > 1)
        if len(tensor.ne) > 1:
            self.matrices.add(_SPLIT.sub("", name))


@dataclass(frozen=True, slots=True)
class Prediction:
    """Tokens per second, what limits it, and the seconds of each part of a step."""

    rate: float
    bound: str
    parts: Mapping[str, float]


def resident(placement: Placement, work: Work) -> float:
    """Share of the experts that have a place in VRAM."""
    total = work.layers * work.count
    return min(1.0, placement.slots / total) if total else 0.0


def _share_on_gpu(placement: Placement) -> float:
    return placement.layers_on_gpu / placement.layers if placement.layers else 0.0


def decode(
    work: Work,
    placement: Placement,
    machine: MachineProfile,
    context: int,
    batch: int = 1,
    hits: float | None = None,
) -> Prediction:
    """A step of `batch` sequences, each with `context` tokens behind it.

    With `hits`, the share of routes that found their expert in VRAM, it is the roofline at that
    share: bytes only, neither handshakes nor the host's time.
    """
    measured = hits is not None
    gpu = _share_on_gpu(placement)
    rows = 1 if measured else batch
    attended = batch * work.attended(context - 1, context) if context else 0.0
    parts = {
        "dense layers from RAM": (1 - gpu)
        * machine.dense_seconds(work.dense, rows, work.dense_values, work.dense_outputs),
        "attention on the CPU": (1 - gpu) * _over(attended, machine.attention_step),
        "norms and the like": (1 - gpu) * rows * work.passed * machine.norm_seconds,
    }
    vram = _bytes(machine.vram)
    if gpu:
        there = sum(work.dense.values()) / _reached(batch) + work.cache * context * batch
        parts["dense layers from VRAM"] = gpu * there / vram
    if hits is None:
        hits = resident(placement, work) if gpu else 0.0
    used = work.touched(batch)
    each = 1 if measured else work.per_expert(batch)
    whole = _expert_seconds(work, machine, each)
    from_ram = (1 - hits) * used * whole
    from_vram = hits * used * sum(work.experts.values()) / (vram * _reached(batch))
    # Both work at once; the longer decides.
    longer = "experts from RAM" if from_ram >= from_vram else "experts from VRAM"
    parts[longer] = max(from_ram, from_vram)
    if gpu and not measured:
        parts["handshakes"] = gpu * work.layers * HANDSHAKE_SECONDS * (hits < 1)
        parts["short kernels"] = placement.layers_on_gpu * GPU_LAYER_SECONDS
        parts["host"] = GPU_STEP_SECONDS * (placement.layers_on_gpu < placement.layers)
    if not measured:
        parts["host and threads"] = (1 - gpu) * _host(work, machine)
    return _predicted(parts, batch)


def _reached(rows: int) -> float:
    """Share of VRAM's bandwidth that products of a decode step reach."""
    return 1.0 if rows <= 2 else GPU_FEW


def _host(work: Work, machine: MachineProfile) -> float:
    return machine.step_seconds + machine.matrix_seconds * work.matrices


def prefill(
    work: Work, placement: Placement, machine: MachineProfile, tokens: int, sequences: int = 1
) -> Prediction:
    """`sequences` prompts of `tokens` tokens each, in steps of what the placement allows."""
    every = tokens * sequences
    chunk = min(every, placement.prefill_chunk or 512)
    steps = math.ceil(every / chunk)
    rows = every / steps
    gpu = _share_on_gpu(placement)
    body = {name: size - work.head.get(name, 0) for name, size in work.dense.items()}
    values = work.dense_values - work.head_values
    attended = sequences * work.attended(0, tokens)
    parts = {
        "dense products on the CPU": (1 - gpu)
        * steps
        * machine.dense_seconds(body, rows, values, work.dense_outputs - work.head_outputs),
        # of the last token only
        "head on the CPU": (1 - gpu)
        * machine.dense_seconds(work.head, sequences, work.head_values),
        "attention on the CPU": (1 - gpu)
        * machine.prompt_attention_seconds(attended, every * work.scores * len(work.windows)),
        "norms and the like": (1 - gpu) * every * work.passed * machine.norm_seconds,
        "host and threads": (1 - gpu) * steps * _host(work, machine),
    }
    on_cpu = _experts_on_cpu(work, machine, rows, steps)
    if gpu:
        parts |= _on_gpu(work, placement, machine, (rows, steps), attended)
    missing = 1 - resident(placement, work) if gpu else 1.0
    if gpu and placement.staging and machine.pcie:
        copied = steps * missing * sum(work.experts.values()) / _bytes(machine.pcie)
        copied *= (1 - work.late) * (1 - _lent(work, machine, rows, missing))
        waits = not _straight(work, placement, rows)
        launched = waits * steps * placement.layers_on_gpu * LONG_LAYER_HOST_SECONDS
        parts = _longest(parts, {"experts over PCIe": copied, "launches": launched})
    elif missing:
        parts["experts on the CPU"] = missing * on_cpu
    return _predicted(parts, every)


def _longest(parts: Mapping[str, float], beside: Mapping[str, float]) -> dict[str, float]:
    """The parts, those of the GPU replaced where what runs beside them takes longer."""
    name = max(beside, key=lambda name: beside[name])
    if beside[name] <= sum(parts[part] for part in _GPU_PARTS):
        return dict(parts)
    return {part: s for part, s in parts.items() if part not in _GPU_PARTS} | {name: beside[name]}


_GPU_PARTS = ("products on the GPU", "attention on the GPU", "expanding experts")


def _experts_on_cpu(work: Work, machine: MachineProfile, rows: float, steps: int) -> float:
    """Seconds of a prompt's experts if the CPU computes them all."""
    long = work.touched(rows) * _expert_seconds(work, machine, work.per_expert(rows))
    short = work.share * _expert_seconds(work, machine, 1)
    return steps * (1 - work.late) * long + work.late * short


def _expert_seconds(work: Work, machine: MachineProfile, rows: float) -> float:
    """Seconds of all experts with so many tokens each."""
    return machine.expert_seconds(work.experts, rows, work.expert_values, work.expert_outputs)


def _lent(work: Work, machine: MachineProfile, rows: float, missing: float) -> float:
    """Share of the missing experts that the CPU computes in a step of so many tokens, by the
    engine's own rule, routed uniformly."""
    rates = measured_rates(machine, work.experts, machine.threads)
    absent, total = round(missing * work.count), work.layers * work.count
    if rates is None or not absent:
        return 0.0
    nbytes, weights = sum(work.experts.values()) // total, work.expert_values // total
    sizes = [work.per_expert(rows)] * work.count
    return len(Share(rates).lend(range(absent), absent, sizes, nbytes, weights)) / absent


def _straight(work: Work, placement: Placement, rows: float) -> bool:
    """Whether a step of so many tokens multiplies experts straight from their slots' blocks."""
    return resident(placement, work) >= 1 and rows * work.share <= FEW_ROWS


def _on_gpu(
    work: Work,
    placement: Placement,
    machine: MachineProfile,
    size: tuple[float, int],
    attended: float,
) -> dict[str, float]:
    """What the GPU computes of a prompt; `size` is tokens of a step, and steps."""
    gpu = _share_on_gpu(placement)
    rows, steps = size
    resident_or_staged = 1.0 if placement.staging else resident(placement, work)
    values = resident_or_staged * work.expert_values * (1 - work.late)
    dense = work.dense_values - work.head_values
    operations = 2 * rows * steps * (dense + values * work.share)
    experts, straight = sum(work.experts.values()), _straight(work, placement, rows)
    # A slab is read, and as float16 written and read.
    moved = resident_or_staged * (experts + 4 * work.expert_values) / GPU_EXPANDING
    moved = experts / GPU_STRAIGHT if straight else moved
    between = LONG_LAYER_KERNEL_SECONDS if straight else LONG_LAYER_GAP_SECONDS
    return {
        "products on the GPU": gpu * operations / (GPU_PRODUCTS * _bytes(machine.gpu_bf16)),
        "attention on the GPU": gpu * attended / GPU_ATTENTION,
        "expanding experts": gpu
        * (1 - work.late)
        * steps
        * moved
        * work.touched(rows)
        / _bytes(machine.vram),
        "between layers": steps * placement.layers_on_gpu * between,
        "host": steps * GPU_STEP_SECONDS,
    }


def _predicted(parts: Mapping[str, float], tokens: int) -> Prediction:
    kept = {name: seconds for name, seconds in parts.items() if seconds}
    total = sum(kept.values())
    if not total:
        return Prediction(0.0, "nothing to compute", kept)
    return Prediction(tokens / total, max(kept, key=lambda name: kept[name]), kept)


def _bytes(rate: float) -> float:
    return max(rate, 1e-3) * 1e9


def _over(operations: float, rate: float) -> float:
    """Seconds; 0 where the rate was not measured."""
    return operations / 1e9 / rate if rate else 0.0

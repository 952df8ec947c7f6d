"""Predicts tokens per second of a placement from a machine's measured rates.

Bytes over rates, with what runs at the same time taken as the longer of the two, and on the CPU
the measured time that a step and each of its matrices take whatever their size. Reads a file's
tensors and the planner's decision; measures nothing.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from greenroom.experts.limits import FEW_ROWS
from greenroom.experts.share import Share
from greenroom.placement.calibrate import MachineProfile
from greenroom.placement.cpu_seconds import CpuSeconds
from greenroom.placement.guests import copying, guests_come, shared_seconds
from greenroom.placement.placement import Placement
from greenroom.placement.sharing import measured_rates
from greenroom.placement.work import Work

# On an H100 over PCIe 5, see docs/performance.md. Of a recorded decode step, by layer:
HANDSHAKE_SECONDS = 11e-6  # with experts in RAM: bells, and 11 KB each way
GPU_LAYER_SECONDS = 43e-6  # kernels too short to fill the bandwidth
GPU_FEW = 0.38  # share of VRAM's bandwidth that products of 3 to 16 tokens reach
# Of other steps: the launch, waking up, the next call. Recorded ones are launched ahead, unless
# they begin behind layers on the CPU.
GPU_STEP_SECONDS = 0.35e-3
# Of a step that is not recorded and whose experts the CPU computes, by layer: launches while the
# CPU waits for hidden states (demo model, 26 November 2026: 24 such layers took 20 ms).
PLAIN_LAYER_SECONDS = 0.8e-3
# Of a long step, by layer: what the host needs while GPU and bus work, and what passes between the
# last copy or product and the next layer's first. Experts of few rows take fewer launches
# (gpt-oss-20b with nearly all in VRAM, 64 and 256 tokens, an H100, 26 November 2026).
LONG_LAYER_HOST_SECONDS, FEW_ROWS_HOST_SECONDS = 4.7e-3, 2.2e-3
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


def _head_on_gpu(placement: Placement) -> bool:
    return placement.backend == "cuda" and placement.head_on_gpu


def _dense_on_gpu(placement: Placement, dense: Mapping[str, int], head: Mapping[str, int]) -> float:
    """Of the dense part's bytes or weights, those in VRAM."""
    last = sum(head.values())
    body = _share_on_gpu(placement) * (sum(dense.values()) - last)
    return body + _head_on_gpu(placement) * last


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
    cpu = CpuSeconds(machine, work, batch * work.cached(context))
    whole = cpu.dense(work.dense, rows, work.dense_values, work.dense_outputs)
    head = cpu.dense(work.head, rows, work.head_values, work.head_outputs)
    parts = {
        "dense layers from RAM": (1 - gpu) * (whole - head),
        "head from RAM": (1 - _head_on_gpu(placement)) * head,
        "attention on the CPU": (1 - gpu) * cpu.attention_step(batch, context),
        "norms and the like": (1 - gpu) * cpu.between(rows),
    }
    vram = _bytes(machine.vram)
    there = _dense_on_gpu(placement, work.dense, work.head) / _reached(batch)
    parts["dense layers from VRAM"] = (there + gpu * work.cache * context * batch) / vram
    if hits is None:
        hits = resident(placement, work) if gpu else 0.0
    used = work.touched(batch)
    from_ram = _from_ram(cpu, placement, rows, hits, measured)
    from_vram = hits * used * sum(work.experts.values()) / (vram * _reached(batch))
    # Both work at once; the longer decides.
    longer = "experts from RAM" if from_ram >= from_vram else "experts from VRAM"
    parts[longer] = max(from_ram, from_vram)
    if placement.backend == "cuda" and not measured:
        parts["handshakes"] = gpu * work.layers * HANDSHAKE_SECONDS * (hits < 1)
        parts["short kernels"] = placement.layers_on_gpu * GPU_LAYER_SECONDS
        parts["host"] = GPU_STEP_SECONDS * (gpu < 1 or not _head_on_gpu(placement))
    if not measured:
        parts["host and threads"] = (1 - gpu) * _host(work, machine, batch)
    return _predicted(parts, batch)


def _from_ram(
    cpu: CpuSeconds, placement: Placement, rows: int, hits: float, measured: bool
) -> float:
    """Seconds of the experts that have no slot, besides handshakes; see `decode`."""
    if not (placement.layers_on_gpu and guests_come(cpu, placement.staging, rows)):
        return (1 - hits) * cpu.experts(rows)
    if measured:  # at best CPU and bus are busy all the time
        return (1 - hits) / (1 / cpu.experts(rows) + 1 / copying(cpu, rows))
    return shared_seconds(cpu, placement.staging, rows, hits)


def _reached(rows: int) -> float:
    """Share of VRAM's bandwidth that products of a decode step reach."""
    return 1.0 if rows <= 2 else GPU_FEW


def _host(work: Work, machine: MachineProfile, sequences: int) -> float:
    more = (sequences - 1) * machine.sequence_seconds
    return machine.step_seconds + machine.matrix_seconds * work.matrices + more


def prefill(
    work: Work, placement: Placement, machine: MachineProfile, tokens: int, sequences: int = 1
) -> Prediction:
    """`sequences` prompts of `tokens` tokens each, in steps of what the placement allows."""
    every = tokens * sequences
    chunk = min(every, placement.prefill_chunk or 512)
    steps = math.ceil(every / chunk)
    rows = every / steps
    gpu = _share_on_gpu(placement)
    attended = sequences * work.attended(0, tokens)
    cpu = CpuSeconds(machine, work)
    sizes = _chunks(every, chunk)
    dense = sum(n * _body(cpu, size) for size, n in sizes.items())
    beside = machine.prompt_seconds + every * machine.token_seconds
    last = cpu.dense(work.head, sequences, work.head_values, work.head_outputs)
    parts = {
        "dense products on the CPU": (1 - gpu) * dense,
        "head on the CPU": (1 - _head_on_gpu(placement)) * last,  # of the last token only
        "attention on the CPU": (1 - gpu) * cpu.attention_prompt(sequences, tokens),
        "norms and the like": (1 - gpu) * cpu.between(every),
        "host and threads": (1 - gpu) * (steps * _host(work, machine, 1) + beside),
    }
    on_cpu = sum(n * (1 - work.late) * cpu.experts(size) for size, n in sizes.items())
    on_cpu += work.late * cpu.experts(sequences)
    if gpu:
        parts |= _on_gpu(work, placement, machine, (rows, steps), attended)
    missing = 1 - resident(placement, work) if gpu else 1.0
    if gpu and placement.staging and machine.pcie:
        copied = steps * missing * sum(work.experts.values()) / _bytes(machine.pcie)
        copied *= (1 - work.late) * (1 - _lent(work, machine, rows, missing))
        waits = not _runs_ahead(work, placement, rows)
        launching = FEW_ROWS_HOST_SECONDS if _straight(work, rows) else LONG_LAYER_HOST_SECONDS
        launched = waits * steps * placement.layers_on_gpu * launching
        parts = _longest(parts, {"experts over PCIe": copied, "launches": launched})
    elif missing:
        parts["experts on the CPU"] = missing * on_cpu
    return _predicted(parts, every)


def _body(cpu: CpuSeconds, tokens: int) -> float:
    """Seconds of the matrices that every token of a prompt passes, on the CPU."""
    work = cpu.work
    sizes = {name: size - work.head.get(name, 0) for name, size in work.dense.items()}
    values = {name: n - work.head_values.get(name, 0) for name, n in work.dense_values.items()}
    return cpu.dense(sizes, tokens, values, work.dense_outputs - work.head_outputs)


def _chunks(tokens: int, chunk: int) -> dict[int, int]:
    """How many steps of which size so many tokens take."""
    whole, rest = divmod(tokens, chunk)
    return {size: n for size, n in ((chunk, whole), (rest, 1)) if size and n}


def _longest(parts: Mapping[str, float], beside: Mapping[str, float]) -> dict[str, float]:
    """The parts, those of the GPU replaced where what runs beside them takes longer."""
    name = max(beside, key=lambda name: beside[name])
    if beside[name] <= sum(parts[part] for part in _GPU_PARTS):
        return dict(parts)
    return {part: s for part, s in parts.items() if part not in _GPU_PARTS} | {name: beside[name]}


_GPU_PARTS = ("products on the GPU", "attention on the GPU", "expanding experts")


def _lent(work: Work, machine: MachineProfile, rows: float, missing: float) -> float:
    """Share of the missing experts that the CPU computes in a step of so many tokens, by the
    engine's own rule, routed uniformly."""
    rates = measured_rates(machine, work.experts, machine.threads)
    absent, total = round(missing * work.count), work.layers * work.count
    if rates is None or not absent:
        return 0.0
    nbytes, weights = (sum(of.values()) // total for of in (work.experts, work.expert_values))
    sizes = [work.per_expert(rows)] * work.count
    return len(Share(rates).lend(range(absent), absent, sizes, nbytes, weights)) / absent


def _straight(work: Work, rows: float) -> bool:
    """Whether a step of so many tokens multiplies experts straight from their blocks."""
    return rows * work.share <= FEW_ROWS


def _runs_ahead(work: Work, placement: Placement, rows: float) -> bool:
    """Whether the host need not know such a step's routes."""
    return resident(placement, work) >= 1 and _straight(work, rows)


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
    weights = sum(work.expert_values.values())
    values = resident_or_staged * weights * (1 - work.late)
    dense = sum(work.dense_values.values()) - sum(work.head_values.values())
    operations = 2 * rows * steps * (dense + values * work.share)
    experts = sum(work.experts.values())
    # A slab is read, and unless its rows are few, as float16 written and read.
    straight, expanded = experts / GPU_STRAIGHT, (experts + 4 * weights) / GPU_EXPANDING
    moved = resident_or_staged * (straight if _straight(work, rows) else expanded)
    between = LONG_LAYER_GAP_SECONDS if resident_or_staged else PLAIN_LAYER_SECONDS
    between = LONG_LAYER_KERNEL_SECONDS if _runs_ahead(work, placement, rows) else between
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

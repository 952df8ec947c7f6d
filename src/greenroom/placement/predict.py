"""Predicts tokens per second of a placement from a machine's measured rates.

Bytes over rates, with what runs at the same time taken as the longer of the two, and on the CPU
the measured time that a step and each of its matrices take whatever their size. Reads a file's
tensors and the planner's decision; measures nothing.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from greenroom.gguf import TensorInfo
from greenroom.models.config import ModelConfig
from greenroom.placement.calibrate import MachineProfile
from greenroom.placement.placement import Placement

_SPLIT = re.compile(r"\.\d+\.weight$")  # one expert of several, each a tensor of its own
_EXPERTS = re.compile(r"_exps\.weight$|\.ffn_(gate|up|down)\.\d+\.weight$")
# Per layer with experts in RAM: bells and 11 KB each way, within a recorded step, took 10.7 us on
# an H100 over PCIe 5.
HANDSHAKE_SECONDS = 11e-6


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

    @staticmethod
    def of(tensors: Mapping[str, TensorInfo], config: ModelConfig) -> "Work":
        """Reads it off a file's tensors."""
        experts: Counter[str] = Counter()
        dense: Counter[str] = Counter()
        values = [0, 0]
        layers, matrices = set(), set()
        tied = "output.weight" not in tensors
        head = tensors["token_embd.weight" if tied else "output.weight"]
        for name, tensor in tensors.items():
            if name.startswith("token_embd") and not tied:
                continue
            routed = bool(_EXPERTS.search(name))
            (experts if routed else dense)[tensor.type.name] += tensor.nbytes
            count = 1
            for size in tensor.ne:
                count *= size
            values[routed] += count
            if len(tensor.ne) > 1:
                matrices.add(_SPLIT.sub("", name))
            if routed:
                layers.add(name.split(".")[1])
        moe, shape = config.moe, config.attention
        per_layer = 2 * shape.kv_heads * (shape.key_length + shape.value_length)
        return Work(
            experts=experts,
            dense=dense,
            expert_values=values[1],
            dense_values=values[0],
            share=moe.used / moe.experts if moe else 0.0,
            count=moe.experts if moe else 0,
            layers=len(layers),
            cache=per_layer * sum(window is None for window in config.windows),
            head={head.type.name: head.nbytes},
            head_values=head.ne[0] * head.ne[1],
            matrices=len(matrices),
        )

    def touched(self, batch: int) -> float:
        """Share of the experts' bytes that a step of `batch` tokens reads, routed uniformly."""
        return 1 - (1 - self.share) ** batch


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
    cache = work.cache * context * batch
    dense = sum(work.dense.values())
    parts = {
        "dense layers from RAM": (1 - gpu) * _seconds(work.dense, machine.dense_rate),
        "keys and values from RAM": (1 - gpu) * cache / _bytes(machine.dram_best),
    }
    if gpu:
        parts["dense layers from VRAM"] = gpu * (dense + cache) / _bytes(machine.vram)
    if hits is None:
        hits = resident(placement, work) if gpu else 0.0
    there = work.touched(batch)
    from_ram = (1 - hits) * there * _seconds(work.experts, machine.expert_rate)
    from_vram = hits * there * sum(work.experts.values()) / _bytes(machine.vram) if hits else 0.0
    # Both work at once; the longer decides.
    longer = "experts from RAM" if from_ram >= from_vram else "experts from VRAM"
    parts[longer] = max(from_ram, from_vram)
    if gpu and hits < 1 and not measured:
        parts["handshakes"] = gpu * work.layers * HANDSHAKE_SECONDS
    if not measured:
        parts["host and threads"] = (1 - gpu) * _host(work, machine)
    return _predicted(parts, batch)


def _host(work: Work, machine: MachineProfile) -> float:
    return machine.step_seconds + machine.matrix_seconds * work.matrices


def prefill(
    work: Work, placement: Placement, machine: MachineProfile, tokens: int
) -> Prediction:  # fmt: skip
    """A prompt of `tokens` tokens, in steps of what the placement allows."""
    chunk = min(tokens, placement.prefill_chunk or 512)
    gpu = _share_on_gpu(placement)
    dense_ops = 2 * (work.dense_values - work.head_values) * chunk
    expert_ops = 2 * work.expert_values * work.share * chunk
    parts = {
        "dense products on the CPU": (1 - gpu)
        * max(
            dense_ops * _per(work.dense, machine.dense_batch_rate),
            _seconds(work.dense, machine.dense_rate) - _seconds(work.head, machine.dense_rate),
        ),
        # of the last token only
        "head on the CPU": (1 - gpu) * chunk / tokens * _seconds(work.head, machine.dense_rate),
        "host and threads": (1 - gpu) * _host(work, machine),
    }
    on_cpu = max(
        expert_ops * _per(work.experts, machine.expert_batch_rate),
        work.touched(chunk) * _seconds(work.experts, machine.expert_rate),
    )
    if gpu:
        parts["products on the GPU"] = gpu * (dense_ops + expert_ops) / _bytes(machine.gpu_bf16)
    missing = 1 - resident(placement, work) if gpu else 1.0
    if gpu and placement.staging and machine.pcie:
        copied = missing * sum(work.experts.values()) / _bytes(machine.pcie)
        # The copy runs under the computation.
        products = parts.pop("products on the GPU")
        parts["experts over PCIe" if copied > products else "products on the GPU"] = max(
            copied, products
        )
    elif missing:
        parts["experts on the CPU"] = missing * on_cpu
    return _predicted(parts, chunk)


def _predicted(parts: Mapping[str, float], tokens: int) -> Prediction:
    kept = {name: seconds for name, seconds in parts.items() if seconds}
    total = sum(kept.values())
    if not total:
        return Prediction(0.0, "nothing to compute", kept)
    return Prediction(tokens / total, max(kept, key=lambda name: kept[name]), kept)


def _bytes(rate: float) -> float:
    return max(rate, 1e-3) * 1e9


def _seconds(sizes: Mapping[str, int], rate: object) -> float:
    """Seconds to read all, each format at its kernel's rate."""
    assert callable(rate)
    return sum(size / _bytes(rate(name)) for name, size in sizes.items())


def _per(sizes: Mapping[str, int], rate: object) -> float:
    """Seconds per operation, formats weighed by their bytes."""
    assert callable(rate)
    total = sum(sizes.values()) or 1
    return sum(size / total / _bytes(rate(name)) for name, size in sizes.items())

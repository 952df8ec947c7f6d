"""What experts in RAM take in a short step of a GPU that reads some of them over the bus while the
CPU computes the others. Shares them by the engine's own rule; measures nothing.
"""

from greenroom.experts.limits import BESIDE_STAGED, SHORT_STEP, pages_of
from greenroom.experts.quota import BELLS, Pace, binomial, layer_seconds, quotas
from greenroom.placement.cpu_seconds import CpuSeconds
from greenroom.placement.work import Work

# The engine measures them when it loads a model: share of the bus's rate at which the GPU reads
# experts where they lie, and times as long the CPU takes meanwhile.
READING = 0.85
SLOWED = 1.1


def pace_of(cpu: CpuSeconds) -> Pace:
    """What the engine would measure, from a machine's rates."""
    work, machine = cpu.work, cpu.machine
    all_experts, nbytes = work.layers * work.count, expert_bytes(work) / 1e9
    used, met = all_experts * work.share, all_experts * work.touched(SHORT_STEP)
    expert = cpu.experts(1) / used
    further = max(1.0, SHORT_STEP * used - met)
    return Pace(
        expert=expert,
        row=max(0.0, cpu.experts(SHORT_STEP) - met * expert) / further,
        guest=nbytes / machine.pcie / READING,
        copy=nbytes / machine.pcie,
        route=nbytes / machine.vram if machine.vram else 0.0,
        slowed=SLOWED,
    )


def expert_bytes(work: Work) -> int:
    """Of one."""
    return sum(work.experts.values()) // (work.layers * work.count)


def room_of(work: Work, staging: int) -> int:
    """Experts that staging memory of so many bytes has places for."""
    weights = sum(work.expert_values.values()) // (work.layers * work.count)
    expanded = 2 * 2 * weights // 3  # two matrices of three, two bytes each
    room = staging - BESIDE_STAGED * work.count
    pages, slabs = pages_of(room, expert_bytes(work), expanded, work.count)
    return pages * slabs


def guests_come(cpu: CpuSeconds, staging: int, tokens: int) -> bool:
    """Whether the GPU may take experts from the CPU in a step of so many tokens."""
    return bool(staging and cpu.machine.pcie and cpu.work.layers and tokens <= SHORT_STEP)


def copying(cpu: CpuSeconds, tokens: int) -> float:
    """Seconds of the bus for all experts that so many tokens use."""
    return cpu.work.touched(tokens) * sum(cpu.work.experts.values()) / 1e9 / cpu.machine.pcie


def shared_seconds(cpu: CpuSeconds, staging: int, tokens: int, slots: float) -> float:
    """Of all layers' experts without a slot, besides the bells of CPU and GPU; routed uniformly.

    Args:
        cpu: the model and what runs it.
        staging: bytes of VRAM.
        tokens: of the step.
        slots: share of the experts that have one.
    """
    work = cpu.work
    used = round(work.count * work.share)
    rule = (pace_of(cpu), work.count, used, room_of(work, staging), tokens)
    every, wanted = layer_seconds(*rule), quotas(*rule)
    met = round(work.count * work.touched(tokens))
    layer = 0.0
    for missing, likely in binomial(met, 1 - slots).items():
        guests = int(wanted[missing - 1])
        rung = BELLS if guests < missing else 0.0
        layer += likely * (float(every[missing - 1, guests]) - rung)
    return work.layers * layer

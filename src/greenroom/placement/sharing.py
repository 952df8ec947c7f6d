"""The rates by which long steps are shared between bus and CPU, as predictions take them from what
was measured of a machine. The engine measures its own when it loads a model, for experts of one or
two tokens, too, and rounds them finer.
"""

from collections.abc import Mapping

from greenroom.experts.limits import rounded
from greenroom.experts.share import Rates
from greenroom.placement.calibrate import MachineProfile


def measured_rates(
    profile: MachineProfile, experts: Mapping[str, int], threads: int
) -> Rates | None:
    """Rates of a machine for a model; None where the profile lacks one.

    Args:
        profile: of the machine.
        experts: bytes of the model's experts by format.
        threads: that compute.
    """
    total, bus, dram = sum(experts.values()), profile.pcie, profile.dram_best
    speeds = {name: profile.expert_batch_rate(name) for name in experts}
    if not (total and bus and dram and all(speeds.values())):
        return None
    # Of 32 tokens an expert, what its weights cost included, which the engine counts with reading;
    # the profile's reading is without it.
    operations = total / sum(size / speeds[name] for name, size in experts.items())
    reading = max(dram - bus, dram / 4)  # the copies read the same memory
    part = threads / profile.threads
    return Rates(*(1e9 * rounded(rate) for rate in (bus, reading * part, operations * part)))

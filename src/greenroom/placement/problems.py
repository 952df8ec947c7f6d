"""What about a machine will slow models down, and how to mend it. Judges facts; finds none."""

from collections.abc import Iterator
from dataclasses import dataclass

from greenroom.placement.calibrate import MachineProfile
from greenroom.placement.hardware import LEAST_CAPABILITY
from greenroom.placement.machine import Machine

_FULL_WIDTH = 16  # lanes
# A pinned copy reaches some 85 % of the lanes' rate; below half of it something is wrong.
_LANE = {3: 0.985, 4: 1.97, 5: 3.94, 6: 7.56}  # GB/s per lane by PCIe generation


@dataclass(frozen=True, slots=True)
class Problem:
    """`grave`: it costs much speed or a feature. `fix` says what to do."""

    grave: bool
    what: str
    fix: str


def problems(machine: Machine, profile: MachineProfile | None = None) -> list[Problem]:
    """Everything that is wrong, the grave first."""
    found = [
        *_processor(machine),
        *_memory(machine),
        *_gpus(machine),
        *_software(machine),
        *_disks(machine),
    ]
    if profile is not None:
        found += _rates(machine, profile)
    return sorted(found, key=lambda problem: not problem.grave)


def busy(load: float, threads: int) -> list[Problem]:
    """What other programs did to the rates measured beside them.

    Args:
        load: runnable threads before measuring, as the system averages them over a minute.
        threads: that measured.
    """
    if load < threads / 4:
        return []
    return [
        Problem(
            load > threads / 2,
            f"other programs kept {load:.1f} of {threads} processors busy before it measured",
            "end them and run 'greenroom doctor' again; plan and placement go by these rates",
        )
    ]


def _processor(machine: Machine) -> Iterator[Problem]:
    cpu = machine.processor
    missing = [tier for tier in cpu.runnable if tier not in cpu.tiers]
    if missing:
        yield Problem(
            missing[-1] == cpu.runnable[-1],
            f"the kernels for {', '.join(missing)} are not installed, though the processor has it",
            "reinstall greenroom, or build it with GREENROOM_TIERS naming them",
        )
    if cpu.runnable == ("portable",):
        yield Problem(
            True, "the processor has no AVX2: experts are computed by plain code",
            "use a machine from 2013 or later, or keep all experts in VRAM",
        )  # fmt: skip
    if cpu.quota is not None and cpu.quota < cpu.cores:
        yield Problem(
            cpu.quota < cpu.cores / 2,
            f"the container grants {cpu.quota:g} of {cpu.cores} cores",
            "raise its CPU limit; more threads than granted are throttled, not faster",
        )
    if cpu.allowed > cpu.cores:
        yield Problem(
            False,
            f"{cpu.allowed} logical processors are {cpu.cores} cores: SMT siblings are in the mask",
            f"nothing: {cpu.threads} threads are used; do not raise --threads above {cpu.cores}",
        )
    if cpu.numa_nodes > 1:
        yield Problem(
            False, f"the memory has {cpu.numa_nodes} NUMA nodes",
            "bind the process to one with numactl if its RAM suffices",
        )  # fmt: skip
    if cpu.governor == "powersave":
        yield Problem(
            False, "the frequency governor is powersave",
            "cpupower frequency-set -g performance, unless the driver is intel_pstate",
        )  # fmt: skip


def _memory(machine: Machine) -> Iterator[Problem]:
    ram = machine.memory
    if ram.huge_pages == "never":
        yield Problem(
            True,
            "transparent huge pages are off: a quarter of the read bandwidth goes to addresses",
            "echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled",
        )
    if ram.huge_pages is None and machine.system.startswith("Linux"):
        yield Problem(
            False, "the kernel does not tell whether huge pages are on",
            "in a container, look on its host",
        )  # fmt: skip
    if ram.memlock is not None and ram.memlock < ram.total // 2:
        yield Problem(
            bool(machine.gpus),
            f"only {ram.memlock >> 10} KiB may be locked in memory",
            "ulimit -l unlimited, or LimitMEMLOCK=infinity in the service, so that experts can be "
            "kept from being swapped out",
        )
    if ram.swap_used > 1 << 30:
        yield Problem(
            True, f"{ram.swap_used / 2**30:.1f} GiB are swapped out",
            "end what fills the RAM; swapped experts are read from disk again and again",
        )  # fmt: skip


def _gpus(machine: Machine) -> Iterator[Problem]:
    if machine.adapters and not machine.gpus:
        yield Problem(
            True, "there is an NVIDIA GPU on the bus, but no driver that answers",
            "install the NVIDIA driver, or pass the GPU into the container (--gpus all)",
        )  # fmt: skip
    for gpu in machine.gpus:
        if machine.cuda_build is None:
            yield Problem(
                True, f"this PyTorch is built without CUDA, so {gpu.name} cannot be used",
                "install a CUDA build of torch",
            )  # fmt: skip
        elif gpu.capability is None:
            yield Problem(
                True, f"PyTorch does not see {gpu.name}",
                f"its CUDA {machine.cuda_build} may need a newer driver than {gpu.driver}, or "
                "CUDA_VISIBLE_DEVICES hides it",
            )  # fmt: skip
        elif tuple(map(int, gpu.capability.split("."))) < LEAST_CAPABILITY:
            yield Problem(
                True, f"{gpu.name} has compute capability {gpu.capability}, too old for Triton",
                "use a GPU of 2018 (Turing) or later; the CPU is used meanwhile",
            )  # fmt: skip
        if gpu.link_width is not None and gpu.link_width < _FULL_WIDTH:
            yield Problem(
                gpu.link_width <= _FULL_WIDTH // 4,
                f"{gpu.name} has {gpu.link_width} PCIe lanes (it could use {gpu.link_most_width})",
                "move it to a slot with 16 lanes, or remove what shares them",
            )


def _software(machine: Machine) -> Iterator[Problem]:
    versions = machine.versions
    if machine.gpus and versions["triton"] is None:
        yield Problem(True, "Triton is missing, so the GPU cannot be used", "pip install triton")
    if machine.gpus and versions["nvidia-ml-py"] is None:
        yield Problem(
            False, "energy and peak VRAM of the driver cannot be read",
            "pip install nvidia-ml-py",
        )  # fmt: skip
    if versions["matplotlib"] is None:
        yield Problem(False, "plots cannot be drawn", "pip install matplotlib")


def _disks(machine: Machine) -> Iterator[Problem]:
    for disk in machine.disks:
        if disk.rotational and disk.model is not None:  # virtual disks say 1 and mean nothing
            yield Problem(
                False, f"{disk.folder} is on a rotating disk ({disk.model})",
                "keep models on an SSD",
            )  # fmt: skip


def _rates(machine: Machine, profile: MachineProfile) -> Iterator[Problem]:
    if not machine.gpus or not profile.pcie_up:
        return
    gpu, best = machine.gpus[0], max(profile.pcie_up.values())
    lanes, generation = gpu.link_most_width, gpu.link_most_generation
    if lanes is not None and generation in _LANE:
        could = lanes * _LANE[generation]
        if best < could / 2:
            yield Problem(
                True, f"pinned copies to {gpu.name} reach {best:.0f} GB/s of {could:.0f}",
                "look for a narrower slot, a riser, or a neighbour on the same switch",
            )  # fmt: skip

"""`greenroom doctor`: what this machine has, how fast it is, and what is wrong with it."""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

if TYPE_CHECKING:
    from rich.table import Table

    from greenroom.placement.calibrate import MachineProfile
    from greenroom.placement.machine import Machine
    from greenroom.placement.problems import Problem

Json = Annotated[bool, Option("--json", help="Print one JSON document instead of tables.")]
Quick = Annotated[bool, Option("--quick", help="Fewer formats and less memory: ten seconds.")]
NoMeasure = Annotated[bool, Option("--no-measure", help="Only look; keep what was measured.")]
Folder = Annotated[
    Path | None, Option("--disk", help="Folder whose disk is read.  [default: the cache folder]")
]
Report = Annotated[Path | None, Option(help="Folder for doctor.md and doctor.json.")]


def doctor(
    as_json: Json = False,
    quick: Quick = False,
    no_measure: NoMeasure = False,
    disk: Folder = None,
    report: Report = None,
) -> None:
    """Look at this machine, measure it, and name what slows models down.

    The measured rates are saved in the cache folder (GREENROOM_HOME changes it) and used by
    'greenroom plan' and by the engine's choice of a placement.
    """
    from greenroom.commands.console import errors
    from greenroom.errors import RequestError
    from greenroom.placement.calibrate import save_profile, saved_profile
    from greenroom.placement.folder import cache_folder
    from greenroom.placement.machine import machine
    from greenroom.placement.problems import busy, problems

    folder = disk or cache_folder()
    if disk is not None and not disk.is_dir():
        raise RequestError(f"--disk {disk}: there is no such folder", "disk")
    found = machine([folder, Path.cwd()])
    load = os.getloadavg()[0]
    if no_measure:
        profile, path = saved_profile(found.fingerprint), None
    else:
        from greenroom.bench.ceilings import measure

        with errors.status("measuring") as status, small_models() as small:
            profile = measure(found, quick, folder, small, status.update)
        path = save_profile(profile)
    wrong = problems(found, profile)
    if path is not None:
        wrong = busy(load, found.processor.threads) + wrong
    if report is not None:
        _write(found, profile, wrong, report)
    if as_json:
        print(json.dumps(document(found, profile, wrong), indent=1))
        return
    show(found, profile, wrong)
    if path is not None:
        errors.print(f"saved as {path}")


@contextmanager
def small_models() -> "Iterator[list[Path]]":
    """Files of two tiny models of Q8_0, of few layers and of many, for as long as the block
    lasts."""
    from greenroom.convert.synth import Synthesis, write_synthetic
    from greenroom.convert.synth_shapes import shape_of

    with tempfile.TemporaryDirectory(prefix="greenroom-") as folder:
        paths = []
        for layers in (2, 12):
            paths.append(Path(folder) / f"{layers}.gguf")
            shape = shape_of("deepseek-moe-16b-tiny", layers)
            write_synthetic(Synthesis(shape, mix="Q8_0"), paths[-1])
        yield paths


def document(
    machine: "Machine", profile: "MachineProfile | None", wrong: "list[Problem]"
) -> dict[str, Any]:
    """Everything the command prints, ready for JSON."""
    from dataclasses import asdict

    return {
        "kind": "greenroom doctor",
        "version": 1,
        "fingerprint": machine.fingerprint,
        "machine": machine.json(),
        "profile": None if profile is None else profile.json(),
        "problems": [asdict(problem) for problem in wrong],
    }


def _write(
    machine: "Machine", profile: "MachineProfile | None", wrong: "list[Problem]", folder: Path
) -> None:
    """doctor.json and doctor.md, without the names of this user's folders."""
    from greenroom.bench.speed import command_line, public

    whole = document(machine, profile, wrong) | {"machine": public(machine)}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "doctor.json").write_text(json.dumps(whole, indent=1) + "\n")
    facts = [(name, text) for name, text in _facts(machine) if name != "disk"]
    facts += [] if profile is None else list(_rates(profile))
    lines = ["# What this machine is", "", f"`{command_line()}`", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {text} |" for name, text in facts]
    lines += ["", *(f"- {problem.what}; fix: {problem.fix}" for problem in wrong), ""]
    (folder / "doctor.md").write_text("\n".join(lines))


def show(machine: "Machine", profile: "MachineProfile | None", wrong: "list[Problem]") -> None:
    """Prints facts, rates and problems."""
    from rich.console import Console

    console = Console(highlight=False)
    console.print(_table(_facts(machine)))
    if profile is None:
        console.print("not measured yet; run 'greenroom doctor'")
    else:
        console.print(_table(_rates(profile)))
    if not wrong:
        console.print("nothing is wrong")
    for problem in wrong:
        mark = "[bold red]problem[/]" if problem.grave else "[yellow]note[/]"
        console.print(f"{mark}: {problem.what}\n  fix: {problem.fix}")


def _table(rows: "Iterator[tuple[str, str]]") -> "Table":
    from rich.table import Table

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, text in rows:
        table.add_row(name, text)
    return table


def _facts(machine: "Machine") -> Iterator[tuple[str, str]]:
    from greenroom.commands.console import size

    cpu, ram = machine.processor, machine.memory
    yield "processor", f"{cpu.name} ({cpu.architecture})"
    yield "instruction sets", f"{', '.join(cpu.tiers)}; {cpu.tiers[-1]} is used"
    yield "cores", f"{cpu.cores} of {cpu.logical} logical processors; {cpu.reason}"
    limit = "" if ram.limit is None else f", the container's limit is {size(ram.limit)}"
    yield "RAM", f"{size(ram.total)}, {size(ram.available)} available{limit}"
    lock = "unlimited" if ram.memlock is None else size(ram.memlock)
    yield "pages", f"transparent huge pages: {ram.huge_pages or 'unknown'}; lockable: {lock}"
    for gpu in machine.gpus:
        link = f"PCIe {gpu.link_most_generation} x{gpu.link_width}" if gpu.link_width else "PCIe ?"
        yield (
            "GPU",
            f"{gpu.name}, {size(gpu.free)} of {size(gpu.total)} free, {link}, "
            f"capability {gpu.capability or '?'}, driver {gpu.driver or '?'}",
        )
    if not machine.gpus:
        yield "GPU", "none that can be used"
    for disk in machine.disks:
        device = " ".join(filter(None, (disk.device, disk.model))) or "unknown device"
        yield "disk", f"{disk.folder}: {device}, {size(disk.free)} of {size(disk.total)} free"
    yield "system", machine.system
    versions = [f"{name} {version or '-'}" for name, version in machine.versions.items()]
    yield "versions", f"{', '.join(versions)}; CUDA of torch: {machine.cuda_build or 'none'}"


def _rates(profile: "MachineProfile") -> Iterator[tuple[str, str]]:
    yield "measured", f"{profile.date}, {profile.threads} threads"
    yield "RAM read, GB/s", _listed(profile.dram, "{} threads")
    yield "registers", f"{profile.int8:.0f} GOP/s int8, {profile.float32:.0f} float32"
    yield "experts, GB/s", _listed(profile.experts)
    yield "dense, GB/s", _listed(profile.dense)
    yield (
        "steps",
        (
            f"{profile.step_seconds * 1e6:.0f} µs each and {profile.matrix_seconds * 1e6:.1f} "
            "µs for every matrix, whatever its size"
        ),
    )
    yield "512 tokens, GOP/s", _listed(profile.experts_batch)
    if profile.gpu is not None:
        yield "PCIe to GPU, GB/s", _listed(profile.pcie_up, "{} MiB")
        yield "PCIe back, GB/s", _listed(profile.pcie_down, "{} MiB")
        yield "PCIe both ways", f"{profile.pcie_both:.1f} GB/s together"
        yield "VRAM", f"{profile.vram:.0f} GB/s read, {profile.gpu_bf16 / 1e3:.0f} TOP/s bf16"
    yield "disk, GB/s", _listed(profile.disk, "{} MiB") or "no direct reads there"


def _listed(rates: Any, label: str = "{}") -> str:
    return ", ".join(f"{label.format(key)}: {rate:.1f}" for key, rate in rates.items())

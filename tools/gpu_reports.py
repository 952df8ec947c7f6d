"""Run doctor, plan, bench, sweep and matrix on this machine and pack their reports.

    python tools/gpu_reports.py OUT --work DIR [--seconds 560] [--tiny] [--only sweep matrix]
        [--shapes gpt-oss-20b ...]

Every step is a process with a limit of its own, so that one failure does not lose the others; what
is left of `--seconds` bounds them all. OUT receives reports.tar.gz and steps.json after every step.
Models are written with random weights into the work folder, one at a time: of each shape its
sweep, if it has one, and its row of the matrix, then it is deleted. What an earlier call with the
same work folder reported is kept. `--tiny`: the same in little, for a machine without a GPU.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHAPES = (
    *("gpt-oss-20b", "qwen3-30b-a3b", "deepseek-moe-16b", "phi-3.5-moe"),
    *("mixtral-8x7b", "grin-moe"),
)
SWEPT = SHAPES[:4]


@dataclass(frozen=True, slots=True)
class Step:
    """A call of greenroom: its name, the most seconds it may take, and its arguments; `ends` is
    the file that nothing needs afterwards.
    """

    name: str
    seconds: int
    arguments: tuple[str, ...]
    ends: str | None = None


def steps(args: argparse.Namespace) -> Iterator[Step]:
    """In the order of their worth; paths are relative to the work folder."""
    plan = ("plan", args.model + "-tiny" * args.tiny, "--sweep")
    machine = [
        Step("doctor", 120, ("doctor", "--report", "reports/doctor", *("--quick",) * args.tiny)),
        Step("plan", 30, (*plan, "--plot", "reports/plan.png")),
        Step("plan-json", 30, (*plan, "--json")),
    ]
    yield from wanted(machine, args.only)
    for shape in args.shapes:
        yield from of_shape(shape, args)


def wanted(found: Iterable[Step], only: Sequence[str] | None) -> list[Step]:
    """Those that `--only` names, or whose names begin so."""
    return [step for step in found if only is None or step.name.startswith(tuple(only))]


def of_shape(name: str, args: argparse.Namespace) -> list[Step]:
    """Everything that is measured with one file, which is made first and then deleted."""
    from greenroom.convert.synth_shapes import shape_of

    shape = shape_of(name + "-tiny" * args.tiny, args.layers)
    file, layers = f"{shape.name}-{shape.layers}.gguf", ("--layers", str(shape.layers))
    runs = ("--runs", "2" if args.tiny else "5")
    found = []
    if name == args.model:
        found += [bench(budget, position, file, args) for position, budget in enumerate(args.vram)]
    if name in SWEPT:
        call = ("sweep", file, "--prompt", args.prompt, "--generate", args.generate)
        report = ("--report", f"reports/sweep-{name}")
        found.append(Step(f"sweep-{name}", 200, (*call, *report, *runs)))
    call = ("matrix", "--work", ".", "--shapes", name, "--quality-tiny")
    call += ("--vram", args.matrix_vram) * args.gpu
    call += ("--report", f"reports/matrix/{name}", *runs, *layers, *("--tiny",) * args.tiny)
    found.append(Step(f"matrix-{name}", 120, call))
    found = wanted(found, args.only)
    if not found:
        return []
    synth = Step(f"synth-{name}", 90, ("synth", shape.name, file, *layers))
    return [synth, *found[:-1], replace(found[-1], ends=file)]


def bench(budget: str, position: int, file: str, args: argparse.Namespace) -> Step:
    """The budgeted placement and all on the GPU in turn."""
    call = ("bench", file, "--baseline", "--report", f"reports/bench-{budget}")
    call += ("--vram", budget) if args.gpu else ("--mmap",)
    cold = ("--no-cold",) if position else ()
    small = ("--lengths", "64,128", "--generate", "16", "--runs", "2") if args.tiny else ()
    return Step(f"bench-{budget}", 150, (*call, *cold, *small))


def run(step: Step, work: Path, seconds: float) -> dict[str, object]:
    """Runs it; its output goes to logs/, without the work folder's name."""
    log = work / "reports" / "logs" / f"{step.name}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    paths = filter(None, os.getenv("PYTHONPATH", "").split(os.pathsep))
    env = os.environ | {
        "GREENROOM_HOME": os.getenv("GREENROOM_HOME", str(work / "home")),
        "PYTHONPATH": os.pathsep.join(map(os.path.abspath, paths)),
    }
    command = [sys.executable, "-m", "greenroom", *step.arguments]
    begin = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=work, env=env, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            status: int | str = process.wait(max(1.0, min(seconds - 3, step.seconds)))
        except subprocess.TimeoutExpired:
            status = "out of time"
        finally:
            end(process)
    text = log.read_text(errors="replace")
    log.write_text(text.replace(str(work), ".").replace(f"{ROOT}{os.sep}", ""))
    taken = round(time.monotonic() - begin, 1)
    print(f"{step.name}: {status}, {taken} s", flush=True)
    if status:
        print("\n".join(log.read_text().splitlines()[-15:]), flush=True)
    return {"step": step.name, "status": status, "seconds": taken,
            "command": " ".join(["greenroom", *step.arguments])}  # fmt: skip


def end(process: "subprocess.Popen[bytes]") -> None:
    """Ends the process and whatever it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    finally:
        process.wait()


def join(parts: Sequence[Path], folder: Path) -> None:
    """One table of the shapes in several matrix.json; of a shape measured twice the later one."""
    from greenroom.bench import matrix as table

    found = [json.loads(path.read_text()) for path in parts]
    models = {model["shape"].removesuffix("-tiny"): model for p in found for model in p["models"]}
    order = [name for name in SHAPES if name in models]
    calls = dict.fromkeys(part["command"] for part in found)
    whole = found[-1] | {"models": [models[name] for name in order], "command": " ; ".join(calls)}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "matrix.json").write_text(json.dumps(whole) + "\n")
    (folder / "matrix.md").write_text(table.markdown(whole))


def main(arguments: Sequence[str] | None = None) -> None:
    args = parsed(arguments)
    if args.join:
        join([folder / "matrix.json" for folder in args.join], args.out)
        return
    work, ends = args.work.resolve(), time.monotonic() + args.seconds
    work.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, stopped)
    done: list[dict[str, object]] = []
    try:
        for step in steps(args):
            left = ends - time.monotonic()
            if left > 5:
                done.append(run(step, work, left))
                pack(done, work, args.out)
            if step.ends is not None:
                (work / step.ends).unlink(missing_ok=True)
    finally:
        pack(done, work, args.out)


def stopped(*_: object) -> None:
    """What is there is packed when somebody else ends this program."""
    raise SystemExit(1)


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    from greenroom.placement.gpus import gpu_facts

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--work", type=Path, default=Path("work"), help="room for 27 GB")
    parser.add_argument("--seconds", type=float, default=560, help="for everything")
    parser.add_argument("--model", default="gpt-oss-20b", help="shape of plan and bench")
    parser.add_argument("--vram", nargs="*", default=["2GiB"], help="budgets of bench")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--layers", type=int, help="instead of the published ones")
    parser.add_argument("--prompt", default="256", help="tokens of the sweep's prompts")
    parser.add_argument("--generate", default="24", help="tokens the sweep generates")
    parser.add_argument("--matrix-vram", default="2GiB", help="the matrix's budget")
    parser.add_argument("--only", nargs="+", help="names of steps, or how they begin")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument(
        "--join", nargs="+", type=Path, help="only join the matrix.json of these folders into OUT"
    )
    args = parser.parse_args(arguments)
    args.gpu = bool(gpu_facts()[0])
    return args


def pack(done: list[dict[str, object]], work: Path, out: Path) -> None:
    """What there is until now, so that a run cut short still leaves its reports."""
    reports = work / "reports"
    plan = reports / "logs" / "plan-json.txt"
    if plan.exists():
        plan.replace(reports / "plan.json")
    rows = sorted((reports / "matrix").glob("*/matrix.json"), key=lambda path: path.stat().st_mtime)
    if rows:
        join(rows, work / "joined")
    (out / "steps.json").write_text(json.dumps(done, indent=1) + "\n")
    with tarfile.open(out / "reports.tar.gz", "w:gz") as archive:
        for path in sorted(reports.glob("*")):
            whole = path.name != "matrix"
            if whole or rows:
                archive.add(path if whole else work / "joined", f"reports/{path.name}")


if __name__ == "__main__":
    main()

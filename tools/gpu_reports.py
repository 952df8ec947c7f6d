"""Run doctor, plan, bench and matrix on this machine and pack their reports into one archive.

    python tools/gpu_reports.py OUT --work DIR [--seconds 560] [--tiny]

Every step is a process with a limit of its own, so that one failure does not lose the others; what
is left of `--seconds` bounds them all. OUT receives reports.tar.gz and steps.json. The models are
written with random weights into the work folder and deleted. `--tiny`: the same in little, for
a machine without a GPU.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SOURCES = Path(__file__).resolve().parents[1] / "src"
SHAPES = (
    *("gpt-oss-20b", "phi-3.5-moe", "deepseek-moe-16b"),
    *("mixtral-8x7b", "grin-moe", "qwen3-30b-a3b"),
)


@dataclass(frozen=True, slots=True)
class Step:
    """A call of greenroom: its name, the most seconds it may take, and its arguments."""

    name: str
    seconds: int
    arguments: tuple[str, ...]


def steps(args: argparse.Namespace) -> list[Step]:
    """In the order of their worth; paths are relative to the work folder."""
    small = "-tiny" if args.tiny else ""
    model = args.model + small
    runs = ("--runs", "2" if args.tiny else "5")
    cases = ("--lengths", "64,128", "--generate", "16") if args.tiny else ()
    plan = ("plan", model, "--sweep")
    found = [
        Step("doctor", 120, ("doctor", "--report", "reports/doctor", *("--quick",) * args.tiny)),
        Step("synth", 90, ("synth", model, f"{model}.gguf")),
        Step("plan", 30, (*plan, "--plot", "reports/plan.png")),
        Step("plan-json", 30, (*plan, "--json")),
    ]
    for position, budget in enumerate(args.vram):
        report = ("--report", f"reports/bench-{budget}", "--vram", budget)
        cold = ("--no-cold",) if position else ()
        found.append(
            Step(f"bench-{budget}", 150,
                 ("bench", f"{model}.gguf", "--baseline", *report, *cold, *cases, *runs))
        )  # fmt: skip
    for shape in args.shapes:
        found.append(matrix(shape, args, runs))
    tiny = ("matrix", "--work", "tiny", "--tiny", "--runs", "3", "--report", "reports/matrix-tiny")
    return [*found, Step("matrix-tiny", 120, (*tiny, "--shapes", ",".join(args.shapes)))]


def matrix(shape: str, args: argparse.Namespace, runs: Sequence[str]) -> Step:
    """One shape's row; quality is that of the tiny shapes, as float32 takes too long here."""
    cut = ("--tiny", "--layers", "2") if args.tiny else ("--layers", str(args.layers))
    call = ("matrix", "--work", "matrix", "--shapes", shape, *cut, *runs, "--no-quality")
    report = ("--vram", args.matrix_vram, "--report", f"reports/matrix/{shape}")
    return Step(f"matrix-{shape}", 75, (*call, *report))


def run(step: Step, work: Path, seconds: float) -> dict[str, object]:
    """Runs it; its output goes to logs/, without the work folder's name."""
    log = work / "reports" / "logs" / f"{step.name}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    env = os.environ | {
        "GREENROOM_HOME": str(work / "home"),
        "PYTHONPATH": os.pathsep.join(filter(None, (str(SOURCES), os.getenv("PYTHONPATH")))),
    }
    command = [sys.executable, "-m", "greenroom", *step.arguments]
    begin = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=work, env=env, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            status: int | str = process.wait(max(1.0, min(seconds, step.seconds)))
        except subprocess.TimeoutExpired:
            status = "out of time"
        finally:
            end(process)
    text = log.read_text(errors="replace")
    log.write_text(text.replace(str(work), ".").replace(str(SOURCES), "src"))
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


def join(folder: Path) -> None:
    """One table of the shapes that were measured, in place of a folder for each."""
    from greenroom.bench import matrix as table

    parts = [json.loads(path.read_text()) for path in sorted(folder.glob("*/matrix.json"))]
    if not parts:
        return
    order = {name: position for position, name in enumerate(SHAPES)}
    models = [model for part in parts for model in part["models"]]
    models.sort(key=lambda model: order.get(model["shape"].removesuffix("-tiny"), len(order)))
    whole = parts[0] | {"models": models, "command": " ; ".join(p["command"] for p in parts)}
    (folder / "matrix.json").write_text(json.dumps(whole, indent=1) + "\n")
    (folder / "matrix.md").write_text(table.markdown(whole))
    for part in folder.glob("*/"):
        shutil.rmtree(part)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="room for 20 GB")
    parser.add_argument("--seconds", type=float, default=560, help="for everything")
    parser.add_argument("--model", default="gpt-oss-20b")
    parser.add_argument("--vram", nargs="+", default=["2GiB", "7GiB"])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES))
    parser.add_argument("--layers", type=int, default=6, help="of the matrix's shapes")
    parser.add_argument("--matrix-vram", default="1536MiB", help="the matrix's budget")
    parser.add_argument("--only", nargs="+", help="names of steps, or how they begin")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    work, ends = args.work.resolve(), time.monotonic() + args.seconds
    work.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)
    done = []
    for step in steps(args):
        left = ends - time.monotonic()
        wanted = args.only is None or step.name.startswith(tuple(args.only))
        if wanted and left > 5:
            done.append(run(step, work, left))
            pack(done, work, args.out)
    for path in work.glob("*.gguf"):
        path.unlink()


def pack(done: list[dict[str, object]], work: Path, out: Path) -> None:
    """What there is until now, so that a run cut short still leaves its reports."""
    plan = work / "reports" / "logs" / "plan-json.txt"
    if plan.exists():
        plan.replace(work / "reports" / "plan.json")
    if (work / "reports" / "matrix").exists():
        copy = work / "joined"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(work / "reports" / "matrix", copy)
        join(copy)
    (out / "steps.json").write_text(json.dumps(done, indent=1) + "\n")
    with tarfile.open(out / "reports.tar.gz", "w:gz") as archive:
        for path in sorted((work / "reports").iterdir()):
            whole = work / "joined" if path.name == "matrix" else path
            archive.add(whole, f"reports/{path.name}")


if __name__ == "__main__":
    sys.path.insert(0, str(SOURCES))
    main()

"""Measure whole models on this machine's CPU, beside llama.cpp, on synthetic files.

    python tools/measure_cpu.py gpt-oss-20b qwen3-30b-a3b:6 --work DIR [--threads N]

`SHAPE:LAYERS` cuts a shape to fewer layers. For each: writes the file if it is not there, times
loading it from the page cache, then both engines in turn (`greenroom.bench.peer`). One line a
shape; the last line is one JSON document. Needs `xllamacpp`, unless `--alone` leaves it out.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path

from greenroom import native
from greenroom.bench import peer

LOAD = """
import sys, time
from greenroom import LLM
begin = time.perf_counter()
llm = LLM(sys.argv[1], threads=int(sys.argv[2]), context_length=2048, mmap=sys.argv[3] == "mmap")
print(time.perf_counter() - begin)
llm.close()
"""


def model_file(shape: str, work: Path) -> Path:
    name, _, layers = shape.partition(":")
    path = work / f"{shape.replace(':', '-')}.gguf"
    if not path.exists():
        cut = ["--layers", layers] if layers else []
        command = [sys.executable, "-m", "greenroom", "synth", name, str(path), *cut]
        subprocess.run(command, check=True)
    return path


def load_seconds(path: Path, threads: int, way: str) -> float:
    command = [sys.executable, "-c", LOAD, str(path), str(threads), way]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def measure(shape: str, args: argparse.Namespace) -> dict[str, object]:
    path = model_file(shape, args.work)
    loads = [load_seconds(path, args.threads, "copy") for _ in range(args.loads)]
    mapped = load_seconds(path, args.threads, "mmap")
    workload = peer.Workload(args.prompt, args.generate, args.rounds)
    engines = ["greenroom"] if args.alone else list(peer.OPENERS)
    rates = peer.compare(path, args.threads, workload, engines)
    result = {
        "shape": shape,
        "bytes": path.stat().st_size,
        "threads": args.threads,
        "load_seconds": min(loads),
        "load_mmap_seconds": mapped,
        "workload": dataclasses.asdict(workload),
        "rates": {engine: dataclasses.asdict(r) for engine, r in rates.items()},
    }
    said = [f"{shape}: load {min(loads):.2f} s (mmap {mapped:.2f} s), tokens/s"]
    said += [f"{e}: prompt {r.prompt:.1f}, generation {r.generation:.1f}" for e, r in rates.items()]
    if not args.alone:
        ours, theirs = rates["greenroom"], rates["llama.cpp"]
        ratios = ours.prompt / theirs.prompt, ours.generation / theirs.generation
        said.append("prompt {:.2f}x, generation {:.2f}x".format(*ratios))
    print("; ".join(said), flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("shapes", nargs="+")
    parser.add_argument("--work", type=Path, required=True, help="where the files are kept")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--generate", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--loads", type=int, default=2)
    parser.add_argument("--alone", action="store_true", help="without llama.cpp")
    args = parser.parse_args()
    args.threads = args.threads or int(native.lib().default_threads()["threads"])
    args.work.mkdir(parents=True, exist_ok=True)
    begin = time.time()
    results = [measure(shape, args) for shape in args.shapes]
    print(json.dumps({"tier": native.lib().tier, "started": begin, "results": results}))


if __name__ == "__main__":
    main()

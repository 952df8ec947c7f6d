"""Measure a synthetic model with its dense part on this machine's GPU and its experts in RAM.

    python tools/gpu_check.py FILE.gguf [--vram 1.7GiB] [--prompts 512 2048] [--backend cuda native]

For each backend: load time, prefill and decode rates of one sequence (medians of `--rounds`),
peak VRAM as PyTorch reserved it. One line a figure; the last line is one JSON document.
"""

import argparse
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from greenroom import LLM, SamplingParams


def once(llm: LLM, length: int, generate: int, seed: int) -> tuple[float, float]:
    """(prefill, decode) tokens per second of one request, from the tokens' time stamps."""
    vocabulary = llm.engine.model_config.vocabulary_size
    tokens = np.random.default_rng(seed).integers(0, vocabulary, length).tolist()
    params = SamplingParams(max_tokens=generate, temperature=0, ignore_eos=True)
    begin = time.perf_counter()
    times = [output.time for output in llm.stream(tokens, params)]
    return length / (times[0] - begin), (len(times) - 1) / (times[-1] - times[0])


def measure(path: Path, backend: str, args: argparse.Namespace) -> dict[str, Any]:
    settings = {"backend": backend, "context_length": args.context, "max_sequences": 1}
    if backend == "cuda":
        torch.cuda.reset_peak_memory_stats()
        settings["vram"] = args.vram
    begin = time.perf_counter()
    with LLM(path, prefill_chunk=args.chunk, **settings) as llm:
        result: dict[str, Any] = {"load_seconds": time.perf_counter() - begin}
        for length in args.prompts:
            once(llm, length, 4, 99)  # compiles what this length needs
            runs = [once(llm, length, args.generate, seed) for seed in range(args.rounds)]
            result[f"prefill_{length}"] = median(run[0] for run in runs)
            result[f"decode_after_{length}"] = median(run[1] for run in runs)
        result["threads"] = llm.engine.config.threads
        result["memory"] = llm.engine.stats()["memory"]
    if backend == "cuda":
        result["peak_vram_mib"] = torch.cuda.max_memory_reserved() / 2**20
    for name, value in result.items():
        print(f"{backend:8} {name:20} {value}", flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--backend", nargs="+", default=["cuda", "native"])
    parser.add_argument("--vram", default="max")
    parser.add_argument("--prompts", nargs="+", type=int, default=[512, 2048])
    parser.add_argument("--generate", type=int, default=64)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--chunk", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    results = {backend: measure(args.model, backend, args) for backend in args.backend}
    print(json.dumps({"model": args.model.name, **results}))


if __name__ == "__main__":
    main()

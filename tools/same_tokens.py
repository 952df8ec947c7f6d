"""Compare next tokens on real text: the native kernels, the float32 path and llama.cpp.

    python tools/same_tokens.py FILE.gguf [...] --texts DIR [--positions 2000]

Texts are `*.eval.txt.xz`; equally many positions from each. For every file and pair: how often the
likeliest next token is the same, and the mean KL divergence (over all tokens between the two paths
here; over llama.cpp's 40 likeliest and the rest taken together where it takes part). Needs
`xllamacpp`, which runs in a process of its own.
"""

import argparse
import json
import lzma
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from greenroom import LLM
from greenroom.tokenizer import Tokenizer

Logits = npt.NDArray[np.float64]
TOP = 40


def samples(model: Path, texts: Path, positions: int) -> list[list[int]]:
    """Token ids of equally long pieces from the middle of each text."""
    tokenizer = Tokenizer.from_gguf(model)
    paths = sorted(texts.glob("*.eval.txt.xz"))
    found = []
    for path in paths:
        with lzma.open(path) as file:
            text = file.read(60_000)[-20_000:].decode(errors="ignore")
        found.append(tokenizer.encode(text)[: positions // len(paths)])
    return found


def ours(path: Path, pieces: list[list[int]], backend: str) -> Logits:
    """Logarithms of probability, (positions, vocabulary)."""
    with LLM(path, backend=backend, max_sequences=1, context_length=2048) as llm:
        logits = np.concatenate([llm.logits(piece) for piece in pieces]).astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def serve_peer() -> None:
    """Reads {"model", "pieces"} from stdin; prints [ids, logarithms] of each position."""
    import xllamacpp

    job = json.load(sys.stdin)
    params = xllamacpp.CommonParams()
    params.model.path = job["model"]
    params.n_ctx, params.n_parallel, params.n_gpu_layers = 2048, 1, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.warmup = params.fit_params = False
    server = xllamacpp.Server(params)
    found = []
    for piece in job["pieces"]:
        for end in range(1, len(piece) + 1):
            asked = {"prompt": piece[:end], "n_predict": 1, "n_probs": TOP, "temperature": 0}
            answer = server.handle_completions({**asked, "cache_prompt": True})
            top = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
            found.append([[entry["id"] for entry in top], [entry["logprob"] for entry in top]])
    print("\n" + json.dumps(found), flush=True)


def theirs(path: Path, pieces: list[list[int]]) -> list[Any]:
    done = subprocess.run(
        [sys.executable, __file__, "--peer"],
        input=json.dumps({"model": str(path), "pieces": pieces}),
        capture_output=True,
        text=True,
        check=True,
    )
    answer: list[Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def coarse_divergence(p: Logits, q: Logits) -> float:
    """KL from some tokens' logarithms, all others taken together as one more."""
    rest_p, rest_q = (max(1 - np.exp(x).sum(), 1e-12) for x in (p, q))
    return float((np.exp(p) * (p - q)).sum() + rest_p * np.log(rest_p / rest_q))


def report(name: str, same: npt.NDArray[np.bool_], divergence: float) -> None:
    print(f"  {name}: same token {same.mean():.2%} of {len(same)}, mean KL {divergence:.1e}")


def compare(path: Path, texts: Path, positions: int) -> None:
    pieces = samples(path, texts, positions)
    print(path.name, flush=True)
    native, exact = (ours(path, pieces, backend) for backend in ("native", "reference"))
    divergence = float((np.exp(exact) * (exact - native)).sum(axis=1).mean())
    report("native / float32", native.argmax(1) == exact.argmax(1), divergence)
    peer = theirs(path, pieces)
    for name, rows in (("native", native), ("float32", exact)):
        same = np.array([row.argmax() == ids[0] for row, (ids, _) in zip(rows, peer, strict=True)])
        pairs = zip(rows, peer, strict=True)
        divergences = [coarse_divergence(np.array(p), row[ids]) for row, (ids, p) in pairs]
        divergence = float(np.mean(divergences))
        report(f"llama.cpp / {name}", same, divergence)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--positions", type=int, default=2000)
    args = parser.parse_args()
    for path in args.files:
        compare(path, args.texts, args.positions)


if __name__ == "__main__":
    serve_peer() if sys.argv[1:] == ["--peer"] else main()

"""Distil the dense demo model into a mixture of experts and write what it takes to build it.

    python tools/distil_demo/train.py --dense DENSE.gguf --tokens tokens.npz --out DIR

Runs on whatever torch finds (one GPU in practice; `--small` checks the path on a CPU). Text the
dense model writes itself, partition, ridge-regression routers, then KL distillation for
`--train-seconds`; the learning rate follows the clock. With `--state FILE` the training may be
spread over several calls. Writes deltas.npz (also while training) and log.jsonl to --out.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dense import LINEAR, Dense, cross_entropy
from export import apply, pack, save
from generate import Writer, beginnings
from partition import Layout, partition
from student import Student, fit_routers
from torch import Tensor
from trainer import Trainer, clock, to_device, windows

SOURCES = ("austen", "factbook", "pgdoc", "sotu")


class Log:
    def __init__(self, path: Path) -> None:
        self.file = path.open("w", encoding="utf-8")

    def __call__(self, event: str, **values: Any) -> None:
        line = json.dumps({"t": round(clock(), 1), "event": event, **values})
        print(line, flush=True)
        self.file.write(line + "\n")
        self.file.flush()


@torch.no_grad()
def prepare_student(dense: Dense, texts: list[np.ndarray], args: argparse.Namespace) -> Any:
    """Partition from activations on real text, permuted weights, routers by regression."""
    layout = Layout(*args.layout)
    rng = np.random.default_rng(args.seed)
    rows = np.concatenate([windows(t, args.fit_rows, args.length, rng) for t in texts])
    inputs: list[Tensor] = [torch.empty(0)] * dense.shape.layers
    energies = list(inputs)

    def probe(layer: int, x: Tensor, h: Tensor) -> None:
        length = dense.weight(layer, "ffn_down").float().norm(dim=0)
        inputs[layer] = x.flatten(0, 1)
        energies[layer] = (h.flatten(0, 1).float() * length).square()

    dense.forward(to_device(dense, rows), probe=probe)
    order = [
        partition(e, x.float(), layout, args.partition_stride, seed=args.seed)
        for e, x in zip(energies, inputs, strict=True)
    ]
    dense.permute_neurons(order)
    for i, indices in enumerate(order):
        energies[i] = energies[i][:, torch.from_numpy(indices).to(dense.device)]
    student = new_student(dense, args)
    fit_routers(student, inputs, energies)
    return student, order


def new_student(dense: Dense, args: argparse.Namespace) -> Student:
    ranks = {n: args.ffn_rank if n.startswith("ffn") else args.attn_rank for n in LINEAR}
    return Student(dense, Layout(*args.layout), ranks).to(dense.device)


def write_texts(
    dense: Dense, texts: list[np.ndarray], prompts: np.ndarray, args: argparse.Namespace
) -> np.ndarray:
    """Rounds of the dense model's own text until args.write_seconds are over, (tokens,)."""
    writer, begin, out = Writer(dense, args.write_batch, args.write_length), clock(), []
    while not out or clock() - begin < args.write_seconds:
        starts = beginnings(prompts, texts, args.write_batch, args.seed + len(out))
        starts = starts[:, : args.write_length]
        out.append(writer.write(to_device(dense, starts)).cpu().numpy().astype(np.uint16))
    return np.concatenate(out).reshape(-1)


@torch.no_grad()
def evaluate(
    run: Any, embedding: Tensor, texts: dict[str, np.ndarray], length: int, batch: int
) -> dict[str, float]:
    """Perplexity per source and over all tokens; windows of `length`, the first token free.

    run(tokens (batch, length) int64) -> hidden (batch, length, d).
    """
    result, total, count = {}, 0.0, 0
    for name, text in texts.items():
        rows = text[: len(text) // length * length].reshape(-1, length).astype(np.int64)
        loss = 0.0
        for at in range(0, len(rows), batch):
            tokens = torch.from_numpy(rows[at : at + batch]).to(embedding.device)
            hidden = run(tokens)[:, :-1].flatten(0, 1)
            loss += cross_entropy(hidden, tokens[:, 1:].flatten(), embedding)
        tokens_here = len(rows) * (length - 1)
        result[name] = round(math.exp(loss / tokens_here), 4)
        total, count = total + loss, count + tokens_here
    result["all"] = round(math.exp(total / count), 4)
    return result


def student_run(student: Student, fraction: float) -> Any:
    k = student.layout.active(fraction)
    return lambda tokens: student(tokens, torch.full((len(tokens),), k, device=tokens.device))


def train(trainer: Trainer, log: Log, checkpoint: Any, measure: Any) -> None:
    """Steps until the clock says stop; logs, measures and keeps the best on the way."""
    args = trainer.args
    measured = clock()
    sums: dict[str, Tensor] = {}
    while clock() < args.stop and trainer.progress < 1 and trainer.steps < args.max_steps:
        try:
            losses = trainer.step()
        except torch.OutOfMemoryError:
            trainer.optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            args.rows //= 2
            log("out of memory", rows=args.rows)
            continue
        except Exception as error:
            if not trainer.uncompile():
                raise
            log("not compiled", error=str(error)[-300:])
            continue
        for name, value in losses.items():
            sums[name] = sums.get(name, 0.0) + value  # type: ignore[operator]
        if trainer.steps % args.log_every == 0:
            means = {n: round(float(v) / args.log_every, 5) for n, v in sums.items()}
            if not all(map(math.isfinite, means.values())):
                raise SystemExit(f"training diverged at step {trainer.steps}: {means}")
            log("step", step=trainer.steps, progress=round(trainer.progress, 3), **means)
            sums = {}
        if clock() - measured > args.measure_every:
            perplexity = measure()
            log("measure", step=trainer.steps, perplexity=perplexity)
            checkpoint(perplexity["all"])
            measured = clock()


def finish(args: argparse.Namespace, tokens: dict[str, np.ndarray], log: Log) -> None:
    """Perplexities of the dense model and of the saved file in float32, every fraction."""
    device = torch.device(args.device)
    with np.load(args.out / "deltas.npz") as packed:
        arrays = dict(packed)
    dense = Dense(args.dense, device, torch.float32)
    texts = {s: tokens[s + ".eval"][: args.eval_tokens] for s in SOURCES}
    show = lambda run: evaluate(run, dense.embedding, texts, args.length, args.rows)  # noqa: E731
    results = {"dense": show(dense.forward)}
    log("final", model="dense", perplexity=results["dense"])
    student = apply(dense, arrays)
    for fraction in (0.75, 0.5, 0.625, 0.875, 1.0):
        results[str(fraction)] = show(student_run(student, fraction))
        ratio = round(results[str(fraction)]["all"] / results["dense"]["all"], 4)
        log("final", active=fraction, ratio=ratio, perplexity=results[str(fraction)])
    (args.out / "results.json").write_text(json.dumps(results, indent=1))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name in ("--dense", "--tokens", "--out"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--train-seconds", type=float, default=420, help="of all calls together")
    parser.add_argument("--stop", type=float, default=510, help="this call trains until then")
    parser.add_argument("--last", action="store_true", help="training ends with this call")
    parser.add_argument("--write-seconds", type=float, default=30)
    parser.add_argument("--state", type=Path, help="to go on in a second call with this file")
    parser.add_argument("--layout", type=int, nargs=3, default=(12, 36, 32))
    parser.add_argument("--attn-rank", type=int, default=16)
    parser.add_argument("--ffn-rank", type=int, default=48)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-steps", type=int, default=1_000_000)
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--small", action="store_true", help="tiny sizes: does it run at all?")
    args = parser.parse_args()
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    args.fit_rows, args.partition_stride, args.eval_tokens = 8, 4, 1 << 30
    args.write_batch, args.write_length = 2048, 512
    args.written_share, args.log_every = 0.4, 50
    args.measure_every, args.measure_tokens = 120.0, 32 * args.length
    args.compile = args.device == "cuda" and not args.eager
    if args.small:
        args.rows, args.length, args.fit_rows, args.partition_stride = 4, 128, 4, 1
        args.write_batch, args.write_length, args.write_seconds = 4, 48, 0.0
        args.log_every, args.eval_tokens, args.measure_tokens = 5, 1024, 512
    return args


def distil(args: argparse.Namespace, tokens: dict[str, np.ndarray], log: Log) -> float:
    """Everything between loading and the final measurement; leaves deltas.npz.

    Returns how far the training got, 1 at its end.
    """
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    dense = Dense(args.dense, torch.device(args.device), dtype)
    # The best moment is chosen on the ends of the training texts, never on what is reported.
    held_out = {s: tokens[s + ".train"][-args.measure_tokens :] for s in SOURCES}
    texts = [tokens[s + ".train"][: -args.measure_tokens] for s in SOURCES]
    log("loaded", device=args.device)
    trainer, order = start(dense, texts, tokens["prompts"], args, log)
    student, best = trainer.student, math.inf

    def measure(run: Any = None) -> dict[str, float]:
        run = run or student_run(student, 0.75)
        return evaluate(run, dense.embedding, held_out, args.length, args.rows)

    def checkpoint(perplexity: float) -> None:
        nonlocal best
        if args.state:
            trainer.save(args.state, order)
        if perplexity >= best:
            return
        best = perplexity
        notes = {"seed": args.seed, "license": "Apache-2.0", "base": "SmolLM2-135M-Instruct"}
        save(args.out / "deltas.npz", pack(student, order, notes))

    log("measure", step="dense", perplexity=measure(dense.forward))
    log("measure", step=trainer.steps, perplexity=measure())
    train(trainer, log, checkpoint, measure)
    last = measure()
    checkpoint(last["all"])
    size = (args.out / "deltas.npz").stat().st_size
    log("trained", steps=trainer.steps, bytes=size, perplexity=last)
    if args.device == "cuda":
        log("memory", peak_gib=round(torch.cuda.max_memory_allocated() / 2**30, 1))
    return trainer.progress if trainer.steps < args.max_steps else 1.0


def start(
    dense: Dense,
    texts: list[np.ndarray],
    prompts: np.ndarray,
    args: argparse.Namespace,
    log: Log,
) -> tuple[Trainer, list[np.ndarray]]:
    """A trainer at its beginning, or where the call before stopped; and the neurons' order."""
    if args.state and args.state.exists():
        state = torch.load(args.state, map_location=dense.device)
        order = list(state["order"].cpu().numpy())
        dense.permute_neurons(order)
        student = new_student(dense, args)
        written = state["written"].cpu().numpy().astype(np.uint16)
        trainer = Trainer(student, texts, written, args)
        trainer.load(state)
        log("resumed", step=trainer.steps, progress=round(trainer.progress, 3))
        return trainer, order
    # Written first: the neurons' new order changes nothing but the rounding of sums.
    written = write_texts(dense, texts, prompts, args)
    log("written", tokens=len(written))
    if args.device == "cuda":
        torch.cuda.empty_cache()
    student, order = prepare_student(dense, texts, args)
    log("partitioned")
    return Trainer(student, texts, written, args), order


def main() -> None:
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    log = Log(args.out / "log.jsonl")
    with np.load(args.tokens) as packed:
        tokens = dict(packed)
    if distil(args, tokens, log) >= 1 or args.last:
        finish(args, tokens, log)


if __name__ == "__main__":
    main()

"""Distil the dense demo model into a mixture of experts and write what it takes to build it.

    python tools/distil_demo/train.py --dense DENSE.gguf --tokens tokens.npz --out DIR

Runs on whatever torch finds (one GPU in practice; `--small` checks the path on a CPU). Partition,
ridge-regression routers, text the dense model writes itself, then KL distillation until
`--seconds` have passed since the start; the learning rate follows the clock. Writes deltas.npz
(also while training) and log.jsonl to --out.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dense import LINEAR, Dense, cross_entropy
from export import apply, pack, save
from generate import Writer, beginnings
from partition import Layout, partition
from student import KLDivergence, Student, Trace, fit_routers, stream_loss
from torch import Tensor

START = time.monotonic()
SOURCES = ("austen", "factbook", "pgdoc", "sotu")
FRACTIONS = (0.5, 0.625, 0.75, 0.875)
FRACTION_WEIGHTS = (0.1, 0.15, 0.6, 0.15)


def clock() -> float:
    return time.monotonic() - START


class Log:
    def __init__(self, path: Path) -> None:
        self.file = path.open("w")

    def __call__(self, event: str, **values: Any) -> None:
        line = json.dumps({"t": round(clock(), 1), "event": event, **values})
        print(line, flush=True)
        self.file.write(line + "\n")
        self.file.flush()


def windows(text: np.ndarray, count: int, length: int, rng: np.random.Generator) -> np.ndarray:
    starts = rng.integers(0, len(text) - length, count)
    return np.stack([text[s : s + length] for s in starts]).astype(np.int64)


def to_device(dense: Dense, rows: np.ndarray) -> Tensor:
    return torch.from_numpy(rows).to(dense.device)


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
    order = [partition(e[:: args.partition_stride], layout, seed=args.seed) for e in energies]
    dense.permute_neurons(order)
    for i, indices in enumerate(order):
        energies[i] = energies[i][:, torch.from_numpy(indices).to(dense.device)]
    ranks = {n: args.ffn_rank if n.startswith("ffn") else args.attn_rank for n in LINEAR}
    student = Student(dense, layout, ranks).to(dense.device)
    fit_routers(student, inputs, energies)
    return student, order


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


# Learning rates relative to --lr. One Adam step moves every number by about its rate; along the
# gradient the norms overshoot first, because a few of their channels drive very large activations.
RATES = {"router": 0.3, "norm": 0.25}


def optimizer_of(student: Student, args: argparse.Namespace) -> torch.optim.Optimizer:
    groups = []
    for name, parameter in student.named_parameters():
        rate = args.lr * next((r for part, r in RATES.items() if part in name), 1.0)
        groups.append({"params": [parameter], "lr": rate, "peak": rate})
    fused = student.dense.device.type == "cuda"
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0, fused=fused)


class Trainer:
    """One step at a time; `progress` runs from 0 to 1 with the clock."""

    def __init__(
        self, student: Student, texts: list[np.ndarray], written: np.ndarray, args: Any
    ) -> None:
        self.student, self.texts, self.written, self.args = student, texts, written, args
        self.optimizer = optimizer_of(student, args)
        self.rng = np.random.default_rng(args.seed + 1)
        self.begin, self.steps = clock(), 0

    @property
    def progress(self) -> float:
        return min(1.0, (clock() - self.begin) / (self.args.train_until - self.begin))

    def batch(self) -> tuple[Tensor, Tensor]:
        """tokens (rows, length) and the number of active routed experts of each row."""
        rows = []
        for _ in range(self.args.rows):
            own = self.rng.random() < self.args.written_share
            text = self.written if own else self.texts[self.rng.integers(len(self.texts))]
            rows.append(windows(text, 1, self.args.length, self.rng)[0])
        active = [self.student.layout.active(f) for f in FRACTIONS]
        k = self.rng.choice(active, self.args.rows, p=FRACTION_WEIGHTS)
        dense = self.student.dense
        return to_device(dense, np.stack(rows)), to_device(dense, k.astype(np.int64))

    def step(self) -> dict[str, Tensor]:
        progress = self.progress
        rate = min(1.0, (self.steps + 1) / 60) * (0.02 + 0.49 * (1 + math.cos(math.pi * progress)))
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * rate
        tokens, k = self.batch()
        dense, kept, trace = self.student.dense, [], Trace()
        target = dense.forward(tokens, keep=kept)
        hidden = self.student(tokens, k, trace)
        flat = lambda x: x.flatten(0, 1)  # noqa: E731
        kl = KLDivergence.apply(flat(hidden), flat(target), dense.embedding, 4096)
        streams = stream_loss(trace.streams, kept)
        selection = torch.stack(trace.selection).mean()
        loss = kl + 0.3 * (1 - progress) * streams + 0.2 * (1 - progress) ** 2 * selection
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        self.optimizer.step()
        self.steps += 1
        return {"kl": kl.detach(), "stream": streams.detach(), "selection": selection.detach()}


def train(trainer: Trainer, log: Log, checkpoint: Any, measure: Any) -> None:
    """Steps until the clock says stop; logs, measures and keeps the best on the way."""
    args = trainer.args
    measured = clock()
    sums: dict[str, Tensor] = {}
    while clock() < args.train_until and trainer.steps < args.max_steps:
        try:
            losses = trainer.step()
        except torch.OutOfMemoryError:
            trainer.optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            args.rows //= 2
            log("out of memory", rows=args.rows)
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
            measured = clock()
            checkpoint(perplexity["all"])


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
    parser.add_argument("--seconds", type=float, default=510, help="stop after this long")
    parser.add_argument("--finish-seconds", type=float, default=60, help="kept for the end")
    parser.add_argument("--layout", type=int, nargs=3, default=(6, 18, 64))
    parser.add_argument("--attn-rank", type=int, default=8)
    parser.add_argument("--ffn-rank", type=int, default=16)
    parser.add_argument("--lr", type=float, default=6e-4)
    parser.add_argument("--rows", type=int, default=24)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-steps", type=int, default=1_000_000)
    parser.add_argument("--small", action="store_true", help="tiny sizes: does it run at all?")
    args = parser.parse_args()
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    args.fit_rows, args.partition_stride, args.eval_tokens = 8, 4, 1 << 30
    args.write_batch, args.write_length, args.write_seconds = 1024, 512, 25.0
    args.written_share, args.log_every = 0.4, 50
    args.measure_every, args.measure_tokens = 30.0, 32 * args.length
    args.train_until = args.seconds - args.finish_seconds
    if args.small:
        args.rows, args.length, args.fit_rows, args.partition_stride = 4, 128, 4, 1
        args.write_batch, args.write_length, args.write_seconds = 4, 48, 0.0
        args.log_every, args.eval_tokens, args.measure_tokens = 5, 1024, 512
    return args


def distil(args: argparse.Namespace, tokens: dict[str, np.ndarray], log: Log) -> None:
    """Everything between loading and the final measurement; leaves deltas.npz."""
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    dense = Dense(args.dense, torch.device(args.device), dtype)
    # The best moment is chosen on the ends of the training texts, never on what is reported.
    held_out = {s: tokens[s + ".train"][-args.measure_tokens :] for s in SOURCES}
    texts = [tokens[s + ".train"][: -args.measure_tokens] for s in SOURCES]
    log("loaded", device=args.device)
    student, order = prepare_student(dense, texts, args)
    log("partitioned")

    def measure(run: Any = None) -> dict[str, float]:
        run = run or student_run(student, 0.75)
        return evaluate(run, dense.embedding, held_out, args.length, args.rows)

    best = math.inf

    def checkpoint(perplexity: float) -> None:
        nonlocal best
        if perplexity >= best:
            return
        best = perplexity
        notes = {"seed": args.seed, "license": "Apache-2.0", "base": "SmolLM2-135M-Instruct"}
        save(args.out / "deltas.npz", pack(student, order, notes))

    log("measure", step="dense", perplexity=measure(dense.forward))
    log("measure", step=0, perplexity=measure())
    written = write_texts(dense, texts, tokens["prompts"], args)
    log("written", tokens=len(written))
    np.savez_compressed(args.out / "written.npz", written=written[: 1 << 20])
    trainer = Trainer(student, texts, written, args)
    train(trainer, log, checkpoint, measure)
    last = measure()
    checkpoint(last["all"])
    size = (args.out / "deltas.npz").stat().st_size
    log("trained", steps=trainer.steps, bytes=size, perplexity=last)
    if args.device == "cuda":
        log("memory", peak_gib=round(torch.cuda.max_memory_allocated() / 2**30, 1))


def main() -> None:
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    torch.backends.cuda.matmul.allow_tf32 = True
    log = Log(args.out / "log.jsonl")
    with np.load(args.tokens) as packed:
        tokens = dict(packed)
    distil(args, tokens, log)
    finish(args, tokens, log)


if __name__ == "__main__":
    main()

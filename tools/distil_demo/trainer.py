"""One step of the distillation after the other: rows, learning rate, losses, and what it takes
to go on in another process.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dense import Dense, dense_layer
from student import KLDivergence, Student, Trace, kl_piece, student_layer
from torch import Tensor

START = time.monotonic()
FRACTIONS = (0.5, 0.625, 0.75, 0.875)
# Shares of the rows, at the start and at the end of training; 75 % is what is used by default.
FRACTION_WEIGHTS = ((0.1, 0.15, 0.6, 0.15), (0.03, 0.04, 0.88, 0.05))


def clock() -> float:
    return time.monotonic() - START


def windows(text: np.ndarray, count: int, length: int, rng: np.random.Generator) -> np.ndarray:
    starts = rng.integers(0, len(text) - length, count)
    return np.stack([text[s : s + length] for s in starts]).astype(np.int64)


def to_device(dense: Dense, rows: np.ndarray) -> Tensor:
    return torch.from_numpy(rows).to(dense.device)


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
    """One step at a time; `progress` runs from 0 to 1 with the time spent on training."""

    def __init__(
        self, student: Student, texts: list[np.ndarray], written: np.ndarray, args: Any
    ) -> None:
        self.student, self.texts, self.written, self.args = student, texts, written, args
        sizes = np.array([len(t) for t in texts], np.float64)
        self.shares = sizes / sizes.sum()
        self.optimizer = optimizer_of(student, args)
        self.rng = np.random.default_rng(args.seed + 1)
        self.begin, self.before, self.steps, self.started = clock(), 0.0, 0, False
        functions = (dense_layer, student_layer, kl_piece)
        self.plain = not args.compile
        if args.compile:  # shapes are always the same in training
            functions = tuple(torch.compile(f, dynamic=False) for f in functions)
        self.dense_layer, self.student_layer, self.kl_piece = functions

    def uncompile(self) -> bool:
        """Without torch.compile from now on; False if that is so already."""
        was, self.plain = self.plain, True
        self.dense_layer, self.student_layer, self.kl_piece = dense_layer, student_layer, kl_piece
        return not was

    @property
    def seconds(self) -> float:
        """Spent on training, in this call and in those before."""
        return self.before + clock() - self.begin

    @property
    def progress(self) -> float:
        return min(1.0, self.seconds / self.args.train_seconds)

    def batch(self) -> tuple[Tensor, Tensor]:
        """tokens (rows, length) and the number of active routed experts of each row."""
        rows = []
        for _ in range(self.args.rows):
            own = self.rng.random() < self.args.written_share
            text = self.texts[self.rng.choice(len(self.texts), p=self.shares)]
            text = self.written if own else text
            rows.append(windows(text, 1, self.args.length, self.rng)[0])
        active = [self.student.layout.active(f) for f in FRACTIONS]
        first, last = (np.array(w) for w in FRACTION_WEIGHTS)
        weights = first + self.progress * (last - first)
        k = self.rng.choice(active, self.args.rows, p=weights / weights.sum())
        dense = self.student.dense
        return to_device(dense, np.stack(rows)), to_device(dense, k.astype(np.int64))

    def step(self) -> dict[str, Tensor]:
        progress = self.progress
        rate = min(1.0, (self.steps + 1) / 60) * (0.01 + 0.495 * (1 + math.cos(math.pi * progress)))
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * rate
        tokens, k = self.batch()
        dense, trace = self.student.dense, Trace([])
        target = dense.forward(tokens, keep=trace.targets, run=self.dense_layer)
        hidden = self.student(tokens, k, trace, run=self.student_layer)
        flat = lambda x: x.flatten(0, 1)  # noqa: E731
        kl = KLDivergence.apply(flat(hidden), flat(target), dense.embedding, 4096, self.kl_piece)
        streams, selection = torch.stack(trace.streams).mean(), torch.stack(trace.selection).mean()
        loss = kl + 0.3 * (1 - progress) * streams + 0.2 * (1 - progress) ** 2 * selection
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        self.optimizer.step()
        self.steps += 1
        if not self.started:
            self.start_clock()
        return {"kl": kl.detach(), "stream": streams.detach(), "selection": selection.detach()}

    def start_clock(self) -> None:
        """After the first step here: compiling is over and does not count as training."""
        self.student.output_norm.detach().sum().item()  # the step has been done
        self.started, self.begin = True, clock()
        if self.args.last:
            self.args.train_seconds = self.before + self.args.stop - self.begin

    def save(self, path: Path, order: list[np.ndarray]) -> None:
        """All it takes to go on in another process."""
        state = {
            "student": self.student.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "order": torch.from_numpy(np.stack(order)),
            "written": torch.from_numpy(self.written.astype(np.int32)),
            "seconds": self.seconds,
            "steps": self.steps,
        }
        torch.save(state, path)

    def load(self, state: dict[str, Any]) -> None:
        self.student.load_state_dict(state["student"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.before, self.steps = state["seconds"], state["steps"]
        self.rng = np.random.default_rng(self.args.seed + 1 + self.steps)
        self.begin = clock()

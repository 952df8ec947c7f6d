"""The mixture-of-experts student: the frozen dense weights plus everything that is learned.

Learned are the routers, a gain per neuron, the norms and a low-rank delta per matrix. The FFN is
computed whole and masked, so the router's gradient also sees experts that were not chosen. The
routing rule is the `deepseek` architecture's: softmax over all routed experts, not renormalised.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from dense import LINEAR, Dense, Shape, attend, rms_norm
from partition import Layout
from torch import Tensor, nn

TEMPERATURE = 0.5  # of the straight-through selection, in units of the router's score


@dataclass
class Trace:
    """What one forward pass hands to the losses, one number per layer."""

    targets: list[Tensor]  # the dense model's stream after each layer, (batch, tokens, d)
    streams: list[Tensor] = field(default_factory=list)  # distance from those targets
    selection: list[Tensor] = field(default_factory=list)  # loss of the choice against the best


class LowRank(nn.Module):
    """W + B A; A (rank, in), B (out, rank) start so that the delta is zero."""

    def __init__(self, out_features: int, in_features: int, rank: int, device: torch.device):
        super().__init__()
        self.a = nn.Parameter(torch.randn(rank, in_features, device=device) * in_features**-0.5)
        self.b = nn.Parameter(torch.zeros(out_features, rank, device=device))


class StudentLayer(nn.Module):
    """What is learned in one layer; `router` (routed, d) and its centre come from the fit."""

    def __init__(self, dense: Dense, layout: Layout, ranks: dict[str, int]) -> None:
        super().__init__()
        shape, device = dense.shape, dense.device
        self.delta = nn.ModuleDict()
        for name in LINEAR:
            out_features, in_features = dense.weight(0, name).shape
            self.delta[name] = LowRank(out_features, in_features, ranks[name], device)
        self.router = nn.Parameter(torch.zeros(layout.routed, shape.hidden, device=device))
        self.sharpness = nn.Parameter(torch.tensor(0.1, device=device))
        self.gain = nn.Parameter(torch.ones(layout.total * layout.width, device=device))
        self.attn_norm = nn.Parameter(torch.ones(shape.hidden, device=device))
        self.ffn_norm = nn.Parameter(torch.ones(shape.hidden, device=device))


class Student(nn.Module):
    """forward(tokens (batch, tokens), k (batch,)) -> final hidden states, trace."""

    def __init__(self, dense: Dense, layout: Layout, ranks: dict[str, int]) -> None:
        super().__init__()
        self.dense, self.layout = dense, layout
        layers = (StudentLayer(dense, layout, ranks) for _ in range(dense.shape.layers))
        self.layers = nn.ModuleList(layers)
        self.output_norm = nn.Parameter(torch.ones(dense.shape.hidden, device=dense.device))
        lengths = [dense.weight(i, "ffn_down").float().norm(dim=0) for i in range(len(self.layers))]
        self.column_energy = [n.square().to(dense.dtype) for n in lengths]

    def forward(
        self, tokens: Tensor, k: Tensor, trace: Trace | None = None, run: Any = None
    ) -> Tensor:
        """run is `student_layer` or a compiled one."""
        dense, eps = self.dense, self.dense.shape.eps
        stream = F.embedding(tokens, dense.embedding).float()
        for index, layer in enumerate(self.layers):
            learned = dict(layer.named_parameters())
            fixed = dense.block(index) | {"energy": self.column_energy[index]}
            target = None if trace is None else trace.targets[index]
            stream, distance, selection = (run or student_layer)(
                stream, fixed, learned, (dense.cos, dense.sin), k, target, self.layout, dense.shape
            )
            if trace is not None:
                trace.streams.append(distance)
                trace.selection.append(selection)
        norm = dense.weights["output_norm.weight"] * self.output_norm
        return rms_norm(stream, norm, eps).to(dense.dtype)


def gates(
    x: Tensor, router: Tensor, sharpness: Tensor, k: Tensor, routed: int
) -> tuple[Tensor, Tensor]:
    """x (batch, tokens, d) -> gate (batch, tokens, routed) and scores minus threshold."""
    score = F.linear(x.float(), router)  # (batch, tokens, routed)
    # The straight-through gradient is biased: it may teach the router, never what lies below.
    choice = F.linear(x.detach().float(), router)
    with torch.no_grad():
        above = (choice[..., None, :] > choice[..., :, None]).sum(-1)  # experts ahead of each
        chosen = above < k[:, None, None]
        last = choice.masked_fill(~chosen, math.inf).amin(-1, keepdim=True)
        next_one = choice.masked_fill(chosen, -math.inf).amax(-1, keepdim=True)
        threshold = (last + torch.maximum(next_one, last - 1)) / 2
    distance = choice - threshold
    soft = torch.sigmoid(distance / TEMPERATURE)
    straight = chosen.float() + soft - soft.detach()
    weight = torch.softmax(score * sharpness, dim=-1) * routed
    return straight * weight, distance


def selection_loss(
    h: Tensor, energy: Tensor, distance: Tensor, k: Tensor, layout: Layout
) -> Tensor:
    """Cross-entropy of "is chosen" against the k experts of highest energy.

    h (batch, tokens, ffn), energy (ffn,) of the columns of `ffn_down`.
    """
    with torch.no_grad():
        experts = (h.square() * energy).unflatten(-1, (layout.total, layout.width)).sum(-1)
        routed = experts[..., layout.shared :].float()
        ahead = (routed[..., None, :] > routed[..., :, None]).sum(-1)
        best = (ahead < k[:, None, None]).float()
    return F.binary_cross_entropy_with_logits(distance / TEMPERATURE, best)


def student_layer(
    stream: Tensor,
    fixed: dict[str, Tensor],
    learned: dict[str, Tensor],
    rope: tuple[Tensor, Tensor],
    k: Tensor,
    target: Tensor | None,
    layout: Layout,
    shape: Shape,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """One layer: the next stream, its distance from target, the loss of the experts' choice.

    The low-rank deltas are added to the matrices first: that moves fewer bytes than adding
    their outputs for every token.
    """
    dtype = fixed["attn_q"].dtype
    w = {}
    for name in LINEAR:
        delta = learned[f"delta.{name}.b"] @ learned[f"delta.{name}.a"]
        w[name] = (fixed[name].float() + delta).to(dtype)
    x = rms_norm(stream, fixed["attn_norm"] * learned["attn_norm"], shape.eps).to(dtype)
    stream = stream + attend(x, w, *rope, shape)
    x = rms_norm(stream, fixed["ffn_norm"] * learned["ffn_norm"], shape.eps).to(dtype)
    gate, distance = gates(x, learned["router"], learned["sharpness"], k, layout.routed)
    h = F.silu(F.linear(x, w["ffn_gate"])) * F.linear(x, w["ffn_up"])
    selection = None
    if target is not None:
        selection = selection_loss(h, fixed["energy"], distance, k, layout)
    every = F.pad(gate, (layout.shared, 0), value=1.0).to(dtype)
    h = h * every.repeat_interleave(layout.width, -1)
    down = (w["ffn_down"] * learned["gain"]).to(dtype)
    stream = stream + F.linear(h, down)
    return stream, None if target is None else distance_of(stream, target), selection


def kl_piece(student: Tensor, teacher: Tensor, embedding: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over tokens of KL(teacher || student) and its gradient for student (tokens, d)."""
    log_p = F.linear(teacher, embedding).float().log_softmax(-1)
    log_q = F.linear(student, embedding).float().log_softmax(-1)
    p = log_p.exp()
    return (p * (log_p - log_q)).sum(), (log_q.exp() - p).to(student.dtype) @ embedding


class KLDivergence(torch.autograd.Function):
    """Mean KL(teacher || student) over tokens, computed in pieces; never all logits at once.

    apply(student (tokens, d), teacher (tokens, d), embedding (vocabulary, d), chunk, run), where
    run is `kl_piece` or a compiled one, -> scalar.
    """

    @staticmethod
    def forward(ctx, student, teacher, embedding, chunk, run):  # type: ignore[no-untyped-def]
        total = torch.zeros((), device=student.device)
        gradient = torch.empty_like(student)
        for at in range(0, student.shape[0], chunk):
            part = slice(at, at + chunk)
            loss, gradient[part] = run(student[part], teacher[part], embedding)
            total += loss
        ctx.save_for_backward(gradient)
        ctx.tokens = student.shape[0]
        return total / student.shape[0]

    @staticmethod
    def backward(ctx, upstream):  # type: ignore[no-untyped-def]
        (gradient,) = ctx.saved_tensors
        return gradient * (upstream / ctx.tokens), None, None, None, None


def distance_of(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean of |s - t|^2 / |t|^2, per token, so that no outlier token rules."""
    t = teacher.float()
    return ((student - t).square().sum(-1) / t.square().sum(-1).clamp(min=1e-6)).mean()


@torch.no_grad()
def fit_routers(student: Student, inputs: list[Tensor], energies: list[Tensor]) -> None:
    """Ridge regression from the FFN's input to each routed expert's log energy.

    inputs per layer (samples, d), energies per layer (samples, neurons in the new order). The
    scores are centred over experts (softmax and top-k do not see a common term) and scaled to a
    standard deviation of one.
    """
    layout = student.layout
    for layer, x, energy in zip(student.layers, inputs, energies, strict=True):
        experts = energy.unflatten(1, (layout.total, layout.width)).sum(2)[:, layout.shared :]
        target = experts.float().clamp(min=1e-12).log()
        target = (target - target.mean(1, keepdim=True)).double()
        x = x.double()
        gram = x.T @ x
        gram += torch.eye(gram.shape[0], device=gram.device) * gram.diagonal().mean() * 0.01
        solution = torch.linalg.solve(gram, x.T @ target).T  # (routed, d); no bias: none in GGUF
        scale = (x @ solution.T).std()
        layer.router.copy_((solution / scale).float())

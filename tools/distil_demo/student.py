"""The mixture-of-experts student: the frozen dense weights plus everything that is learned.

Learned are the routers, a gain per neuron, the norms and a low-rank delta per matrix. The FFN is
computed whole and masked, so the router's gradient also sees experts that were not chosen. The
routing rule is the `deepseek` architecture's: softmax over all routed experts, not renormalised.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from dense import LINEAR, Dense, rms_norm
from partition import Layout
from torch import Tensor, nn

TEMPERATURE = 0.5  # of the straight-through selection, in units of the router's score


@dataclass
class Trace:
    """What one forward pass hands to the losses."""

    streams: list[Tensor] = field(default_factory=list)  # after each layer, (batch, tokens, d)
    selection: list[Tensor] = field(default_factory=list)  # loss of the choice against the best


class LowRank(nn.Module):
    """y = W x + B (A x); A (rank, in), B (out, rank) start so that the delta is zero."""

    def __init__(self, out_features: int, in_features: int, rank: int, device: torch.device):
        super().__init__()
        self.a = nn.Parameter(torch.randn(rank, in_features, device=device) * in_features**-0.5)
        self.b = nn.Parameter(torch.zeros(out_features, rank, device=device))

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        low = F.linear(x, self.a.to(x.dtype))
        return F.linear(x, weight) + F.linear(low, self.b.to(x.dtype))


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
        self.gain = nn.Parameter(torch.ones(layout.total, layout.width, device=device))
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

    def gates(self, layer: StudentLayer, x: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """x (batch, tokens, d) -> gate (batch, tokens, routed) and scores minus threshold."""
        score = F.linear(x.float(), layer.router)  # (batch, tokens, routed)
        # The straight-through gradient is biased: it may teach the router, never what lies below.
        choice = F.linear(x.detach().float(), layer.router)
        ordered = choice.detach().sort(dim=-1, descending=True).values
        index = (k - 1)[:, None, None].expand(*score.shape[:-1], 1)
        distance = choice - ordered.gather(-1, index)
        hard = (distance >= 0).float()
        soft = torch.sigmoid(distance / TEMPERATURE)
        chosen = hard + soft - soft.detach()
        weight = torch.softmax(score * layer.sharpness, dim=-1) * self.layout.routed
        return chosen * weight, distance

    def selection_loss(self, index: int, h: Tensor, distance: Tensor, k: Tensor) -> Tensor:
        """Cross-entropy of "is chosen" against the k experts of highest energy."""
        with torch.no_grad():
            energy = h.square() * self.column_energy[index]
            experts = energy.unflatten(-1, (self.layout.total, self.layout.width)).sum(-1)
            routed = experts[..., self.layout.shared :].float()
            ordered = routed.sort(dim=-1, descending=True).values
            at = (k - 1)[:, None, None].expand(*routed.shape[:-1], 1)
            best = (routed >= ordered.gather(-1, at)).float()
        return F.binary_cross_entropy_with_logits(distance / TEMPERATURE, best)

    def moe(self, index: int, x: Tensor, k: Tensor, trace: Trace | None) -> Tensor:
        """x (batch, tokens, d) normed -> the FFN's output of the same shape."""
        layer = self.layers[index]
        w = lambda name: self.dense.weight(index, name)  # noqa: E731
        gate, distance = self.gates(layer, x, k)
        g, u = (layer.delta[n](x, w(n)) for n in ("ffn_gate", "ffn_up"))
        h = F.silu(g) * u
        if trace is not None:
            trace.selection.append(self.selection_loss(index, h, distance, k))
        every = F.pad(gate, (self.layout.shared, 0), value=1.0).to(h.dtype)
        h = h.unflatten(-1, (self.layout.total, self.layout.width))
        h = (h * (every[..., None] * layer.gain.to(h.dtype))).flatten(-2)
        return layer.delta["ffn_down"](h, w("ffn_down"))

    def forward(self, tokens: Tensor, k: Tensor, trace: Trace | None = None) -> Tensor:
        dense, eps = self.dense, self.dense.shape.eps
        stream = F.embedding(tokens, dense.embedding).float()
        for index, layer in enumerate(self.layers):
            w = lambda name, index=index: dense.weight(index, name)  # noqa: E731
            x = rms_norm(stream, w("attn_norm") * layer.attn_norm, eps).to(dense.dtype)
            q, k_, v = (layer.delta[n](x, w(n)) for n in ("attn_q", "attn_k", "attn_v"))
            mixed = dense.attend(q, k_, v)
            stream = stream + layer.delta["attn_output"](mixed, w("attn_output"))
            x = rms_norm(stream, w("ffn_norm") * layer.ffn_norm, eps).to(dense.dtype)
            stream = stream + self.moe(index, x, k, trace)
            if trace is not None:
                trace.streams.append(stream)
        norm = dense.weights["output_norm.weight"] * self.output_norm
        return rms_norm(stream, norm, eps).to(dense.dtype)


class KLDivergence(torch.autograd.Function):
    """Mean KL(teacher || student) over tokens, computed in pieces; never all logits at once.

    apply(student (tokens, d), teacher (tokens, d), embedding (vocabulary, d), chunk) -> scalar.
    """

    @staticmethod
    def forward(ctx, student, teacher, embedding, chunk):  # type: ignore[no-untyped-def]
        total = torch.zeros((), device=student.device)
        gradient = torch.empty_like(student)
        for at in range(0, student.shape[0], chunk):
            part = slice(at, at + chunk)
            log_p = F.linear(teacher[part], embedding).float().log_softmax(-1)
            log_q = F.linear(student[part], embedding).float().log_softmax(-1)
            p = log_p.exp()
            total += (p * (log_p - log_q)).sum()
            gradient[part] = (log_q.exp() - p).to(student.dtype) @ embedding
        ctx.save_for_backward(gradient)
        ctx.tokens = student.shape[0]
        return total / student.shape[0]

    @staticmethod
    def backward(ctx, upstream):  # type: ignore[no-untyped-def]
        (gradient,) = ctx.saved_tensors
        return gradient * (upstream / ctx.tokens), None, None, None


def stream_loss(student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    """Mean over layers of |s - t|^2 / |t|^2, per token, so that no outlier token rules."""
    losses = []
    for s, t in zip(student, teacher, strict=True):
        t = t.float()
        losses.append(((s - t).square().sum(-1) / t.square().sum(-1).clamp(min=1e-6)).mean())
    return torch.stack(losses).mean()


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

"""Which neurons work together: shared ones by mean energy, the rest in balanced clusters.

A neuron's energy on a token is (activation x length of its column of `ffn_down`) squared. The
partition wants the top-k experts of a token to hold as much of that token's energy as possible.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """`shared` always-on experts and `routed` routed ones, all of `width` neurons."""

    shared: int
    routed: int
    width: int

    @property
    def total(self) -> int:
        return self.shared + self.routed

    def active(self, fraction: float) -> int:
        """Routed experts to use so that `fraction` of the FFN is active."""
        return round(fraction * self.total) - self.shared


def balanced_assign(scores: np.ndarray, capacity: int) -> np.ndarray:
    """scores (neurons, clusters) -> cluster of every neuron, `capacity` neurons in each.

    Neurons with most to lose choose first; bids use column prices found by Sinkhorn scaling.
    """
    log_kernel = torch.from_numpy(scores / max(scores.std() * 0.1, 1e-9)).double()
    price = torch.zeros(scores.shape[1], dtype=torch.float64)
    for _ in range(50):
        row = torch.logsumexp(log_kernel - price, 1, keepdim=True)
        column = torch.logsumexp(log_kernel - row, 0)
        price = column - np.log(capacity)
    bids = (log_kernel - price).numpy()
    top = np.partition(bids, -2, axis=1)
    order = np.argsort(top[:, -2] - top[:, -1])  # largest margin first
    preference = np.argsort(-bids, axis=1)
    room = np.full(scores.shape[1], capacity)
    out = np.empty(scores.shape[0], np.int64)
    for neuron in order:
        for cluster in preference[neuron]:
            if room[cluster]:
                out[neuron] = cluster
                room[cluster] -= 1
                break
    return out


def cluster(features: Tensor, clusters: int, steps: int, seed: int) -> np.ndarray:
    """Balanced spherical k-means. features (neurons, samples), rows of length 1."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    neurons = features.shape[0]
    capacity = neurons // clusters
    first = torch.randperm(neurons, generator=generator)[:1].tolist()
    distance = 1 - features @ features[first[0]]
    while len(first) < clusters:  # seeds far from each other
        weights = distance.clamp(min=0).cpu().double() ** 2
        first.append(int(torch.multinomial(weights, 1, generator=generator)))
        distance = torch.minimum(distance, 1 - features @ features[first[-1]])
    centres = features[first]
    assigned = None
    for _ in range(steps):
        scores = (features @ F.normalize(centres, dim=1).T).cpu().numpy()
        updated = balanced_assign(scores, capacity)
        if assigned is not None and (updated == assigned).all():
            break
        assigned = updated
        index = torch.from_numpy(assigned).to(features.device)
        centres = torch.zeros_like(centres).index_add_(0, index, features)
    assert assigned is not None
    return assigned


def ridge(x: Tensor, target: Tensor, strength: float) -> Tensor:
    """x (samples, d), target (samples, n) -> coefficients (d, n); both float32."""
    gram = (x.T @ x).double()
    gram += torch.eye(len(gram), device=x.device) * gram.diagonal().mean() * strength
    return torch.linalg.solve(gram, (x.T @ target).double()).float()


def partition(
    energy: Tensor, inputs: Tensor, layout: Layout, stride: int, steps: int = 12, seed: int = 0
) -> np.ndarray:
    """energy (samples, neurons), inputs (samples, d) -> neuron order: shared, expert after expert.

    Neurons are clustered by what a linear map of the FFN's input, which is all a router has,
    foretells of their activity; the rest of it is noise for routing. Every `stride`-th sample
    is a feature.
    """
    mean = energy.mean(0)
    by_energy = torch.argsort(mean, descending=True).cpu().numpy()
    cut = layout.shared * layout.width
    shared, rest = np.sort(by_energy[:cut]), np.sort(by_energy[cut:])
    activity = energy[:, torch.from_numpy(rest).to(energy.device)].sqrt()
    activity = activity - activity.mean(0)
    foretold = (inputs[::stride] @ ridge(inputs, activity, 0.03)).T
    features = F.normalize(foretold - foretold.mean(1, keepdim=True), dim=1)
    assigned = cluster(features, layout.routed, steps, seed)
    return np.concatenate([shared, *(rest[assigned == e] for e in range(layout.routed))])


def captured(energy: Tensor, order: np.ndarray, layout: Layout, k: int) -> float:
    """Share of the energy that shared and the best k routed experts of each token hold."""
    sorted_energy = energy[:, torch.from_numpy(order).to(energy.device)]
    experts = sorted_energy.unflatten(1, (layout.total, layout.width)).sum(2)
    best = experts[:, layout.shared :].topk(k, 1).values.sum()
    return float((experts[:, : layout.shared].sum() + best) / energy.sum())

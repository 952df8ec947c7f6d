"""Router rules: from the logits of all experts to the experts of each token and their weights.

Each rule is one function of (tokens, experts) float32 logits that returns ids (tokens, k) int32
and weights (tokens, k) float32. Knows nothing of where experts live.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


def softmax_top_k(
    logits: Tensor, k: int, renormalise: bool = False, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The k most probable experts, weighted by their softmax probabilities over all experts.

    Args:
        logits: (tokens, experts) float32.
        k: experts per token.
        renormalise: divide the k weights by their sum.
        scale: factor of the weights.

    Returns:
        ids (tokens, k) int32, weights (tokens, k) float32.
    """
    if renormalise:  # the softmax over the selected logits is the same number
        ids, weights = top_k_softmax(logits, k)
    else:
        top, ids = torch.topk(logits, k, -1)
        weights = torch.exp(top - torch.logsumexp(logits, -1, keepdim=True))
        ids = ids.to(torch.int32)
    return ids, weights if scale == 1.0 else weights * scale


def top_k_softmax(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest logits, weighted by the softmax over these k; arguments as above."""
    top, ids = torch.topk(logits, k, -1)
    return ids.to(torch.int32), torch.softmax(top, -1)


def sparse_mixer(logits: Tensor, epsilon: float = 0.01) -> tuple[Tensor, Tensor]:
    """SparseMixer at inference (arXiv 2409.12136): two experts, each with a weight of its own.

    A weight is the expert's probability among those within `2 * epsilon` (relative) of it, so
    it is 1 unless there is a near tie. The two weights are not normalised to a sum of 1.

    Args:
        logits: (tokens, experts) float32.
        epsilon: the router's jitter of the training.

    Returns:
        ids (tokens, 2) int32, weights (tokens, 2) float32.
    """
    ids, weights = [], []
    remaining = logits
    for _ in range(2):
        best, index = remaining.max(-1, keepdim=True)
        # The publisher divides by max(|logit|, best), which is 0 only if both are 0: a tie.
        spread = (best - logits) / torch.maximum(logits.abs(), best)
        near = ~(spread > 2 * epsilon) & (remaining > float("-inf"))
        total = torch.logsumexp(remaining.masked_fill(~near, float("-inf")), -1, keepdim=True)
        weights.append(torch.exp(best - total))
        ids.append(index)
        remaining = remaining.scatter(-1, index, float("-inf"))
    return torch.cat(ids, -1).to(torch.int32), torch.cat(weights, -1)


@dataclass(frozen=True, slots=True)
class Rule:
    """How a router reads its logits.

    Attributes:
        gating: "softmax" over all experts, "softmax_selected" over the chosen ones, or
            "sparse_mixer".
        selected: experts per token.
        renormalise: the weights of a token add up to 1; softmax only.
        scale: factor of the weights; softmax only.
    """

    gating: str
    selected: int
    renormalise: bool = False
    scale: float = 1.0

    def __call__(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Ids (tokens, selected) int32 and weights, float32, of (tokens, experts) logits."""
        if self.gating == "sparse_mixer":
            return sparse_mixer(logits)
        if self.gating == "softmax_selected":
            return top_k_softmax(logits, self.selected)
        return softmax_top_k(logits, self.selected, self.renormalise, self.scale)


class Router:
    """The projection to expert logits, in float32, and the rule that reads them.

    Args:
        weight: (experts, hidden) float32.
        bias: (experts,) float32 or None.
        rule: logits to ids and weights.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, rule: Rule) -> None:
        self.weight = weight
        self.bias = bias
        self.rule = rule

    @property
    def nbytes(self) -> int:
        """Bytes of the parameters."""
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def __call__(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Routes (tokens, hidden) float32: ids (tokens, k) int32, weights (tokens, k) float32."""
        return self.rule(torch.nn.functional.linear(hidden, self.weight, self.bias))

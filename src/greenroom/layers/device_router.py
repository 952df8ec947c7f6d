"""The router of the cuda backend: float32 logits, then the choice in one kernel. The plain twin
is `layers.router.Router`; equal logits go to the lower expert. Knows no family.
"""

from torch import Tensor
from torch.nn.functional import linear

from greenroom.kernels.router import choose, logits
from greenroom.layers.router import Rule

FEW = 32  # tokens up to which a program per logit is faster than the vendor's product


class DeviceRouter:
    """The projection to expert logits and the rule that reads them.

    Args:
        weight: (experts, d) float32 on the device.
        bias: (experts,) float32 on the device, or None.
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
        """Routes (tokens, d) float32: ids (tokens, k) int32, weights (tokens, k) float32."""
        rule = self.rule
        # float32 without tensor cores in both: a near tie must fall as on the CPU.
        if hidden.shape[0] <= FEW:
            values = logits(hidden.contiguous(), self.weight, self.bias)
        else:
            values = linear(hidden, self.weight, self.bias)
        scaled = rule.gating == "softmax"
        return choose(
            values,
            rule.gating,
            rule.selected,
            renormalise=rule.renormalise and scaled,
            scale=rule.scale if scaled else 1.0,
        )

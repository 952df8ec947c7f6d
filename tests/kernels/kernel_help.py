"""What several kernel tests need."""

import torch
from torch import Tensor

from greenroom.kernels.planes import PLANES


def together(words: Tensor) -> Tensor:
    """The integers that words of planes stand for, (tokens, columns) int64 in the words' order."""
    planes = words.cpu().view(torch.int8).view(len(words), PLANES, -1).long()
    return sum(planes[:, i] << (16 - 8 * i) for i in range(PLANES))

"""Models: from GGUF metadata and tensors to a forward pass; one file per family.

Adding an architecture adds one file, one line in `registry.py` and one test. What computes, and
needs torch, is imported when it is first asked for: a file's header is read without it.
"""

from typing import TYPE_CHECKING

from greenroom.lazy import lazily
from greenroom.models.config import ModelConfig
from greenroom.models.registry import ARCHITECTURES

if TYPE_CHECKING:
    from greenroom.models.block import KVSpec
    from greenroom.models.loader import LoadOptions, load_model
    from greenroom.models.model import Model

__all__ = ["ARCHITECTURES", "KVSpec", "LoadOptions", "Model", "ModelConfig", "load_model"]

__getattr__ = lazily(
    __name__,
    {
        "KVSpec": "greenroom.models.block",
        "LoadOptions": "greenroom.models.loader",
        "Model": "greenroom.models.model",
        "load_model": "greenroom.models.loader",
    },
)

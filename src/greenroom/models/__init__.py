"""Models: from GGUF metadata and tensors to a forward pass; one file per family.

Adding an architecture adds one file, one line in `registry.py` and one test.
"""

from greenroom.models.config import ModelConfig
from greenroom.models.loader import LoadOptions, load_model
from greenroom.models.model import KVSpec, Model
from greenroom.models.registry import ARCHITECTURES

__all__ = ["ARCHITECTURES", "KVSpec", "LoadOptions", "Model", "ModelConfig", "load_model"]

"""GGUF files: reading, writing, and the block formats as NumPy code.

A leaf: it knows files, types and blocks, and nothing of models.
"""

from greenroom.gguf.formats import dequantize
from greenroom.gguf.metadata import Metadata, RawValue
from greenroom.gguf.reader import GGUFFile, TensorInfo
from greenroom.gguf.repack import repack_pairs
from greenroom.gguf.types import GGMLType, ValueType

__all__ = [
    "GGMLType",
    "GGUFFile",
    "Metadata",
    "RawValue",
    "TensorInfo",
    "ValueType",
    "dequantize",
    "repack_pairs",
]

"""GGUF files: reading, writing, and the block formats as NumPy code.

A leaf: it knows files, types and blocks, and nothing of models.
"""

from greenroom.gguf.formats import dequantize
from greenroom.gguf.metadata import Metadata, RawValue
from greenroom.gguf.quantizers import quantize
from greenroom.gguf.reader import GGUFFile, TensorInfo
from greenroom.gguf.repack import repack_pairs
from greenroom.gguf.synthetic import random_blocks
from greenroom.gguf.types import GGMLType, ValueType
from greenroom.gguf.writer import TensorSpec, Typed, write_gguf

__all__ = [
    "GGMLType",
    "GGUFFile",
    "Metadata",
    "RawValue",
    "TensorInfo",
    "TensorSpec",
    "Typed",
    "ValueType",
    "dequantize",
    "quantize",
    "random_blocks",
    "repack_pairs",
    "write_gguf",
]

"""Run Mixture-of-Experts language models far larger than the GPU.

What is listed in `__all__` is the public interface. Each name is imported when it is first
used, so that `import greenroom` costs next to nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from greenroom.engine.config import EngineConfig
    from greenroom.engine.llm import LLM, plan
    from greenroom.engine.output import Completion, TokenOutput
    from greenroom.engine.params import SamplingParams
    from greenroom.errors import (
        BudgetError,
        ChatTemplateError,
        ContextLengthError,
        EngineClosedError,
        GreenroomError,
        ModelFileError,
        NativeError,
        RequestError,
        TokenizerError,
        UnsupportedModelError,
    )
    from greenroom.gguf import GGUFFile
    from greenroom.placement.placement import Placement
    from greenroom.tokenizer import Tokenizer

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "BudgetError",
    "ChatTemplateError",
    "Completion",
    "ContextLengthError",
    "EngineClosedError",
    "EngineConfig",
    "GGUFFile",
    "GreenroomError",
    "ModelFileError",
    "NativeError",
    "Placement",
    "RequestError",
    "SamplingParams",
    "TokenOutput",
    "Tokenizer",
    "TokenizerError",
    "UnsupportedModelError",
    "__version__",
    "plan",
]

_HOME = {
    "LLM": "greenroom.engine.llm",
    "Completion": "greenroom.engine.output",
    "EngineConfig": "greenroom.engine.config",
    "GGUFFile": "greenroom.gguf",
    "Placement": "greenroom.placement.placement",
    "SamplingParams": "greenroom.engine.params",
    "TokenOutput": "greenroom.engine.output",
    "Tokenizer": "greenroom.tokenizer",
    "plan": "greenroom.engine.llm",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'greenroom' has no attribute {name!r}")
    value = getattr(import_module(_HOME.get(name, "greenroom.errors")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)

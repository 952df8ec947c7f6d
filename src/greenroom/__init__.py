"""Run Mixture-of-Experts language models far larger than the GPU.

What is listed in `__all__` is the public interface. Each name is imported when it is first
used, so that `import greenroom` costs next to nothing.
"""

from typing import TYPE_CHECKING

from greenroom.lazy import lazily

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


_ERRORS = dict.fromkeys(__all__, "greenroom.errors")
__getattr__ = lazily(__name__, _ERRORS | _HOME)


def __dir__() -> list[str]:
    return sorted(__all__)

"""Continuous batching over a paged KV cache: schedule, run, hand out.

Servers, commands and benchmarks need `load_engine(path, config)` and `Engine.stream`;
programs without an event loop need `LLM`. Nothing here knows architectures or devices.
Each name is imported when it is first asked for, as most need torch.
"""

from typing import TYPE_CHECKING

from greenroom.lazy import lazily

if TYPE_CHECKING:
    from greenroom.engine.config import EngineConfig
    from greenroom.engine.engine import Engine
    from greenroom.engine.llm import LLM
    from greenroom.engine.load import assemble, load_engine
    from greenroom.engine.output import Completion, Constraint, TokenLogprob, TokenOutput
    from greenroom.engine.params import SamplingParams

__all__ = [
    "LLM",
    "Completion",
    "Constraint",
    "Engine",
    "EngineConfig",
    "SamplingParams",
    "TokenLogprob",
    "TokenOutput",
    "assemble",
    "load_engine",
]

__getattr__ = lazily(
    __name__,
    {
        "Completion": "greenroom.engine.output",
        "Constraint": "greenroom.engine.output",
        "Engine": "greenroom.engine.engine",
        "EngineConfig": "greenroom.engine.config",
        "LLM": "greenroom.engine.llm",
        "SamplingParams": "greenroom.engine.params",
        "TokenLogprob": "greenroom.engine.output",
        "TokenOutput": "greenroom.engine.output",
        "assemble": "greenroom.engine.load",
        "load_engine": "greenroom.engine.load",
    },
)

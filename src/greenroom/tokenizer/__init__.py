"""Text to token ids and back, chat messages to prompts, model output to messages.

Everything comes from a GGUF file's metadata. Nothing here knows models or devices.
"""

from greenroom.tokenizer.chat import ChatFormat
from greenroom.tokenizer.deltas import ChatDelta, OutputParser
from greenroom.tokenizer.stream import StreamDecoder
from greenroom.tokenizer.tokenizer import Tokenizer

__all__ = ["ChatDelta", "ChatFormat", "OutputParser", "StreamDecoder", "Tokenizer"]

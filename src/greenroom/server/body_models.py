"""The model of every request body, by which a body is read and described. Light to import: the
process that reads large bodies needs no more.
"""

from greenroom.server.protocol import anthropic, local, ollama, openai, responses
from greenroom.server.protocol.base import Strict

REQUESTS: tuple[type[Strict], ...] = (
    openai.ChatCompletionRequest,
    openai.CompletionRequest,
    openai.EmbeddingsRequest,
    responses.ResponsesRequest,
    anthropic.MessagesRequest,
    anthropic.CountTokensRequest,
    ollama.ChatRequest,
    ollama.GenerateRequest,
    ollama.EmbedRequest,
    ollama.EmbeddingRequest,
    ollama.ShowRequest,
    local.TokenizeRequest,
    local.DetokenizeRequest,
)

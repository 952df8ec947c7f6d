"""Serves models over HTTP in the words of OpenAI's, Anthropic's and Ollama's APIs.

A request is checked against its API's model (`protocol`), becomes a `Call`, runs through
`generation`, and is written back in its API's words (`routes`). Knows the engine by its
interface only.
"""

from greenroom.server.app import create_app
from greenroom.server.settings import Caps, ServerSettings

__all__ = ["Caps", "ServerSettings", "create_app"]

"""Serves models over HTTP in the words of OpenAI's, Anthropic's and Ollama's APIs.

A request is checked against its API's model (`protocol`), becomes a `Call`, runs through
`generation`, and is written back in its API's words (`routes`). Knows the engine by its
interface only. The application is imported when it is asked for: the process that reads large
bodies needs the models only.
"""

from typing import TYPE_CHECKING, Any

from greenroom.server.settings import Caps, ServerSettings

if TYPE_CHECKING:
    from greenroom.server.app import create_app

__all__ = ["Caps", "ServerSettings", "create_app"]


def __getattr__(name: str) -> Any:
    if name != "create_app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from greenroom.server.app import create_app

    return create_app

"""The tree of errors a user can meet.

Every message is one line and says what is wrong, which thing it is about and what to do
next. The commands print it without a traceback; the server maps it to an HTTP status.
"""


class GreenroomError(Exception):
    """Base of every error Greenroom raises on purpose."""


class ModelFileError(GreenroomError):
    """A GGUF file is missing, damaged or not what it claims to be."""


class UnsupportedModelError(GreenroomError):
    """The file is sound, but this architecture, tensor type or option is not implemented."""


class TokenizerError(GreenroomError):
    """The vocabulary cannot be used, or a token id is outside it."""


class ChatTemplateError(GreenroomError):
    """A chat template failed, asked for something forbidden or took too long."""


class RequestError(GreenroomError):
    """A parameter of one request is wrong; `field` names it.

    Args:
        message: what is wrong and what would be accepted.
        field: the parameter's name as the caller wrote it.
    """

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class ContextLengthError(RequestError):
    """Prompt and asked-for tokens do not fit the context; the message has both numbers."""


class BudgetError(GreenroomError):
    """A memory budget is too small for what was asked; the message says how much is needed."""


class NativeError(GreenroomError):
    """The native extension is missing or refused its arguments."""


class EngineClosedError(GreenroomError):
    """The engine was closed, or stopped after an error, before the request was finished."""

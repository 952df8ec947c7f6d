"""What goes wrong, in the shape of the API that was called: OpenAI's, Anthropic's, Ollama's.

Maps Greenroom's errors and pydantic's to one `ApiError`, and that to a body by the path.
"""

import logging
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse

from greenroom.errors import (
    BudgetError,
    ChatTemplateError,
    ContextLengthError,
    EngineClosedError,
    GreenroomError,
    RequestError,
    TokenizerError,
)

log = logging.getLogger("greenroom.server")

_OPENAI_KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
_ANTHROPIC_KINDS = {**_OPENAI_KINDS, 413: "request_too_large", 503: "overloaded_error"}


class ApiError(Exception):
    """An answer other than 200.

    Args:
        status: HTTP status.
        message: one line: what, which, what next.
        field: the request field it is about, as the client wrote it.
        code: OpenAI's machine-readable code.
        headers: further response headers, such as Retry-After.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        field: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.field = field
        self.code = code
        self.headers = headers or {}


def api_error(error: BaseException) -> ApiError:
    """Any error as the answer it becomes; the unexpected is logged and answered with 500."""
    match error:
        case ApiError():
            return error
        case ContextLengthError():
            field = error.field or "messages"
            return ApiError(400, str(error), field=field, code="context_length_exceeded")
        case RequestError():
            return ApiError(400, str(error), field=error.field, code="invalid_value")
        case ChatTemplateError() | TokenizerError():
            return ApiError(400, str(error), code="invalid_value")
        case EngineClosedError() | BudgetError():
            return ApiError(503, str(error), headers={"Retry-After": "5"})
        case GreenroomError():
            return ApiError(500, str(error))
    log.error("unexpected error", exc_info=error)
    return ApiError(500, "internal error; the server's log has the details")


def _is_field(part: object) -> bool:
    """Whether a step of pydantic's location is the client's, not a branch of a union."""
    if isinstance(part, int):
        return True
    name = str(part)
    return name.isidentifier() and name.islower() and name not in {"str", "int", "float", "bool"}


def field_path(location: Sequence[int | str], body: Any = None) -> str:
    """`("messages", 0, "Message", "role")` as `messages[0].role`.

    A step of the location that a union adds (`text`, `function_call`) is told from a field
    by looking into the body: it is dropped where the body has no such key.
    """
    path = ""
    for at, part in enumerate(location):
        if not _is_field(part):
            continue
        if isinstance(part, int):
            path += f"[{part}]"
            body = body[part] if isinstance(body, list) and part < len(body) else None
            continue
        last = at == len(location) - 1
        if isinstance(body, dict) and part not in body and not last:
            continue
        path += f".{part}" if path else str(part)
        body = body.get(part) if isinstance(body, dict) else None
    return path


def validation_error(error: ValidationError, body: Any = None) -> ApiError:
    """The most telling of pydantic's findings: the one deepest in the body, unknown first."""
    found = error.errors(include_url=False, include_context=False)
    chosen = max(found, key=lambda e: (len(e["loc"]), e["type"] == "extra_forbidden"))
    field = field_path(chosen["loc"], body)
    if chosen["type"] == "extra_forbidden":
        message = f"{field}: this field is not supported"
    elif chosen["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {chosen['msg']}", code="invalid_json")
    else:
        message = f"{field}: {chosen['msg']}" if field else chosen["msg"]
    return ApiError(400, message, field=field or None, code="invalid_value")


def openai_body(error: ApiError) -> dict[str, Any]:
    kind = _OPENAI_KINDS.get(error.status)
    kind = kind or ("server_error" if error.status >= 500 else "invalid_request_error")
    fields = {"message": error.message, "type": kind, "param": error.field, "code": error.code}
    return {"error": fields}


def anthropic_body(error: ApiError) -> dict[str, Any]:
    kind = _ANTHROPIC_KINDS.get(error.status)
    kind = kind or ("api_error" if error.status >= 500 else "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": error.message}}


def error_body(path: str, error: ApiError) -> dict[str, Any]:
    """The body in the shape that clients of this path expect."""
    if path.startswith("/api/"):
        return {"error": error.message}
    if path.startswith("/v1/messages"):
        return anthropic_body(error)
    return openai_body(error)


async def answer_error(request: Request, error: Exception) -> JSONResponse:
    """The exception handler of the application."""
    found = api_error(error)
    body = error_body(request.url.path, found)
    return JSONResponse(body, status_code=found.status, headers=found.headers)

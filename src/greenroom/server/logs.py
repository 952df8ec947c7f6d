"""Log lines: plain for people, or one JSON object a line for machines."""

import json
import logging
import logging.config
import time
from typing import Any

_ACCESS = ("client", "method", "path", "http_version", "status")


_CONTROL = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if code != 9}


class LineFormatter(logging.Formatter):
    """A record is one line, whatever a client put into it; a traceback's lines are indented."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return super().formatMessage(record).translate(_CONTROL)

    def formatException(self, ei: Any) -> str:
        lines = super().formatException(ei).split("\n")
        return "\n".join("    " + line.translate(_CONTROL) for line in lines)


class JsonFormatter(logging.Formatter):
    """One JSON object per record; an access record's parts are fields of their own."""

    def format(self, record: logging.LogRecord) -> str:
        now = time.gmtime(record.created)
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", now) + f".{int(record.msecs):03d}Z"
        fields: dict[str, Any] = {"time": stamp, "level": record.levelname.lower()}
        fields["logger"] = record.name
        arguments = record.args
        if record.name == "uvicorn.access" and isinstance(arguments, tuple):
            fields |= dict(zip(_ACCESS, arguments, strict=False))
        else:
            fields["message"] = record.getMessage()
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields, ensure_ascii=False, default=str)


def log_config(form: str, level: str) -> dict[str, Any]:
    """A logging configuration for the server and uvicorn.

    Args:
        form: "text" or "json".
        level: "debug", "info", "warning" or "error".
    """
    kind = "JsonFormatter" if form == "json" else "LineFormatter"
    formatter = {"()": f"{__name__}.{kind}", "fmt": "%(asctime)s %(levelname)s %(message)s"}
    loggers = ("greenroom", "uvicorn", "uvicorn.access", "uvicorn.error")
    each = {"handlers": ["out"], "level": level.upper(), "propagate": False}
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"lines": formatter},
        "handlers": {"out": {"class": "logging.StreamHandler", "formatter": "lines"}},
        "loggers": {name: dict(each) for name in loggers},
    }

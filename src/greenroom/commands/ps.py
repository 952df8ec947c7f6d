"""`greenroom ps`: the models a running server has loaded."""

import json
from typing import Annotated, Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from typer import Option

from greenroom.errors import GreenroomError

Url = Annotated[str, Option(help="The server.", envvar="GREENROOM_URL")]
Key = Annotated[str | None, Option(help="Its API key.", envvar="GREENROOM_API_KEY")]
Json = Annotated[bool, Option("--json", help="Print JSON.")]


def ps(url: Url = "http://127.0.0.1:11435", api_key: Key = None, as_json: Json = False) -> None:
    """Show which models a server has loaded, and what memory they take."""
    found = _ask(url, api_key)["models"]
    if as_json:
        print(json.dumps(found, indent=2))
        return
    if not found:
        print("no model is loaded")
    for model in found:
        total, vram = model["size"] / 2**30, model["size_vram"] / 2**30
        context = model["context_length"]
        print(f"{model['name']}  {total:.2f} GiB ({vram:.2f} GiB VRAM)  context {context}")


def _ask(url: str, key: str | None) -> Any:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        with urlopen(Request(url.rstrip("/") + "/api/ps", headers=headers), timeout=10) as answer:
            return json.load(answer)
    except HTTPError as error:
        raise GreenroomError(f"{url} answered {error.code} {error.reason}") from None
    except (URLError, OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise GreenroomError(
            f"{url}: {reason}; is 'greenroom serve' running, and is --url right?"
        ) from None

"""Keys, hosts, origins, sizes."""

import asyncio
import base64
import os

import pytest

from greenroom.errors import RequestError
from greenroom.server import Caps, ServerSettings
from greenroom.server.security import HostCheck, KeyRing

CHAT = "/v1/chat/completions"
BODY = {"messages": [{"role": "user", "content": "x"}]}


def test_every_route_but_health_needs_a_key(make_client):
    client = make_client(keys=KeyRing(["secret"]))
    document = client.app.openapi()
    assert client.get("/health").status_code == 200
    open_paths = []
    for path, methods in document["paths"].items():
        for method in methods:
            response = client.request(method.upper(), path.replace("{model}", "x"))
            if response.status_code != 401:
                open_paths.append(path)
    assert open_paths == ["/health"]
    for path in ("/", "/docs", "/openapi.json", "/static/app.js", "/nothing"):
        assert client.get(path).status_code == 401


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": "Bearer secret"},
        {"x-api-key": "secret"},
        {"authorization": "Basic " + base64.b64encode(b"me:secret").decode()},
    ],
)
def test_ways_to_send_a_key(make_client, headers):
    client = make_client(keys=KeyRing(["other", "secret"]))
    assert client.get("/v1/models", headers=headers).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": "Bearer Secret"},
        {"authorization": "Bearer "},
        {"x-api-key": "ö"},
        {"authorization": "Basic !!!"},
        {"authorization": "secret"},
    ],
)
def test_wrong_keys(make_client, headers):
    client = make_client(keys=KeyRing(["secret"]))
    raw = {name: value.encode() for name, value in headers.items()}
    response = client.get("/v1/models", headers=raw)
    assert response.status_code == 401
    assert "secret" not in response.text


def test_keys_are_read_again(tmp_path):
    file = tmp_path / "keys"
    file.write_text("one # the first\n\n# nothing\ntwo\n")
    os.chmod(file, 0o600)
    ring = KeyRing(["given"], file)
    assert [ring.accepts(key) for key in ("given", "one", "two", "# nothing", "")] == [
        *[True] * 3,
        *[False] * 2,
    ]
    file.write_text("three\n")
    assert ring.reload() == 2
    assert ring.accepts("three")
    assert not ring.accepts("one")
    file.write_text("")
    with pytest.raises(RequestError, match="no API key"):
        ring.reload()
    assert ring.accepts("three")


@pytest.mark.parametrize(
    ("host", "accepted"),
    [
        ("localhost", True),
        ("localhost:11435", True),
        ("127.0.0.1:80", True),
        ("[::1]:80", True),
        ("192.168.1.5", True),
        ("models.example", True),
        ("evil.example", False),
        ("localhost.evil.example", False),
        ("", False),
    ],
)
def test_hosts(host, accepted):
    assert HostCheck(["models.example"]).accepts(host) is accepted


def test_rebound_host_is_refused(client):
    response = client.get("/v1/models", headers={"host": "evil.example"})
    assert response.status_code == 403
    assert "--allowed-host" in response.json()["error"]["message"]


def test_foreign_origins_are_refused(make_client):
    client = make_client(settings=ServerSettings(allowed_origins=("https://good.example",)))
    evil = client.post("/v1/chat/completions", BODY, headers={"origin": "https://evil.example"})
    assert evil.status_code == 403
    assert "access-control-allow-origin" not in evil.headers
    good = client.post("/v1/chat/completions", BODY, headers={"origin": "https://good.example"})
    assert good.status_code == 200
    assert good.headers["access-control-allow-origin"] == "https://good.example"
    own = client.post("/v1/chat/completions", BODY, headers={"origin": "http://localhost"})
    assert own.status_code == 200


def test_preflight(make_client):
    settings = ServerSettings(allowed_origins=("https://good.example",))
    client = make_client(settings=settings, keys=KeyRing(["k"]))
    asks = {"origin": "https://good.example", "access-control-request-method": "POST"}
    response = client.request("OPTIONS", "/v1/chat/completions", headers=asks)
    assert response.status_code == 204
    assert "POST" in response.headers["access-control-allow-methods"]
    asks["origin"] = "https://evil.example"
    assert client.request("OPTIONS", "/v1/models", headers=asks).status_code == 403


def test_large_bodies_are_refused(make_client):
    client = make_client(settings=ServerSettings(caps=Caps(body_bytes=1000)))
    big = {"messages": [{"role": "user", "content": "x" * 2000}]}
    assert client.post("/v1/chat/completions", big).status_code == 413

    async def pieces():
        for _ in range(20):
            yield b"x" * 100

    response = client.post("/v1/messages", content=pieces())
    assert response.status_code == 413
    assert response.json()["error"]["type"] == "request_too_large"


def test_schema_caps(make_client):
    client = make_client(settings=ServerSettings(caps=Caps(schema_bytes=100)))
    form = {"type": "regex", "pattern": "a" * 200}
    response = client.post("/v1/chat/completions", {**BODY, "response_format": form})
    assert response.status_code == 400
    assert "200" in response.json()["error"]["message"]
    deep: dict = {"type": "object"}
    for _ in range(80):
        deep = {"type": "object", "properties": {"a": deep}}
    form = {"type": "json_schema", "json_schema": {"schema": deep}}
    response = client.post("/v1/chat/completions", {**BODY, "response_format": form})
    assert response.status_code == 400
    assert "64" in response.json()["error"]["message"]


def test_page_is_closed_to_the_outside(client):
    response = client.get("/")
    assert response.status_code == 200
    assert "default-src 'self'" in response.headers["content-security-policy"]
    assert client.get("/static/nothing").status_code == 404


def test_an_empty_key_is_refused():
    for key in ("", "  "):
        with pytest.raises(RequestError, match="empty"):
            KeyRing([key])


def test_what_pages_elsewhere_embed_is_refused(client):
    """An image or a script of another site: no origin is sent, but where it is for."""
    for site in ("cross-site", "same-site"):
        headers = {"sec-fetch-site": site, "sec-fetch-mode": "no-cors"}
        assert client.get("/tokenizer_info", headers=headers).status_code == 403
        assert client.get("/", headers=headers).status_code == 200  # a link
    assert client.get("/tokenizer_info", headers={"sec-fetch-site": "same-origin"}).is_success


def test_preflight_gives_back_names_only(make_client):
    client = make_client(settings=ServerSettings(allowed_origins=("*",)))
    asks = {"origin": "https://a.example", "access-control-request-method": "POST"}
    for asked, allowed in (
        ("x-api-key, content-type", "x-api-key, content-type"),
        ("a: b", "authorization, content-type"),
        ("<script>", "authorization, content-type"),
    ):
        headers = {**asks, "access-control-request-headers": asked}
        response = client.request("OPTIONS", "/v1/models", headers=headers)
        assert response.headers["access-control-allow-headers"] == allowed


@pytest.mark.parametrize("name", ["messages", "tools", "self", "bos_token"])
def test_template_variables_cannot_take_the_place_of_the_prompt(client, name):
    response = client.post(CHAT, {**BODY, "chat_template_kwargs": {name: "x"}})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == f"chat_template_kwargs.{name}"


@pytest.mark.parametrize("field", ["chat_template", "template"])
@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/api/generate", "/tokenize"])
def test_clients_bring_no_templates(client, field, path):
    body = {"model": "fake", "prompt": "x", field: "{{ 1 }}"}
    body |= {"messages": BODY["messages"]} if path == CHAT else {}
    response = client.post(path, body)
    assert response.status_code == 400
    assert "not supported" in response.text


@pytest.mark.parametrize(
    "path",
    [
        "/static/../security.py",
        "/static/..%2fsecurity.py",
        "/static/%2e%2e/%2e%2e/settings.py",
        "/v1/models/../../../../etc/passwd",
        "/v1/models/%2Fetc%2Fpasswd",
        "//etc/passwd",
    ],
)
def test_paths_lead_nowhere(client, path):
    response = client.get(path)
    assert response.status_code == 404
    assert "root:" not in response.text
    assert "import" not in response.text


@pytest.mark.parametrize("name", ["/etc/passwd", "../../x.gguf", "a/../b"])
def test_models_are_names_not_files(client, name):
    for path in ("/api/show", "/api/chat", "/api/embed"):
        body = {"model": name, **({} if path == "/api/show" else {"input": "x"})}
        body = {"model": name, "messages": BODY["messages"]} if path == "/api/chat" else body
        assert client.post(path, body).status_code == 404


def test_an_unexpected_error_says_nothing_of_the_inside(client, engine, monkeypatch, caplog):
    def fail(*args, **kwargs):
        raise ValueError("secret /path/of/something")

    monkeypatch.setattr(engine, "stream", fail)
    monkeypatch.setattr(engine, "stats", fail)
    monkeypatch.setattr(engine, "embed", fail)
    for response in (
        client.post(CHAT, BODY),
        client.post(CHAT, {**BODY, "stream": True}),
        client.post("/api/embed", {"model": "fake", "input": "x"}),
        client.get("/props"),
        client.get("/metrics"),
    ):
        assert response.status_code == 500
        assert "secret" not in response.text
        assert "Traceback" not in response.text
        assert "log has the details" in response.text
    assert "secret" in caplog.text


def test_a_body_that_stops_coming_is_not_waited_for(make_client):
    client = make_client(settings=ServerSettings(body_seconds=0.05))

    async def ask() -> int:
        sent = []
        parts = [{"type": "http.request", "body": b"{", "more_body": True}]

        async def receive():
            if not parts:
                await asyncio.sleep(30)
            return parts.pop()

        async def send(message):
            sent.append(message)

        headers = [(b"host", b"localhost")]
        scope = {"type": "http", "method": "POST", "path": CHAT, "headers": headers}
        scope |= {"raw_path": CHAT.encode(), "query_string": b"", "scheme": "http"}
        await client.app({**scope, "server": ("localhost", 80), "root_path": ""}, receive, send)
        return sent[0]["status"]

    assert client.run(ask()) == 408


def test_refusals_are_counted(client):
    client.get("/nothing")
    client.get("/v1/models", headers={"host": "evil.example"})
    text = client.get("/metrics").text
    assert 'greenroom:requests_rejected_total{status="404"} 1.0' in text
    assert 'greenroom:requests_rejected_total{status="403"} 1.0' in text

"""The server as a process: signals, drain, TLS options, log lines, the command line."""

import contextlib
import json
import logging
import shutil
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import typer
import typer.main

from greenroom.commands import serve
from greenroom.errors import GreenroomError, ModelFileError, RequestError
from greenroom.server.launch import Listen, bind
from greenroom.server.logs import JsonFormatter, LineFormatter
from greenroom.server.source import ModelSource

FAKE = Path(__file__).with_name("serve_fake.py")
BODY = {"messages": [{"role": "user", "content": "x"}]}


@contextmanager
def server(keys: Path | None, delay: float, *tls: Path) -> Iterator[tuple[Any, str]]:
    command = [sys.executable, str(FAKE), str(keys or "-"), str(delay), "0", *map(str, tls)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )  # fmt: skip
    try:
        url = process.stdout.readline().strip()
        scheme = "https" if tls else "http"
        assert url.startswith(f"{scheme}://127.0.0.1:"), process.stderr.read()
        yield process, url
    finally:
        process.kill()
        process.communicate()


def test_sigterm_lets_running_answers_end_and_refuses_new_ones():
    with server(None, 0.05) as (process, url), httpx.Client(base_url=url, timeout=30) as client:
        body = {**BODY, "stream": True}
        with client.stream("POST", "/v1/chat/completions", json=body) as response:
            lines = response.iter_lines()
            assert next(lines).startswith("data:")
            process.send_signal(signal.SIGTERM)
            text = "".join(lines)
        assert text.endswith("[DONE]")
        assert text.count('"content":') == 30
        assert process.wait(60) == 0
        with pytest.raises(httpx.TransportError):
            httpx.get(url + "/health")


def test_sighup_reads_the_keys_again(tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("one\n")
    keys.chmod(0o600)
    with server(keys, 0) as (process, url), httpx.Client(base_url=url) as client:

        def status(key: str) -> int:
            headers = {"authorization": f"Bearer {key}"}
            return client.get("/v1/models", headers=headers).status_code

        assert (status("one"), status("two")) == (200, 401)
        keys.write_text("two\n")
        process.send_signal(signal.SIGHUP)
        deadline = time.monotonic() + 60
        while status("two") != 200 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert (status("one"), status("two")) == (401, 200)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        logged = [json.loads(line) for line in process.stderr.read().splitlines()]
        assert any(entry["message"] == "API keys: 1" for entry in logged)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_tls_handshake_and_answer(tmp_path):
    certificate, key = tmp_path / "server.crt", tmp_path / "server.key"
    make = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2"
    subprocess.run(
        [*make.split(), "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1",
         "-keyout", str(key), "-out", str(certificate)],
        check=True, capture_output=True,
    )  # fmt: skip
    with server(None, 0, certificate, key) as (_, url):
        trusting = ssl.create_default_context(cafile=str(certificate))
        with httpx.Client(base_url=url, verify=trusting) as client:
            assert client.get("/v1/models").status_code == 200
            answer = client.post("/v1/chat/completions", json=BODY).json()
            assert answer["choices"][0]["message"]["content"] == "0123456789" * 3
            own = {"origin": url}  # a page of ours, by its https address
            assert client.get("/v1/models", headers=own).status_code == 200
        with pytest.raises(httpx.ConnectError, match=r"(?i)certificate"):
            httpx.get(url + "/health")
        with pytest.raises(httpx.TransportError):
            httpx.get(url.replace("https", "http") + "/health")


@pytest.fixture(scope="module")
def running() -> Iterator[str]:
    with server(None, 0.02) as (_, url):
        yield url


def test_client_that_leaves_is_noticed_by_a_real_server(running):
    with httpx.Client(base_url=running) as client:
        for stream in (True, False):
            body = {**BODY, "stream": stream, "n": 2}
            with (
                contextlib.suppress(httpx.TimeoutException),
                client.stream("POST", "/v1/chat/completions", json=body, timeout=0.1) as found,
            ):
                next(found.iter_raw())  # and leaves
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            stats = client.get("/props").json()["loaded"]["fake"]["stats"]
            if stats["running"] == 0:
                break
            time.sleep(0.02)
        assert stats["running"] == 0


def parse(arguments: list[str]) -> dict[str, Any]:
    """The parameters that the serve command would use."""
    app = typer.Typer()
    app.command()(serve.serve)
    command = typer.main.get_command(app)
    with command.make_context("serve", arguments) as context:
        return dict(context.params)


def test_flag_before_environment_before_file(tmp_path, monkeypatch):
    file = tmp_path / "greenroom.toml"
    file.write_text('port = 1\nqueue = 2\nmax-loaded = 3\napi-key = ["k"]\nmodels = ["m.gguf"]\n')
    monkeypatch.setenv("GREENROOM_PORT", "11")
    monkeypatch.setenv("GREENROOM_QUEUE", "12")
    found = parse(["--config", str(file), "--port", "21"])
    assert (found["port"], found["queue"], found["max_loaded"]) == (21, 12, 3)
    assert list(found["api_key"]) == ["k"]
    assert list(found["models"]) == ["m.gguf"]
    assert parse([])["port"] == 11


@pytest.mark.parametrize("text", ["prot = 1", "port = ", "port = 'x'"])
def test_wrong_config_files(tmp_path, text):
    file = tmp_path / "greenroom.toml"
    file.write_text(text)
    with pytest.raises(typer.BadParameter):
        parse(["--config", str(file)])


def test_every_option_has_a_variable():
    app = typer.Typer()
    app.command()(serve.serve)
    for parameter in typer.main.get_command(app).params:
        name = parameter.name or "help"
        if parameter.param_type_name == "option" and "help" not in name and "compl" not in name:
            assert parameter.envvar == f"GREENROOM_{parameter.name.upper()}"


def test_options_become_settings():
    values = parse(["--max-choices", "3", "--keep-alive", "60", "--allowed-host", "a", "m"])
    settings = serve.server_settings(values)
    assert (settings.caps.choices, settings.keep_alive) == (3, 60)
    assert settings.allowed_hosts == ("a",)
    assert serve.listening(values).port == 11435


def test_budgets_reach_the_engine(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "greenroom.engine.load.load_engine", lambda path, config, *_, **__: asked.append(config)
    )
    monkeypatch.setenv("GREENROOM_VRAM", "6GiB")
    values = parse(["--ram", "24GiB", "--context", "64", "--prefix-ram", "1GiB", "m"])
    serve._loader(values)(ModelSource("m", tmp_path))
    (config,) = asked
    assert (config.vram, config.ram, config.prefix_ram) == ("6GiB", "24GiB", "1GiB")
    assert (config.context_length, config.max_sequences, config.backend) == (64, 8, "auto")
    for wrong in (["--ram", "much"], ["--vram", "-1"]):
        with pytest.raises(GreenroomError, match=wrong[0][2:]):
            serve._loader(parse([*wrong, "m"]))  # when it starts, not on first use


def test_missing_model_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ModelFileError, match="greenroom list"):
        serve.start(parse(["nothing.gguf"]))


def test_wrong_addresses_are_told(tmp_path):
    with bind(Listen(port=0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(RequestError, match=str(port)):
            bind(Listen(port=port))
    with pytest.raises(RequestError, match="belong together"):
        Listen(certificate=tmp_path / "c.pem")


def test_json_log_lines():
    record = logging.LogRecord(
        "uvicorn.access", logging.INFO, "", 0, "%s", ("c", "GET", "/p", "1.1", 200), None
    )
    fields = json.loads(JsonFormatter().format(record))
    assert (fields["method"], fields["path"], fields["status"]) == ("GET", "/p", 200)


def test_a_log_record_is_one_line_whatever_is_in_it():
    formatter = LineFormatter("%(levelname)s %(message)s")
    text = "x\n2026-01-01 ERROR forged\x1b[2J\r"
    record = logging.LogRecord("greenroom", logging.INFO, "", 0, "%s", (text,), None)
    assert formatter.format(record) == "INFO x\\x0a2026-01-01 ERROR forged\\x1b[2J\\x0d"
    try:
        raise ValueError(text)
    except ValueError as error:
        record.exc_info = (ValueError, error, error.__traceback__)
    lines = formatter.format(record).splitlines()
    assert all(line.startswith("    ") for line in lines[1:])
    assert len(json.loads(JsonFormatter().format(record))["message"]) == len(text)

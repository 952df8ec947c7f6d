"""Publishing against a stand-in of the hub's HTTP interface."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi

from greenroom.commands import main
from greenroom.convert.hub import SUMS, PublishError, plan, publish
from greenroom.errors import ModelFileError


class Hub(ThreadingHTTPServer):
    """Keeps what is committed; fails the commit of a file whose name is in `failing`."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.commits: list[str] = []
        self.failing: set[str] = set()
        self.created = False

    @property
    def api(self) -> HfApi:
        return HfApi(endpoint=f"http://127.0.0.1:{self.server_port}", token="hf_x")


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None: ...

    def answer(self, body: Any, status: int = 200) -> None:
        raw = json.dumps(body).encode()
        self.send_response(status)
        if status == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def do_GET(self) -> None:
        if not self.server.created:
            return self.answer({"error": "Repository not found"}, 404)
        siblings = [
            {
                "rfilename": name,
                "size": len(data),
                "lfs": {
                    "sha256": hashlib.sha256(data).hexdigest(),
                    "size": len(data),
                    "pointerSize": 1,
                },
            }
            for name, data in self.server.files.items()
        ]
        return self.answer({"id": "me/model", "siblings": siblings, "tags": [], "sha": "0" * 40})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/repos/create":
            self.server.created = True
            return self.answer({"url": f"http://127.0.0.1:{self.server.server_port}/me/model"})
        if self.path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                for f in json.loads(body)["files"]
            ]
            return self.answer({"files": files})
        return self.commit([json.loads(line) for line in body.splitlines()])

    def commit(self, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            if line["key"] != "file":
                continue
            name = line["value"]["path"]
            if name in self.server.failing:
                return self.answer({"error": "out of order"}, 400)
            self.server.files[name] = base64.b64decode(line["value"]["content"])
            self.server.commits.append(name)
        url = f"http://127.0.0.1:{self.server.server_port}/me/model/commit/" + "0" * 40
        return self.answer({"commitUrl": url, "commitOid": "0" * 40, "success": True})


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + bytes(1000))
    (tmp_path / "README.md").write_text("# A model\n")
    (tmp_path / ".hidden").write_text("no")
    return tmp_path


def test_what_is_uploaded_has_its_checksum(hub: Hub, folder: Path) -> None:
    publish(folder, "me/model", plan(folder, "me/model", hub.api), hub.api)
    assert set(hub.files) == {"a.gguf", "README.md", SUMS}
    assert hub.files["a.gguf"] == (folder / "a.gguf").read_bytes()
    lines = [line.split("  ") for line in hub.files[SUMS].decode().splitlines()]
    assert {name: hashlib.sha256(hub.files[name]).hexdigest() for _, name in lines} == {
        name: sum for sum, name in lines
    }


def test_a_broken_upload_goes_on(hub: Hub, folder: Path) -> None:
    hub.failing = {"a.gguf"}
    with pytest.raises(PublishError, match="goes on where it stopped"):
        publish(folder, "me/model", plan(folder, "me/model", hub.api), hub.api)
    assert set(hub.files) == {"README.md"}
    hub.failing = set()
    publish(folder, "me/model", plan(folder, "me/model", hub.api), hub.api)
    assert hub.commits == ["README.md", "a.gguf", SUMS]


def test_a_dry_run_asks_nobody(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi", None)
    assert main(["publish", str(folder), "me/model"]) == 0
    out = capsys.readouterr().out
    sum = hashlib.sha256((folder / "a.gguf").read_bytes()).hexdigest()
    assert sum in out
    assert "hidden" not in out
    assert "--no-dry-run" in out


@pytest.mark.parametrize("name", ["model", "a/b/c", "../x", "a/", "a b/c", ""])
def test_what_is_no_repository_is_said(
    folder: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["publish", str(folder), name]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"no \.gguf file"):
        plan(tmp_path, "me/model")

"""Finding, downloading and removing models, and the commands that do it."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from greenroom.errors import ModelFileError, RequestError
from greenroom.server import hub, stores
from greenroom.server.describe import read_description

REPO = "someone/Tiny-MoE-GGUF"
COMMIT = "c" * 40


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    for name in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME", "OLLAMA_MODELS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def model(path: Path, size: int = 100) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"GGUF".ljust(size, b"\0"))
    return path


def test_every_store_is_found(home):
    snapshot = home / ".cache/huggingface/hub/models--a--b/snapshots/1"
    model(snapshot / "b-Q4_K_M.gguf")
    model(snapshot / "b-MXFP4-00001-of-00002.gguf", 100)
    model(snapshot / "b-MXFP4-00002-of-00002.gguf", 50)
    model(snapshot / "mmproj-b.gguf")
    model(home / ".lmstudio/models/c/d/d-Q8_0.gguf")
    layer = {"mediaType": "application/vnd.ollama.image.model", "digest": "sha256:ab"}
    manifest = home / ".ollama/models/manifests/registry.ollama.ai/library/e/latest"
    manifest.parent.mkdir(parents=True)
    manifest.write_text(json.dumps({"layers": [{"mediaType": "x"}, layer]}))
    model(home / ".ollama/models/blobs/sha256-ab")
    model(home / "more/f.gguf")
    (home / "more/not.gguf").write_bytes(b"ZIP!")
    found = {source.name: source for source in stores.discover([home / "more"])}
    assert set(found) == {"a/b:Q4_K_M", "a/b:MXFP4", "d-Q8_0", "e:latest", "f"}
    assert found["a/b:MXFP4"].size == 150
    assert found["e:latest"].origin == "ollama"


def test_names_are_unique_and_files_listed_once(home):
    first, second = model(home / "x/m.gguf"), model(home / "y/m.gguf")
    (home / "y/link.gguf").symlink_to(first)
    names = [source.name for source in stores.discover([home / "x", home / "y"])]
    assert names == ["m", "y/m"]
    assert stores.find("y/m", [home / "x", home / "y"]).path == second


def test_incomplete_split_set_is_left_out(home):
    path = model(home / "x/m-00001-of-00002.gguf")
    assert stores.discover([home / "x"]) == []
    with pytest.raises(ModelFileError, match="m-00002-of-00002"):
        stores.select([str(path)])


def test_find_takes_an_unambiguous_beginning(home):
    model(home / "x/mixtral-Q4_0.gguf")
    model(home / "x/mistral-Q4_0.gguf")
    assert stores.find("mix", [home / "x"]).name == "mixtral-Q4_0"
    with pytest.raises(ModelFileError, match="several"):
        stores.find("mi", [home / "x"])
    with pytest.raises(ModelFileError, match="greenroom pull"):
        stores.find("nothing", [home / "x"])


def test_damaged_file_has_a_problem_not_a_traceback(home):
    (source,) = stores.select([str(model(home / "broken.gguf"))])
    assert "broken.gguf" in read_description(source).problem


@pytest.mark.parametrize(
    ("name", "quant"),
    [
        ("Qwen3-30B-A3B-Q4_K_M.gguf", "Q4_K_M"),
        ("gpt-oss-20b-mxfp4.gguf", "MXFP4"),
        ("x-UD-Q4_K_XL-00001-of-00002.gguf", "UD-Q4_K_XL"),
        ("x.IQ4_XS.gguf", "IQ4_XS"),
        ("x-BF16.gguf", "BF16"),
        ("plain.gguf", ""),
    ],
)
def test_quantization_of_names(name, quant):
    assert stores.quantization(Path(name)) == quant


@pytest.mark.parametrize("text", ["plain", "a/b/c:d:e", "../x", "a/b:", ""])
def test_wrong_references(text):
    with pytest.raises(RequestError, match="owner/repo"):
        hub.parse_reference(text)


class Hub(BaseHTTPRequestHandler):
    """A stand-in of the hub for one repository; a download can be cut once."""

    files: dict[str, bytes] = {}  # noqa: RUF012
    cut: set[str] = set()  # noqa: RUF012
    ranges: list[str] = []  # noqa: RUF012

    def log_message(self, *args: Any) -> None:
        pass

    def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if path.startswith(f"/api/models/{REPO}"):
            siblings = [{"rfilename": n, "size": len(d)} for n, d in self.files.items()]
            body = json.dumps({"id": REPO, "sha": COMMIT, "siblings": siblings}).encode()
            headers = {"Content-Length": str(len(body)), "Content-Type": "application/json"}
            self._answer(200, headers, body)
            return
        name = path.rpartition("/")[2]
        if name not in self.files or REPO not in path:
            self._answer(404, {"Content-Length": "0", "X-Error-Code": "EntryNotFound"}, b"")
            return
        data = self.files[name]
        headers = {
            "ETag": f'"{hashlib.sha256(data).hexdigest()}"',
            "X-Repo-Commit": COMMIT,
            "Accept-Ranges": "bytes",
        }
        asked = self.headers.get("Range")
        if asked and self.command == "GET":
            self.ranges.append(asked)
            start = int(asked.removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            part = data[start:]
            self._answer(206, headers | {"Content-Length": str(len(part))}, part)
            return
        headers["Content-Length"] = str(len(data))
        if self.command == "GET" and name in self.cut:
            self.cut.discard(name)
            self._answer(200, headers, data[: len(data) // 2])
            self.close_connection = True
            return
        self._answer(200, headers, data)

    do_HEAD = do_GET


@pytest.fixture
def stand_in(home, monkeypatch):
    import huggingface_hub.constants as constants

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    cache = home / "cache/hub"
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    Hub.files = {
        "m-Q4_K_M.gguf": b"GGUF" + b"4" * 300_000,
        "m-Q8_0-00001-of-00002.gguf": b"GGUF" + b"8" * 1000,
        "m-Q8_0-00002-of-00002.gguf": b"GGUF" + b"8" * 900,
        "README.md": b"x",
    }
    Hub.cut, Hub.ranges = set(), []
    yield Hub
    server.shutdown()
    server.server_close()


def test_pull_takes_the_preferred_quantisation(stand_in):
    said: list[str] = []
    path = hub.pull(REPO, said.append)
    assert path.read_bytes() == stand_in.files["m-Q4_K_M.gguf"]
    assert "Q4_K_M" in said[0]
    (source,) = stores.discover()
    assert source.name == f"{REPO}:Q4_K_M"


def test_pull_takes_all_parts_and_rm_frees_them(stand_in):
    hub.pull(f"{REPO}:q8_0", lambda line: None)
    source = stores.find(f"{REPO}:Q8_0")
    assert source.size == 1004 + 904
    blobs = source.path.resolve().parent
    assert len(list(blobs.iterdir())) == 2
    assert hub.remove(source) == 1908
    assert list(blobs.iterdir()) == []
    assert stores.discover() == []


def test_interrupted_download_goes_on(stand_in):
    # The hub's client writes 10 MiB at a time: less than that is not kept.
    stand_in.files["m-Q4_K_M.gguf"] = b"GGUF" + bytes(24 << 20)
    stand_in.cut.add("m-Q4_K_M.gguf")
    try:
        path = hub.pull(REPO, lambda line: None)
    except hub.HubError:
        path = hub.pull(REPO, lambda line: None)
    assert path.read_bytes() == stand_in.files["m-Q4_K_M.gguf"]
    starts = [int(r.removeprefix("bytes=").split("-")[0]) for r in stand_in.ranges]
    assert max(starts, default=0) > 0


def test_pull_says_what_there_is(stand_in):
    with pytest.raises(hub.HubError, match="Q4_K_M, Q8_0"):
        hub.pull(f"{REPO}:Q2_K", lambda line: None)
    with pytest.raises(hub.HubError, match="404"):
        hub.pull("nobody/nothing", lambda line: None)


def test_ollamas_files_are_not_ours_to_delete(home):
    source = hub.ModelSource("e:latest", model(home / "x.gguf"), 100, 0.0, "ollama")
    with pytest.raises(ModelFileError, match="ollama rm"):
        hub.remove(source)
    assert (home / "x.gguf").exists()


def test_rm_of_a_link_leaves_what_it_leads_to(home):
    elsewhere = model(home / "elsewhere" / "mine.gguf")
    for link in (home / "lm/m.gguf", home / "hub/models--a--b/snapshots/1/m.gguf"):
        link.parent.mkdir(parents=True)
        link.symlink_to(elsewhere)
        assert hub.remove(hub.ModelSource("m", link, 100)) == 0
        assert not link.is_symlink()
        assert elsewhere.exists()


@pytest.mark.parametrize("name", ["../../x.gguf", "/tmp/x.gguf", "a/../../x.gguf", "..\\x.gguf"])
def test_names_that_lead_out_of_the_cache_are_not_pulled(name):
    assert hub.remote_models("a/b", [(name, 4), ("good.gguf", 4)]) == hub.remote_models(
        "a/b", [("good.gguf", 4)]
    )

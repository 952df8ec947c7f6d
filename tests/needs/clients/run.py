"""Runs each client's script in a virtual environment of its own against a live server.

    python tests/needs/clients/run.py [NAME ...]

The server is `greenroom serve` on a small random model, or GREENROOM_URL if it is set.
Environments are kept under build/clients and used again.
"""

import os
import subprocess
import sys
import tempfile
import urllib.request
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).parent
BUILD = HERE.parents[2] / "build" / "clients"
# script, and what it needs
CLIENTS = {
    "openai": ["openai"],
    "anthropic": ["anthropic"],
    "ollama": ["ollama"],
    "langchain": ["langchain-openai"],
    "litellm": ["litellm"],
    "llm": ["llm"],
    "lm_eval": ["lm-eval[api]"],
}
MODEL = "qwen3-30b-a3b-tiny"


@contextmanager
def server() -> Iterator[str]:
    """The URL of a server."""
    if url := os.environ.get("GREENROOM_URL"):
        yield url
        return
    greenroom = [sys.executable, "-m", "greenroom"]
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder, "tiny.gguf"))
        subprocess.run([*greenroom, "synth", MODEL, file], check=True, stdout=subprocess.DEVNULL)
        command = [*greenroom, "serve", file, "--port", "0", "--context", "2048"]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        try:
            yield next(line.split()[-1] for line in process.stderr if line.startswith("Greenroom"))
        finally:
            process.terminate()
            process.communicate(timeout=60)


def python_of(name: str) -> Path:
    """The interpreter of a client's environment, which is made on first use."""
    folder = BUILD / name
    python = folder / "bin" / "python"
    ready = folder / "ready"
    if not ready.exists():
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *CLIENTS[name]], check=True)
        ready.touch()
    return python


def main(names: list[str]) -> int:
    failed = []
    with server() as url:
        listed = urllib.request.urlopen(url + "/v1/models").read().decode()
        model = listed.split('"id":"')[1].split('"')[0]
        environment = {**os.environ, "GREENROOM_URL": url, "GREENROOM_MODEL": model}
        environment.pop("PYTHONPATH", None)
        for name in names or CLIENTS:
            script = HERE / f"use_{name}.py"
            done = subprocess.run([python_of(name), script], env=environment, check=False)
            failed += [name] if done.returncode else []
    print("all clients are fine" if not failed else f"failed: {', '.join(failed)}")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

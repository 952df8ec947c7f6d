"""Runs the fake engine under uvicorn in a process of its own, for tests of the process."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from conftest import FakeEngine

from greenroom.server.app import create_app
from greenroom.server.launch import Listen, run
from greenroom.server.security import KeyRing
from greenroom.server.settings import ServerSettings

if __name__ == "__main__":
    key_file = Path(sys.argv[1]) if sys.argv[1] != "-" else None
    delay = float(sys.argv[2])
    port = int(sys.argv[3]) if len(sys.argv) > 3 else 0
    certificate, key = map(Path, sys.argv[4:6]) if len(sys.argv) > 4 else (None, None)
    ring = KeyRing(file=key_file)
    app = create_app(
        FakeEngine(delay=delay, reply="0123456789" * 3), ServerSettings(), ring, "fake"
    )
    listen = Listen(
        port=port,
        certificate=certificate,
        key=key,
        log_format="json",
        access_log=False,
        drain_seconds=20,
    )
    run(app, listen, ring, lambda url: print(url, flush=True))

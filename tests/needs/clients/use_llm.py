"""The `llm` command line tool with a model of ours in its configuration."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

url, model = os.environ["GREENROOM_URL"], os.environ["GREENROOM_MODEL"]
with tempfile.TemporaryDirectory() as folder:
    entry = f"- model_id: ours\n  model_name: {model}\n  api_base: {url}/v1\n  api_key_name: none\n"
    entry += "  supports_tools: true\n"
    Path(folder, "extra-openai-models.yaml").write_text(entry)
    environment = {**os.environ, "LLM_USER_PATH": folder, "OPENAI_API_KEY": "none"}
    tool = str(Path(sys.executable).with_name("llm"))
    for extra in ([], ["--no-stream"], ["-T", "llm_version"]):
        command = [tool, "-m", "ours", "-o", "max_tokens", "12", "--key", "none", *extra, "hi"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip()
print("llm: fine")

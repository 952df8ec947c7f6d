"""llama.cpp (xllamacpp) in a process of its own, so that a crash of it is one failed test.

Run as a script: reads a JSON request from stdin, prints a JSON answer as its last line.
"""

import json
import subprocess
import sys
from typing import Any


def complete(model: str, requests: list[dict[str, Any]], seconds: int = 120) -> list[Any]:
    """Answers of `model` to OpenAI requests: completions, or chats where they have messages.

    A request {"tokens": ids, "first": i, "top": n} is answered by the n likeliest next tokens
    behind ids[: i + 1], behind ids[: i + 2] and so on: pairs (ids, logarithms of probability).
    """
    done = subprocess.run(
        [sys.executable, __file__],
        input=json.dumps({"model": model, "requests": requests}),
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    assert done.returncode == 0, f"llama.cpp failed on {model}: {done.stderr[-2000:]}"
    answers: list[Any] = json.loads(done.stdout.splitlines()[-1])
    return answers


def main() -> None:
    """Serves the requests on standard input."""
    import xllamacpp

    job = json.load(sys.stdin)
    params = xllamacpp.CommonParams()
    params.model.path = job["model"]
    params.n_ctx, params.n_parallel, params.n_gpu_layers = 2048, 1, 0
    # Its threads wait for each other by spinning: on a busy machine one is the fastest.
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.warmup = params.fit_params = False
    server = xllamacpp.Server(params)
    answers = [_answer(server, request) for request in job["requests"]]
    print("\n" + json.dumps(answers), flush=True)


def _answer(server: Any, request: dict[str, Any]) -> Any:
    if "messages" in request:
        return server.handle_chat_completions(request)
    if "prompt" in request:
        return server.handle_completions(request)
    tokens, found = request["tokens"], []
    for end in range(request["first"] + 1, len(tokens) + 1):
        asked = {"prompt": tokens[:end], "n_predict": 1, "n_probs": request["top"]}
        answer = server.handle_completions({**asked, "temperature": 0, "cache_prompt": True})
        top = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        found.append(([entry["id"] for entry in top], [entry["logprob"] for entry in top]))
    return found


if __name__ == "__main__":
    main()

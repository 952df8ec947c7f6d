"""Greenroom's own routes, and the document that describes all."""

import re

from greenroom.server import app


def test_health_and_ready(client):
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/ready").status_code == 200
    client.app.state.server.runner.draining = True
    response = client.get("/ready")
    assert response.status_code == 503
    assert response.headers["retry-after"]
    assert client.get("/health").status_code == 200


def test_draining_refuses_work(client):
    client.app.state.server.runner.draining = True
    body = {"messages": [{"role": "user", "content": "x"}]}
    response = client.post("/v1/chat/completions", body)
    assert response.status_code == 503
    assert response.headers["retry-after"]


def test_tokens_round_trip(client):
    found = client.ok("/tokenize", {"prompt": "hé", "return_token_strs": True})
    assert found["tokens"][0] == 256
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
    text = client.ok("/detokenize", {"tokens": found["tokens"][1:]})["prompt"]
    assert text == "hé"
    bare = client.ok("/tokenize", {"prompt": "hé", "add_special_tokens": False})
    assert bare["tokens"] == found["tokens"][1:]


def test_tokenize_renders_messages(client, engine):
    messages = [{"role": "user", "content": "hi"}]
    found = client.ok("/tokenize", {"messages": messages})
    client.ok("/v1/chat/completions", {"messages": messages})
    assert found["tokens"] == engine.prompts[-1]


def test_tokens_outside_the_vocabulary(client):
    assert client.post("/detokenize", {"tokens": [99999]}).status_code == 400
    assert client.post("/v1/completions", {"prompt": [99999]}).status_code == 400


def test_tokenizer_info_is_what_lm_eval_asks_for(client):
    assert client.get("/tokenizer_info").json()["eos_token"] == "<|end|>"


def test_metrics_have_vllms_names(client):
    client.ok("/v1/completions", {"prompt": "x"})
    text = client.get("/metrics").text
    for name in (
        "vllm:time_to_first_token_seconds_count",
        "vllm:inter_token_latency_seconds_bucket",
        "vllm:num_requests_running",
        "vllm:generation_tokens_total",
        "vllm:request_success_total",
        "greenroom:memory_bytes",
    ):
        assert name in text
    assert re.search(r'vllm:generation_tokens_total\{model_name="fake"\} 14\.0', text)
    assert re.search(r'vllm:kv_cache_usage_perc\{model_name="fake"\} 0\.25', text)


def test_placement_shows_every_expert(client):
    found = client.get("/placement").json()
    assert found["loaded"]
    assert [len(row) for row in found["tier"]] == [8, 8]
    assert {part["part"] for part in found["memory"]} == {"experts", "dense", "kv_cache"}


def test_props(client):
    found = client.get("/props").json()
    assert found["limits"]["choices"] == 16
    assert found["loaded"]["fake"]["stats"]["waiting"] == 0


def test_openapi_describes_every_body(client):
    document = client.get("/openapi.json").json()
    for path, methods in document["paths"].items():
        if "post" in methods:
            content = methods["post"]["requestBody"]["content"]["application/json"]
            name = content["schema"]["$ref"].rpartition("/")[2]
            assert name in document["components"]["schemas"], path


def test_unknown_paths_have_json_errors(client):
    assert client.get("/nothing").json()["error"]["type"] == "not_found_error"
    assert client.get("/api/nothing").json()["error"].startswith("GET /api/nothing")
    assert client.get("/v1/chat/completions").status_code == 405


def test_every_router_is_mounted():
    paths = {route.path for module in app.ROUTERS for route in module.router.routes}
    assert {"/v1/messages", "/api/chat", "/v1/responses", "/placement"} <= paths

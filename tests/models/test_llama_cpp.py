"""Logits against llama.cpp (xllamacpp) on float16 files, where its math is the publisher's or
`llama_cpp_math` asks for its own."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from greenroom.gguf import GGUFFile
from greenroom.models import LoadOptions, load_model

from .cases import CASES
from .hf_export import VOCABULARY, Tiny
from .sessions import divergence, one_pass, prompt

xllamacpp = pytest.importorskip("xllamacpp")

TOKENS = prompt(3, 28, VOCABULARY - 1)


def with_tokenizer(tiny: Tiny) -> Tiny:
    """llama.cpp wants a vocabulary: printable characters, a space and an end token."""
    end = VOCABULARY - 1
    tiny.metadata |= {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [chr(33 + i) for i in range(end - 1)] + ["Ġ", "<e>"],
        "tokenizer.ggml.token_type": [1] * end + [3],
        "tokenizer.ggml.merges": ["! !"],
        "tokenizer.ggml.bos_token_id": end,
        "tokenizer.ggml.eos_token_id": end,
        "tokenizer.ggml.add_bos_token": False,
        f"{tiny.architecture}.vocab_size": VOCABULARY,
    }
    return tiny


@contextmanager
def peer(path: Path) -> Iterator[Any]:
    """llama.cpp on one thread with a float32 cache."""
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(path)
    parameters.n_ctx = 256
    parameters.n_parallel = 1
    parameters.n_gpu_layers = 0
    parameters.cpuparams.n_threads = 1
    parameters.cpuparams_batch.n_threads = 1
    parameters.warmup = False
    parameters.fit_params = False
    parameters.verbosity = -1
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    server = xllamacpp.Server(parameters)
    yield server
    del server


def peer_logprobs(server: Any, tokens: list[int]) -> torch.Tensor:
    """(tokens, vocabulary) log-probabilities: a completion of one token behind each prefix."""
    out = torch.full((len(tokens), VOCABULARY), float("nan"))
    for i in range(len(tokens)):
        request = {
            "prompt": tokens[: i + 1],
            "n_predict": 1,
            "n_probs": VOCABULARY,
            "temperature": 0.0,
            "post_sampling_probs": False,
        }
        answer = server.handle_completions(request)
        answer = json.loads(answer) if isinstance(answer, str | bytes) else answer
        for entry in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
            out[i, entry["id"]] = entry["logprob"]
    assert not out.isnan().any()
    return out


@pytest.mark.parametrize(
    "case", ["gpt-oss", "deepseek", "mixtral", "qwen3moe", "olmoe", "phimoe-long"]
)
def test_float16_files_agree_with_llama_cpp(case: str, tmp_path: Path) -> None:
    # llama.cpp loads only OLMoE files with as many key heads as query heads.
    sizes = {"kv_heads": 4} if case == "olmoe" else {}
    tiny = with_tokenizer(CASES[case].make_wide(gain=1.0, **sizes))
    path = tiny.write(tmp_path / "model.gguf", "F16")
    with peer(path) as server:
        expected = peer_logprobs(server, TOKENS)
    for backend in ("reference", "native"):
        with GGUFFile(path) as file:
            model = load_model(file, LoadOptions(backend=backend, threads=2, llama_cpp_math=True))
        worst = divergence(one_pass(model, TOKENS), expected)
        print(f"{case} {backend}: worst KL {worst:.1e}")
        assert worst < 1e-3

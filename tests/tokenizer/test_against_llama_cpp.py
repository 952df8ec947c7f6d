"""The same ids as llama.cpp on random text, special tokens included.

A model of a few kilobytes is built around each vocabulary so that llama.cpp loads it. gpt-4o and
tekken are not here: there llama.cpp approximates the publisher's expression, which we follow.
"""

import json
import random
import unicodedata
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from greenroom.gguf import GGUFFile
from greenroom.tokenizer import Tokenizer

from .vocabularies import published_path

WIDTH = 32
TEXTS = 250
COMMON = "  \n\r\t'sStTlLreABCabcéÉß中ア한ا0123456789!?.,-/$=\u00a0\u0301\u200d"
ARRAYS = {
    "tokenizer.ggml.token_type": gguf.GGUFValueType.INT32,
    "tokenizer.ggml.scores": gguf.GGUFValueType.FLOAT32,
}


def write_model(path: Path, metadata: dict[str, Any]) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(metadata["general.name"])
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    for key, value in metadata.items():
        if key in ARRAYS:
            numbers = [item.item() if hasattr(item, "item") else item for item in value]
            writer.add_key_value(key, numbers, gguf.GGUFValueType.ARRAY, ARRAYS[key])
        elif isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, str) and key.startswith("tokenizer.ggml"):
            writer.add_string(key, value)
        elif key.startswith("tokenizer.ggml"):
            writer.add_uint32(key, int(value))
    rows = {"token_embd": len(metadata["tokenizer.ggml.tokens"])}
    names = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    for name in ("token_embd", *(f"blk.0.{name}" for name in names)):
        matrix = np.zeros((rows.get(name, WIDTH), WIDTH), dtype=np.float16)
        writer.add_tensor(f"{name}.weight", matrix)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(WIDTH, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def random_texts(marks: list[str]) -> Iterator[str]:
    draw = random.Random(0)
    assigned = [c for c in range(1, 0x2FFFF) if unicodedata.category(chr(c)) not in ("Cn", "Cs")]
    for _ in range(TEXTS):
        parts = (
            draw.choice(marks)
            if marks and draw.random() < 0.05
            else chr(draw.choice(assigned))
            if draw.random() < 0.1
            else draw.choice(COMMON)
            for _ in range(draw.randint(1, 30))
        )
        yield "".join(parts)


@pytest.mark.parametrize(
    ("vocabulary", "pre"),
    [
        ("llama-spm", None),
        ("phi-3", None),
        ("gpt-2", None),
        ("gpt-2", "qwen2"),
        ("gpt-2", "deepseek-llm"),
        ("gpt-2", "deepseek-v3"),
        ("gpt-2", "refact"),
        ("gpt-2", "default"),
    ],
)
def test_equal_ids(vocabulary: str, pre: str | None, tmp_path: Path) -> None:
    xllamacpp = pytest.importorskip("xllamacpp")
    with GGUFFile(published_path(vocabulary)) as file:
        names = [k for k in file.metadata if k.startswith("tokenizer.ggml") or k == "general.name"]
        metadata = {name: file.metadata[name] for name in names}
    metadata |= {"tokenizer.ggml.pre": pre} if pre else {}
    write_model(tmp_path / "model.gguf", metadata)
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(tmp_path / "model.gguf")
    parameters.n_ctx, parameters.n_parallel, parameters.warmup = 64, 1, False
    parameters.cpuparams.n_threads = 1
    server = xllamacpp.Server(parameters)
    tokenizer = Tokenizer.from_metadata(metadata)
    marks = [text for text, _, _ in tokenizer.vocabulary.marked][:40]
    for number, text in enumerate(random_texts(marks)):
        body = {"content": text, "add_special": False, "parse_special": number % 2 == 1}
        request = urllib.request.Request(
            server.listening_address + "/tokenize", json.dumps(body).encode()
        )
        with urllib.request.urlopen(request) as answer:
            expected = json.load(answer)["tokens"]
        assert tokenizer.encode(text, parse_special=body["parse_special"]) == expected, ascii(text)

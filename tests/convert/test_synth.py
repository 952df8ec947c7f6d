"""Synthetic files: published sizes and types, sound metadata, the same bytes for the same seed."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from greenroom.convert.synth import Synthesis, write_synthetic
from greenroom.convert.synth_shapes import PUBLISHED, parts_of, shape_of
from greenroom.errors import ModelFileError, UnsupportedModelError
from greenroom.gguf import GGUFFile
from greenroom.tokenizer import Tokenizer

from .llama_cpp import complete

TEXT = "The old house on the hill had 42 windows; déjà vu!\n"


# Bytes of the routed experts and number of tensors, from published files and their formulas.
EXPERT_BYTES = {
    ("gpt-oss-20b", None): 10_152_345_600,
    ("gpt-oss-120b", None): 60_914_073_600,
    ("phi-3.5-moe", None): 24_379_392_000,
    ("phi-3.5-moe", "Q4_K"): 22_649_241_600,
    ("grin-moe", "Q4_0"): 22_649_241_600,
    ("deepseek-moe-16b", None): 9_931_063_296,
    ("deepseek-moe-16b", "Q4_K"): 9_031_385_088,
    ("deepseek-moe-16b", "Q4_0"): 8_408_530_944,
    ("mixtral-8x7b", None): 27_304_919_040,
    ("mixtral-8x7b", "Q4_K"): 25_367_150_592,
    ("qwen3-30b-a3b", None): 17_553_162_240,
    ("qwen3-30b-a3b", "Q4_K"): 16_307_453_952,
}


@pytest.mark.parametrize(("name", "mix"), EXPERT_BYTES)
def test_experts_have_the_published_bytes(name: str, mix: str | None) -> None:
    specs = Synthesis(shape_of(name), mix).specs()
    experts = sum(spec.nbytes for spec in specs if spec.name.endswith("_exps.weight"))
    assert experts == EXPERT_BYTES[name, mix]


@pytest.mark.parametrize(
    ("name", "gib", "types"),
    [
        ("gpt-oss-20b", 11.266, {"F32": 289, "Q8_0": 98, "MXFP4": 72}),
        ("gpt-oss-120b", 59.02, {"F32": 433, "Q8_0": 146, "MXFP4": 108}),
    ],
)
def test_gpt_oss_files_have_the_published_size_and_types(
    name: str, gib: float, types: dict[str, int]
) -> None:
    job = Synthesis(shape_of(name))
    assert job.nbytes() / 2**30 == pytest.approx(gib, abs=0.0006 if gib < 20 else 0.005)
    assert Counter(spec.type.name for spec in job.specs()) == types


# Billions of parameters as published.
@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("deepseek-moe-16b", 16.375),
        ("phi-3.5-moe", 41.87),
        ("gpt-oss-20b", 20.9),
        ("mixtral-8x7b", 46.7),
        ("qwen3-30b-a3b", 30.5),
    ],
)
def test_parameters_are_the_published_number(name: str, parameters: float) -> None:
    count = sum(int(np.prod(part.shape)) for part in parts_of(shape_of(name)))
    assert count / 1e9 == pytest.approx(parameters, rel=0.002)


def test_published_vocabularies_have_their_ids_and_merges() -> None:
    metadata = Synthesis(shape_of("gpt-oss-20b")).metadata()
    tokens, merges = (metadata[f"tokenizer.ggml.{key}"] for key in ("tokens", "merges"))
    assert len(tokens) == len(set(tokens)) == 201088
    assert len(merges) == 446189
    assert tokens[200005] == "<|channel|>"
    assert metadata["tokenizer.ggml.eos_token_id"] == 200002
    known = set(tokens)
    assert all({*merge.split(" "), merge.replace(" ", "")} <= known for merge in merges)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("synth")
    paths = {name: folder / f"{name}-tiny.gguf" for name in PUBLISHED}
    for name, path in paths.items():
        write_synthetic(Synthesis(shape_of(name + "-tiny")), path)
    return paths


@pytest.mark.parametrize("name", PUBLISHED)
def test_tiny_files_have_sound_numbers_and_a_working_tokenizer(
    tiny: dict[str, Path], name: str
) -> None:
    with GGUFFile(tiny[name]) as file:
        assert file.nbytes < 16e6
        for tensor in file.tensors.values():
            values = tensor.dequantize()
            assert np.isfinite(values).all(), tensor.name
            assert 0 < np.abs(values).max() < 40, tensor.name
        tokenizer = Tokenizer.from_gguf(file)
    ids = tokenizer.encode(TEXT)
    assert tokenizer.decode(ids) == TEXT
    assert len(ids) < 0.75 * len(TEXT)
    assert tokenizer.eog_ids


@pytest.mark.parametrize("name", PUBLISHED)
def test_llama_cpp_loads_tiny_files(tiny: dict[str, Path], name: str) -> None:
    request = {"max_tokens": 4, "temperature": 0, "ignore_eos": True}
    plain, chat = complete(
        str(tiny[name]),
        [
            {"prompt": TEXT, **request},
            {"messages": [{"role": "user", "content": TEXT}], **request},
        ],
    )
    assert plain["usage"]["completion_tokens"] == 4
    assert chat["usage"]["completion_tokens"] == 4
    with GGUFFile(tiny[name]) as file:
        ids = Tokenizer.from_gguf(file).encode(TEXT, add_special=True)
    assert plain["usage"]["prompt_tokens"] == len(ids)


def test_the_seed_decides_the_bytes_and_threads_do_not(tmp_path: Path) -> None:
    shape = shape_of("qwen3-30b-a3b-tiny", layers=2)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_synthetic(Synthesis(shape, seed=seed), tmp_path / name)
    a, b, c = ((tmp_path / name).read_bytes() for name in "abc")
    assert a == b
    assert a != c


def popularity(path: Path, tokens: int = 4000) -> np.ndarray:
    """(layers, experts) how often random hidden states are sent to each of the 32 experts, the
    most popular ones first."""
    x = np.random.default_rng(0).standard_normal((2880, tokens), np.float32)
    shares = []
    with GGUFFile(path) as file:
        for name, tensor in file.tensors.items():
            if name.endswith("ffn_gate_inp.weight"):
                logits = tensor.data().reshape(-1).view(np.float32).reshape(32, 2880) @ x
                chosen = np.argsort(-logits, axis=0)[:4]
                shares.append(np.bincount(chosen.ravel(), minlength=32) / chosen.size)
    return np.array(shares)


def test_a_skew_sends_half_of_the_routes_to_a_quarter_of_the_experts(tmp_path: Path) -> None:
    shape = replace(shape_of("gpt-oss-20b", layers=2), vocabulary=1000, width=32)
    write_synthetic(Synthesis(shape), tmp_path / "even.gguf")
    write_synthetic(Synthesis(shape, skew=0.5), tmp_path / "skewed.gguf")
    even, skewed = popularity(tmp_path / "even.gguf"), popularity(tmp_path / "skewed.gguf")
    top = -np.sort(-skewed, axis=1)[:, :8].sum(1)
    assert (-np.sort(-even, axis=1)[:, :8].sum(1) < 0.31).all()
    assert ((top > 0.46) & (top < 0.56)).all()
    assert (skewed[0].argsort() != skewed[1].argsort()).any()  # every layer has its own favourites


def test_fewer_layers_are_the_first_of_more(tmp_path: Path) -> None:
    for layers in (2, 3):
        job = Synthesis(shape_of("gpt-oss-20b-tiny", layers))
        write_synthetic(job, tmp_path / f"{layers}.gguf")
    with GGUFFile(tmp_path / "2.gguf") as two, GGUFFile(tmp_path / "3.gguf") as three:
        assert two.metadata["gpt-oss.block_count"] == 2
        for name, tensor in two.tensors.items():
            assert (tensor.data() == three.tensors[name].data()).all()


@pytest.mark.parametrize("mix", ["Q4_0", "Q6_K", "F16", "mxfp4", "IQ4_XS", "Q8_0"])
def test_every_mix_falls_back_where_rows_are_odd(tmp_path: Path, mix: str) -> None:
    path = tmp_path / "mix.gguf"
    write_synthetic(Synthesis(shape_of("deepseek-moe-16b-tiny", 2), mix), path)
    with GGUFFile(path) as file:
        down = file.tensors["blk.1.ffn_down_exps.weight"].type.name
    assert down == {"Q6_K": "Q8_0", "mxfp4": "MXFP4", "IQ4_XS": "IQ4_NL"}.get(mix, mix)


def test_what_cannot_be_made_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="no shape 'gpt-5'; choose one of gpt-oss-20b"):
        shape_of("gpt-5")
    with pytest.raises(UnsupportedModelError, match="give 2 or more"):
        shape_of("deepseek-moe-16b", layers=1)
    with pytest.raises(UnsupportedModelError, match="no type 'Q9'"):
        Synthesis(shape_of("mixtral-8x7b-tiny"), "Q9").specs()
    huge = Synthesis(shape_of("gpt-oss-120b", layers=2_000))
    with pytest.raises(ModelFileError, match=r"GiB are needed, but only .* free"):
        write_synthetic(huge, tmp_path / "huge.gguf")
    assert not list(tmp_path.iterdir())

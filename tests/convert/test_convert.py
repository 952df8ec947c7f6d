"""Every class of checkpoint becomes a file whose logits are the reference's."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from greenroom.convert.convert import Conversion, convert
from greenroom.convert.legacy import merge_experts
from greenroom.errors import GreenroomError, ModelFileError, UnsupportedModelError
from greenroom.gguf import GGMLType, GGUFFile, TensorSpec, write_gguf
from greenroom.models import LoadOptions, load_model

from ..models.cases import CASES
from ..models.families import legacy
from ..models.hf_export import VOCABULARY, Tiny
from ..models.sessions import one_pass, prompt, relative_error
from . import checkpoints

logging.getLogger("transformers").setLevel(logging.ERROR)

Make = Callable[[int, Path], tuple[Tiny, Path]]


def plain(case: str, **changes: Any) -> Make:
    def make(seed: int, folder: Path) -> tuple[Tiny, Path]:
        tiny = CASES[case].make(seed)
        return tiny, checkpoints.save(tiny, folder, **changes)

    return make


CLASSES: dict[str, Make] = {
    "GptOss": plain("gpt-oss"),
    "GptOss BF16": checkpoints.bfloat16(plain("gpt-oss")),
    "GptOss MXFP4": checkpoints.gpt_oss_mxfp4,
    "GptOss OpenAI": checkpoints.gpt_oss_original,
    "GptOss OpenAI BF16": checkpoints.bfloat16(checkpoints.gpt_oss_original_plain),
    "PhiMoE": plain("phi-3.5-moe", architectures=["PhiMoEForCausalLM"]),
    "PhiMoE window": plain("phimoe-window"),
    "GRIN-MoE": checkpoints.grin,
    "Deepseek": checkpoints.deepseek,
    "Mixtral": plain("mixtral"),
    "Qwen2Moe": plain("qwen2moe"),
    "Qwen3Moe": plain("qwen3moe"),
    "Olmoe": plain("olmoe"),
    "GraniteMoe": plain("granitemoe"),
    "GraniteMoeShared": plain("granitemoe-shared"),
    "Llama": plain("llama"),
    "Llama plain": plain("llama-plain"),
    "Qwen3": plain("qwen3-yarn"),
    "Qwen2": plain("qwen2"),
}
OPTIONS = {"PhiMoE": {"context_length": 4096}}


def logits(path: Path, tokens: list[int], **options: Any) -> torch.Tensor:
    with GGUFFile(path) as file:
        model = load_model(file, LoadOptions(backend="reference", **options))
        return one_pass(model, tokens)


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("name", CLASSES)
def test_logits_of_a_converted_checkpoint_equal_the_reference(
    tmp_path: Path, name: str, seed: int
) -> None:
    tiny, folder = CLASSES[name](seed, tmp_path / "checkpoint")
    out = tmp_path / "out.gguf"
    convert(Conversion(folder), out)
    tokens = prompt(seed, 37, VOCABULARY)
    found = logits(out, tokens, **OPTIONS.get(name, {}))
    assert relative_error(found, tiny.logits(tokens)) < 1e-4
    assert [p.name for p in tmp_path.iterdir() if p != folder] == ["out.gguf"]


def test_shards_in_bfloat16_stay_what_they_are(tmp_path: Path) -> None:
    tiny = CASES["qwen3moe"].make(1)
    tiny.model.to(torch.bfloat16)
    folder = tmp_path / "checkpoint"
    tiny.model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    convert(Conversion(folder), tmp_path / "out.gguf")
    # The reference keeps its float32 frequencies, which `to` would round too.
    tiny = CASES["qwen3moe"].make(1)
    for p in tiny.model.parameters():
        p.data = p.data.bfloat16().float()
    tokens = prompt(1, 20, VOCABULARY)
    with GGUFFile(tmp_path / "out.gguf") as file:
        assert file.tensors["blk.0.ffn_up_exps.weight"].type == GGMLType.BF16
        assert file.tensors["blk.0.ffn_gate_inp.weight"].type == GGMLType.F32
        assert file.metadata["general.file_type"] == 32
    assert relative_error(logits(tmp_path / "out.gguf", tokens), tiny.logits(tokens)) < 1e-4


def test_types_and_overrides(tmp_path: Path) -> None:
    _, folder = checkpoints.gpt_oss_mxfp4(1, tmp_path / "checkpoint")
    convert(Conversion(folder, "Q8_0", ("attn_v=F16",)), tmp_path / "out.gguf")
    with GGUFFile(tmp_path / "out.gguf") as file:
        types = {name: tensor.type.name for name, tensor in file.tensors.items()}
    assert types["blk.0.ffn_down_exps.weight"] == "MXFP4"
    assert types["blk.0.attn_q.weight"] == types["output.weight"] == "Q8_0"
    assert types["blk.0.attn_v.weight"] == "F16"
    assert types["blk.0.ffn_gate_inp.weight"] == types["blk.0.attn_norm.weight"] == "F32"


def test_experts_one_by_one_are_merged(tmp_path: Path) -> None:
    tiny = CASES["mixtral"].make(1)
    tiny.write(tmp_path / "merged.gguf")
    tiny.write(tmp_path / "split.gguf", overrides=legacy(tiny))
    merge_experts(tmp_path / "split.gguf", tmp_path / "again.gguf")
    with GGUFFile(tmp_path / "merged.gguf") as one, GGUFFile(tmp_path / "again.gguf") as two:
        assert set(one.tensors) == set(two.tensors)
        assert dict(one.metadata.raw_values()) == dict(two.metadata.raw_values())
        for name, tensor in one.tensors.items():
            assert tensor.ne == two.tensors[name].ne
            assert (tensor.data() == two.tensors[name].data()).all()
    with pytest.raises(UnsupportedModelError, match="merged already"):
        merge_experts(tmp_path / "merged.gguf", tmp_path / "x.gguf")


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    tensors = [
        TensorSpec.of(f"blk.0.ffn_up.{e}.weight", GGMLType.F32, torch.ones(2, 4).numpy())
        for e in (0, 2)
    ]
    write_gguf(tmp_path / "split.gguf", {"general.architecture": "llama"}, tensors)
    with pytest.raises(ModelFileError, match=r"an expert of blk\.0\.ffn_up_exps\.weight"):
        merge_experts(tmp_path / "split.gguf", tmp_path / "out.gguf")


def _without(name: str) -> Callable[[Path], None]:
    return lambda folder: checkpoints.rename(
        folder, lambda tensors: {k: v for k, v in tensors.items() if k != name}
    )


def _with_one_more(folder: Path) -> None:
    extra = {"model.layers.0.self_attn.rank.weight": torch.ones(2, 2)}
    checkpoints.rename(folder, lambda tensors: tensors | extra)


def _truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing": (_without("model.norm.weight"), "tensor model.norm.weight is missing"),
    "left over": (_with_one_more, "self_attn.rank.weight is not part of"),
    "truncated": (_truncate, "outside the file"),
    "class": (
        lambda folder: checkpoints.change_config(folder, architectures=["BertModel"]),
        "BertModel.*is not implemented",
    ),
    "rope": (
        lambda folder: checkpoints.change_config(
            folder, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
        ),
        "rotary scaling 'dynamic'",
    ),
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json: cannot be read"),
    "no json": (lambda folder: _write(folder, "{"), "this is not JSON"),
    "deep json": (lambda folder: _write(folder, '{"a":' + "[" * 100_000), "this is not JSON"),
    "no heads": (
        lambda folder: checkpoints.change_config(folder, num_attention_heads=0),
        "num_attention_heads = 0 must be 1 or more",
    ),
    "tokenizer": (
        lambda folder: _write(folder, '{"model": 3}', "tokenizer.json"),
        "tokenizer's files are damaged",
    ),
    "missing shard": (lambda folder: _index(folder, '{"a": "b.safetensors"}'), "b.safetensors is"),
    "half a shard": (
        lambda folder: _half_downloaded(folder),
        "model-00001-of-00002.safetensors is missing",
    ),
    "shard elsewhere": (lambda folder: _index(folder, '{"a": "../b"}'), "no index"),
    "shards without names": (lambda folder: _index(folder, '{"a": {}}'), "no index"),
    "no layers": (
        lambda folder: checkpoints.change_config(folder, num_hidden_layers=None),
        "num_hidden_layers = None must be an integer",
    ),
}


def _write(folder: Path, text: str, name: str = "config.json") -> None:
    (folder / name).write_text(text)


def _index(folder: Path, shards: str) -> None:
    _write(folder, f'{{"weight_map": {shards}}}', "model.safetensors.index.json")


def _half_downloaded(folder: Path) -> None:
    name = "model-00001-of-00002.safetensors"
    (folder / "model.safetensors").rename(folder / f"{name}.incomplete")
    _index(folder, f'{{"a": "{name}"}}')


def header(text: str) -> bytes:
    return len(text).to_bytes(8, "little") + text.encode()


def one_tensor(shape: str, offsets: str) -> bytes:
    return header(f'{{"a": {{"dtype": "F32", "shape": {shape}, "data_offsets": {offsets}}}}}')


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_cannot_be_converted_is_said_in_one_line(tmp_path: Path, damage: str) -> None:
    folder = checkpoints.save(CASES["mixtral"].make(1), tmp_path / "checkpoint")
    apply, message = DAMAGES[damage]
    apply(folder)
    with pytest.raises(GreenroomError, match=message) as caught:
        convert(Conversion(folder), tmp_path / "out.gguf")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize(
    "start",
    [
        b"",
        b"\xff" * 8,
        header("null"),
        header("[" * 100_000),
        one_tensor("[4294967296, 4294967296]", "[0, 0]"),  # 0 in 64 bits
        one_tensor("[1e999]", "[0, 4]"),
        one_tensor("[-1, -1]", "[0, 4]"),
        one_tensor("[1]", "[-8, -4]"),
        one_tensor("[1]", "[0]"),
    ],
    ids=range(9),
)
def test_damaged_headers_are_refused(tmp_path: Path, start: bytes) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    (tmp_path / "model.safetensors").write_bytes(start)
    with pytest.raises(ModelFileError, match=r"download it again|mmap"):
        convert(Conversion(tmp_path), tmp_path / "out.gguf")

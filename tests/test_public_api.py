"""What users may rely on: the public names, and how they are called."""

import inspect
import subprocess
import sys

import pytest

import greenroom

NAMES = {
    "BudgetError",
    "ChatTemplateError",
    "Completion",
    "ContextLengthError",
    "EngineClosedError",
    "EngineConfig",
    "GGUFFile",
    "GreenroomError",
    "LLM",
    "ModelFileError",
    "NativeError",
    "Placement",
    "RequestError",
    "SamplingParams",
    "TokenOutput",
    "Tokenizer",
    "TokenizerError",
    "UnsupportedModelError",
    "__version__",
    "plan",
}

PARAMETERS = {
    "plan": ["path", "settings"],
    "LLM": ["path", "progress", "settings"],
    "LLM.generate": ["self", "prompts", "params"],
    "LLM.stream": ["self", "prompt", "params"],
    "LLM.chat": ["self", "messages", "params", "template"],
    "LLM.logits": ["self", "tokens"],
    "LLM.embed": ["self", "tokens"],
    "LLM.close": ["self"],
    "SamplingParams": [
        "max_tokens",
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "presence_penalty",
        "frequency_penalty",
        "repetition_penalty",
        "logit_bias",
        "seed",
        "stop",
        "stop_token_ids",
        "ignore_eos",
        "logprobs",
        "prompt_logprobs",
    ],
    "EngineConfig": [
        "context_length",
        "max_sequences",
        "prefill_chunk",
        "block_size",
        "cache_tokens",
        "prefix_cache",
        "prefix_ram",
        "kv_type",
        "threads",
        "backend",
        "vram",
        "mmap",
        "ram",
        "trace",
    ],
    "Completion": [
        "text",
        "token_ids",
        "finish_reason",
        "prompt_tokens",
        "cached_tokens",
        "outputs",
    ],
    "TokenOutput": [
        "token_id",
        "text",
        "logprob",
        "top_logprobs",
        "finish_reason",
        "time",
        "prompt_logprobs",
        "cached_tokens",
    ],
    "GGUFFile": ["path"],
    "Tokenizer.from_gguf": ["source"],
    "Tokenizer.encode": ["self", "text", "add_special", "parse_special"],
    "Tokenizer.decode": ["self", "ids", "skip_special"],
}


def test_the_names_are_these() -> None:
    assert set(greenroom.__all__) == NAMES
    assert set(dir(greenroom)) >= NAMES


@pytest.mark.parametrize("name", sorted(NAMES))
def test_every_name_can_be_had(name: str) -> None:
    assert getattr(greenroom, name) is not None


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_keep_their_names_and_order(name: str) -> None:
    value: object = greenroom
    for part in name.split("."):
        value = getattr(value, part)
    assert list(inspect.signature(value).parameters) == PARAMETERS[name]


@pytest.mark.parametrize("name", sorted(n for n in NAMES if n.endswith("Error")))
def test_all_errors_have_one_root(name: str) -> None:
    assert issubclass(getattr(greenroom, name), greenroom.GreenroomError)


def test_importing_is_cheap() -> None:
    code = "import sys, greenroom; print('torch' in sys.modules, 'numpy' in sys.modules)"
    seen = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert seen.stdout.split() == ["False", "False"]


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nonsense"):
        _ = greenroom.nonsense


def test_a_plan_of_a_file(tmp_path) -> None:
    from greenroom.convert.synth import Synthesis, write_synthetic
    from greenroom.convert.synth_shapes import shape_of

    path = tmp_path / "m.gguf"
    write_synthetic(Synthesis(shape_of("gpt-oss-20b-tiny")), path)
    placement = greenroom.plan(path, vram=0)
    assert (placement.backend, placement.slots) == ("native", 0)
    with pytest.raises(greenroom.RequestError, match="much"):
        greenroom.plan(path, vram="much")

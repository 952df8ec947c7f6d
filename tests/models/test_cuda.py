"""The cuda backend against the reference: on a GPU, or under Triton's interpreter."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from greenroom.errors import BudgetError
from greenroom.gguf import GGUFFile
from greenroom.models import LoadOptions, load_model

from .cases import CASES
from .conftest import Loader
from .hf_export import VOCABULARY
from .sessions import Session, divergence, one_pass, prompt, relative_error

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"
DEVICE = "cuda" if GPU else "cpu"
# A GPU rounds operands of products to 11 bits, the interpreter rounds nothing.
CLOSE = 2e-2 if GPU else 1e-4

# Sinks and windows, LayerNorm and biases, shared experts and adjacent pairs, norms of heads.
FAMILIES = ("gpt-oss", "phimoe-window", "deepseek", "qwen3moe")


def of_both(load: Loader, case: str, type: str = "F32") -> tuple:
    _, wanted = load(case, type=type)
    _, model = load(case, type=type, backend="cuda", device=DEVICE)
    return wanted, model


@pytest.mark.parametrize("case", FAMILIES)
def test_chunks_and_decode_equal_the_reference(load: Loader, case: str) -> None:
    wanted, model = of_both(load, case)
    tokens = prompt(4, 26, VOCABULARY)
    session, start, parts = Session(model), 0, []
    for size in (19, 3, 1, 1, 2):
        parts.append(session.step([(0, tokens[start : start + size])]).cpu())
        start += size
    assert relative_error(torch.cat(parts), one_pass(wanted, tokens)) < CLOSE


@pytest.mark.parametrize("case", ["gpt-oss", "qwen2moe"])
def test_batched_equals_the_reference(load: Loader, case: str) -> None:
    wanted, model = of_both(load, case)
    prompts = [prompt(i, length, VOCABULARY) for i, length in enumerate((9, 1, 12))]
    alone = [one_pass(wanted, tokens) for tokens in prompts]
    session = Session(model, sequences=3)
    first = session.step([(0, prompts[0][:8]), (2, prompts[2][:11])]).cpu()
    second = session.step([(2, prompts[2][11:]), (0, prompts[0][8:]), (1, prompts[1])]).cpu()
    assert relative_error(first[:8], alone[0][:8]) < CLOSE
    assert relative_error(first[8:], alone[2][:11]) < CLOSE
    assert relative_error(second, torch.cat([alone[2][11:], alone[0][8:], alone[1]])) < CLOSE


@pytest.mark.parametrize("case", ["mixtral", "olmoe", "granitemoe", "qwen3"])
def test_other_routing_rules_equal_the_reference(load: Loader, case: str) -> None:
    wanted, model = of_both(load, case)
    tokens = prompt(5, 6, VOCABULARY)
    assert relative_error(one_pass(model, tokens).cpu(), one_pass(wanted, tokens)) < CLOSE


@pytest.mark.parametrize(("case", "type"), [("gpt-oss", "Q8_0"), ("deepseek", "BF16")])
def test_quantised_files_stay_close_to_the_reference(case: str, type: str, tmp_path: Path) -> None:
    """With a half-precision cache; both backends read the same weights."""
    path = CASES[case].make_wide(0.7).write(tmp_path / "model.gguf", type)
    options = {"threads": 2} | CASES[case].options
    with GGUFFile(path) as file:
        wanted = load_model(file, LoadOptions(backend="reference", **options))
        model = load_model(file, LoadOptions(backend="cuda", device=DEVICE, **options))
    tokens = prompt(6, 20, VOCABULARY)
    session = Session(model, dtype=torch.float16)
    found = torch.cat([session.step([(0, tokens[:18])]), session.step([(0, tokens[18:])])]).cpu()
    assert divergence(found, one_pass(wanted, tokens)) < 1e-3


def test_what_is_on_the_device_is_not_brought_again() -> None:
    from greenroom.layers.cuda_backend import CudaBackend  # Triton, once it is told how to run

    class There:
        device = torch.device("cuda:0")

    for mine in ("cuda", "cuda:0"):
        backend = SimpleNamespace(device=torch.device(mine))
        assert CudaBackend.bring(backend, here := There()) is here
    backend = SimpleNamespace(device=torch.device("cpu"))
    assert CudaBackend.bring(backend, row := torch.ones(3)) is row


def test_memory_is_booked(load: Loader) -> None:
    _, model = load("deepseek", backend="cuda", device=DEVICE)
    ledger = model.backend.bench.ledger
    before = ledger.parts["cache"]
    caches = model.new_caches([2], 4, torch.float16)
    held = sum(cache.k.nbytes + cache.v.nbytes for cache in caches)
    assert ledger.parts["cache"] == before + held
    del caches
    assert ledger.parts["cache"] == before
    memory = model.memory()
    assert ledger.parts["dense"] == memory["dense.vram"] + memory["output.vram"]


def test_too_small_a_budget_names_the_part(load: Loader) -> None:
    with pytest.raises(BudgetError, match=r"workspace needs 64\.0 MiB .* budget of 1\.0 MiB"):
        load("qwen3", backend="cuda", device=DEVICE, vram=1 << 20)


def test_what_loads_tells_when_the_gpu_is_made_ready(load: Loader, monkeypatch) -> None:
    from greenroom.experts.tiers import Tiers

    complete, told = Tiers.complete, []

    def completed(tiers: Tiers) -> None:
        told.append("complete")
        complete(tiers)

    monkeypatch.setattr(Tiers, "complete", completed)
    tell = {
        "progress": lambda done, total: told.append("all" if done == total else "some"),
        "preparing": lambda: told.append("preparing"),
    }
    load("gpt-oss", backend="cuda", device=DEVICE, layers_on_gpu=1, **tell)
    assert told[-3:] == ["all", "preparing", "complete"]
    assert told.count("preparing") == 1
    for backend in ("native", "reference"):
        told.clear()
        load("gpt-oss", backend=backend, **tell)
        assert told[-1] == "all"


@pytest.mark.parametrize(
    ("case", "layers", "head"),
    [("gpt-oss", 1, True), ("deepseek", 1, False), ("gpt-oss", 0, True), ("deepseek", 2, False)],
)
def test_layers_on_both_processors_equal_the_reference(
    load: Loader, case: str, layers: int, head: bool
) -> None:
    _, wanted = load(case)
    split = {"layers_on_gpu": layers, "head_on_gpu": head}
    _, model = load(case, backend="cuda", device=DEVICE, **split)
    assert model.mixed
    tokens = prompt(4, 12, VOCABULARY)
    session = Session(model)
    parts = [session.step([(0, tokens[:9])]), *(session.step([(0, [t])]) for t in tokens[9:])]
    found = torch.cat([part.cpu() for part in parts])
    assert relative_error(found, one_pass(wanted, tokens)) < CLOSE
    memory = model.memory()
    assert ("output.vram" in memory) == head
    assert ("dense.vram" in memory) == (layers > 0 or head)
    assert "dense" in memory or layers == len(model.blk)


def test_a_step_without_outputs_crosses_the_border(load: Loader) -> None:
    _, model = load("gpt-oss", backend="cuda", device=DEVICE, layers_on_gpu=1)
    session = Session(model)
    batch = session.batch([(0, [3, 4, 5])])
    silent = type(batch)(
        **{name: getattr(batch, name) for name in batch.__slots__}
        | {"output_rows": torch.empty(0, dtype=torch.int64)}
    )
    assert model.forward(silent, session.caches).shape == (0, VOCABULARY)

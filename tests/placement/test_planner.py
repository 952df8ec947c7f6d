"""Sizes as people write them, the choice of a backend, and budgets against what gets allocated."""

import gc
import os
import weakref
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from greenroom import native
from greenroom.convert.synth import Synthesis, write_synthetic
from greenroom.convert.synth_shapes import shape_of
from greenroom.errors import BudgetError, RequestError
from greenroom.gguf import GGUFFile
from greenroom.layers.batch import Batch, KVGroup
from greenroom.layers.ledger import Ledger
from greenroom.models import LoadOptions, load_model
from greenroom.models.registry import read_config
from greenroom.placement.budget import parse_size
from greenroom.placement.hardware import Gpu, Hardware, probe
from greenroom.placement.machine import container_free
from greenroom.placement.placement import Placement
from greenroom.placement.planner import Wish, place
from greenroom.placement.sizes import Sizes, step_bytes

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

GIB = 1 << 30
NO_GPU = Hardware(None, "PyTorch finds no CUDA GPU")
BIG = Hardware(Gpu("a GPU", 70 * GIB, 80 * GIB))


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("6GiB", 6 * GIB),
        ("1.5 G", 3 * GIB // 2),
        ("2MB", 2_000_000),
        ("0", 0),
        (7, 7),
        ("max", None),
    ],
)
def test_sizes(text, size) -> None:
    assert parse_size(text, "vram") == size


def test_max_is_no_number() -> None:
    assert parse_size("Max", "vram") is None


@pytest.mark.parametrize("text", ["", "-1", "six", "6 apples", -3, True, "1e9"])
def test_a_wrong_size_is_refused_by_name(text) -> None:
    with pytest.raises(RequestError, match="vram must be a size") as caught:
        parse_size(text, "vram")
    assert caught.value.field == "vram"


@pytest.fixture(
    scope="module", params=["gpt-oss-20b-tiny", "deepseek-moe-16b-tiny", "qwen3-30b-a3b-tiny"]
)
def file(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("synth") / "model.gguf"
    write_synthetic(Synthesis(shape_of(request.param, 2)), path)
    with GGUFFile(path) as opened:
        yield opened


def placed(file, hardware=BIG, backend="auto", vram=None, named=None) -> Placement:
    named = vram is not None if named is None else named
    wish = Wish(backend=backend, vram=vram, named=named, chunk=64, sequences=2)
    return place(file.tensors, read_config(file), wish, hardware)


def test_auto_takes_the_gpu_if_there_is_one(file) -> None:
    found = placed(file)
    assert found.backend == "cuda"
    assert "a GPU" in found.reason
    assert found.layers_on_gpu == 2
    assert found.head_on_gpu
    assert found.slot_bytes + sum(found.parts.values()) < found.vram < 70 * GIB


def test_the_cpu_is_taken_with_its_reason(file) -> None:
    assert placed(file, NO_GPU) == Placement(
        "native", "computing on the CPU: PyTorch finds no CUDA GPU", layers=2
    )
    assert placed(file, vram=0).backend == "native"
    assert placed(file, backend="reference").cache_room is None
    full = Hardware(Gpu("a full GPU", 300 << 20, 80 * GIB))
    assert placed(file, full).backend == "native"
    assert "a full GPU" in placed(file, full).reason


@pytest.mark.parametrize(
    ("hardware", "backend", "vram", "complaint"),
    [
        (NO_GPU, "auto", GIB, "no GPU can be used: PyTorch finds"),
        (NO_GPU, "cuda", None, "no GPU can be used: PyTorch finds"),
        (BIG, "native", GIB, "native backend uses no VRAM"),
        (BIG, "cuda", 0, "needs VRAM"),
    ],
)
def test_what_cannot_be_is_refused(file, hardware, backend, vram, complaint) -> None:
    with pytest.raises(RequestError, match=complaint):
        placed(file, hardware, backend, vram)


def test_a_budget_too_small_computes_on_the_cpu_unless_the_gpu_was_named(file) -> None:
    assert "hold not even one layer" in placed(file, vram=1 << 20).reason
    with pytest.raises(BudgetError, match="hold not even one layer"):
        placed(file, backend="cuda", vram=1 << 20)
    with pytest.raises(BudgetError, match="only 71680 MiB of a GPU are free"):
        placed(file, vram=71 * GIB)


def test_planned_bytes_are_those_that_get_booked(file, monkeypatch) -> None:
    booked, book = [], Ledger.book

    def note(ledger: Ledger, part: str, nbytes: int) -> None:
        book(ledger, part, nbytes)
        booked.append((part, nbytes))

    monkeypatch.setattr(Ledger, "book", note)
    plan = placed(file)
    sizes = Sizes.of(file.tensors, read_config(file))
    for layers, head in ((2, True), (1, True), (1, False)):
        options = LoadOptions(
            backend="cuda", device=DEVICE, pool=native.lib().Pool(1), layers_on_gpu=layers,
            head_on_gpu=head, scratch_bytes=plan.scratch,
        )  # fmt: skip
        booked.clear()
        model = load_model(file, options)
        ledger = model.blk[-1].backend.bench.ledger
        assert ledger.parts["dense"] == sum(sizes.layers[2 - layers :]) + sizes.head * head
        assert ledger.parts["workspace"] == plan.scratch
        tensors = (*sizes.tensors[2 - layers : 2], *([sizes.tensors[-1]] if head else []))
        dense = sorted(nbytes for part, nbytes in booked if part == "dense")
        assert dense == sorted(n for part in tensors for n in part)
        assert model.memory()["experts"] == sizes.experts
        caches = model.new_caches([4] * len(model.kv_groups), 32, torch.float16)
        assert ledger.parts["cache"] == sum(c.k.nbytes + c.v.nbytes for c in caches[2 - layers :])


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors made within it that are alive, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        known = {t.untyped_storage()._cdata for t in _tensors((args, kwargs))}
        for storage in (t.untyped_storage() for t in _tensors(found)):
            key = storage._cdata
            if key not in known | self.known:
                self.known.add(key)
                self.now += storage.nbytes()
                if self.now > self.peak:  # the interpreter leaves cycles, a device does not
                    gc.collect()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.gone, key, storage.nbytes())
        return found

    def gone(self, key: int, nbytes: int) -> None:
        self.known.discard(key)
        self.now -= nbytes


def _tensors(tree) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def whole(tokens: int, groups: int) -> Batch:
    """One sequence in one step, without logits."""
    table = torch.arange(-(-tokens // 32), dtype=torch.int32)[None]
    return Batch(
        tokens=torch.arange(tokens) % 300,
        positions=torch.arange(tokens),
        query_starts=torch.tensor([0, tokens], dtype=torch.int32),
        context_lengths=torch.tensor([tokens], dtype=torch.int32),
        groups=(KVGroup(table, torch.arange(tokens)),) * groups,
        output_rows=torch.tensor([], dtype=torch.int64),
    )


@pytest.fixture(params=["gpt-oss-20b-tiny", "qwen3-30b-a3b-tiny"])
def few_experts(request, tmp_path):
    """Of as few experts as a token uses, since the interpreter takes its time for each."""
    path, shape = tmp_path / "model.gguf", shape_of(request.param, 2)
    write_synthetic(Synthesis(replace(shape, experts=shape.used)), path)
    with GGUFFile(path) as opened:
        yield opened


@pytest.mark.skipif(DEVICE == "cuda", reason="counts what lives in RAM")
def test_a_step_takes_no_more_than_was_planned(few_experts) -> None:
    """Each further token of a streamed step; what does not grow with it has other parts."""
    file, config = few_experts, read_config(few_experts)
    model = load_model(file, LoadOptions(
        backend="cuda", device=DEVICE, pool=native.lib().Pool(1), staging_bytes=8 << 20
    ))  # fmt: skip
    peaks, few, many = [], 33, 45
    for tokens in (few, many):
        groups = len(model.kv_groups)
        caches = model.new_caches([4] * groups, 32, torch.float32)
        with LiveBytes() as live:
            model.forward(whole(tokens, groups), caches)
        peaks.append(live.peak)
    planned = step_bytes(config, many) - step_bytes(config, few)
    assert 0.5 * planned < peaks[1] - peaks[0] <= planned


def test_what_a_closed_model_left_is_given_back_before_free_vram_is_asked_for(monkeypatch) -> None:
    held = [3 * GIB]
    cuda = {
        "is_available": lambda: True,
        "get_device_capability": lambda: (9, 0),
        "get_device_name": lambda: "a GPU",
        "empty_cache": held.clear,
        "mem_get_info": lambda: (8 * GIB - sum(held), 8 * GIB),
    }
    for name, function in cuda.items():
        monkeypatch.setattr(torch.cuda, name, function)
    monkeypatch.setattr("greenroom.placement.hardware._DRIVERS", (os.devnull,))
    assert probe() == Hardware(Gpu("a GPU", 8 * GIB, 8 * GIB))


@pytest.mark.parametrize("version", [1, 2])
def test_cached_files_are_free_memory_of_a_container(tmp_path, version: int) -> None:
    names, prefix = ("memory.max", "memory.current"), ""
    folder = tmp_path
    if version == 1:
        folder, prefix = tmp_path / "memory", "total_"
        names = "memory.limit_in_bytes", "memory.usage_in_bytes"
        folder.mkdir()
    assert container_free(tmp_path) is None
    for name, size in zip(names, (16 * GIB, 15 * GIB), strict=True):
        (folder / name).write_text(f"{size}\n")
    assert container_free(tmp_path) == GIB
    stat = {"anon": 2 * GIB, f"{prefix}active_file": 5 * GIB, f"{prefix}inactive_file": 8 * GIB}
    (folder / "memory.stat").write_text("".join(f"{k} {v}\n" for k, v in stat.items()))
    assert container_free(tmp_path) == 14 * GIB
    (folder / names[0]).write_text("max")
    assert container_free(tmp_path) is None

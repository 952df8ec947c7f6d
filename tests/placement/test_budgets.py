"""Any budget gives a placement within it, and a larger one never places less."""

from functools import cache
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from greenroom.convert.synth import Synthesis
from greenroom.convert.synth_shapes import shape_of
from greenroom.models.config import ModelConfig
from greenroom.placement.hardware import Gpu, Hardware
from greenroom.placement.placement import Placement
from greenroom.placement.planner import Plan, Wish, place
from greenroom.placement.sizes import BESIDE_STAGED, EXPERT_ROWS, Sizes, reserved, reserved_each

MIB, GIB = 1 << 20, 1 << 30
GPU = Hardware(Gpu("a GPU", 78 * GIB, 80 * GIB))
SHAPES = ("gpt-oss-20b", "phi-3.5-moe", "deepseek-moe-16b", "qwen3-30b-a3b")


@cache
def model(name: str) -> tuple:
    job = Synthesis(shape_of(name))
    tensors = {
        spec.name: SimpleNamespace(type=spec.type, shape=spec.shape, ne=spec.shape[::-1],
                                   nbytes=spec.nbytes)
        for spec in job.specs()
    }  # fmt: skip
    return tensors, ModelConfig.from_metadata(job.metadata(), tensors)


def placed(name: str, vram: int, **wish) -> Placement:
    tensors, config = model(name)
    return place(tensors, config, Wish(vram=vram, named=True, **wish), GPU)


wishes = st.fixed_dictionaries(
    {"sequences": st.sampled_from([1, 8])},
    optional={
        "context": st.sampled_from([100, 4096, 32768]),
        "chunk": st.sampled_from([16, 512]),
        "block_size": st.sampled_from([16, 48]),
    },
)
budgets = st.one_of(st.integers(0, 3 * GIB), st.integers(0, 70 * GIB))


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(SHAPES), budgets, wishes)
def test_the_parts_never_exceed_the_budget(name: str, budget: int, wish: dict) -> None:
    found = placed(name, budget, **wish)
    if found.backend == "native":
        assert not found.parts
        return
    assert sum(found.parts.values()) <= budget == found.vram
    assert all(size >= 0 for size in found.parts.values())
    assert found.cache_room >= found.parts["cache"] if found.layers_on_gpu else True
    assert found.slot_bytes == found.parts.get("experts", 0)
    assert sum(size for _, _, size in found.table()) == budget
    assert found.context_length <= found.cache_tokens
    if "context" in wish:
        assert found.context_length == wish["context"]


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(SHAPES), budgets, st.integers(0, 2 * GIB), wishes)
def test_more_never_places_less(name: str, budget: int, more: int, wish: dict) -> None:
    small, large = placed(name, budget, **wish), placed(name, budget + more, **wish)
    if small.backend == "native":
        return
    assert large.backend == "cuda"
    assert large.slots >= small.slots
    assert large.head_on_gpu >= small.head_on_gpu
    assert large.parts["dense"] >= small.parts["dense"]
    if large.head_on_gpu == small.head_on_gpu:
        assert large.layers_on_gpu >= small.layers_on_gpu
    assert large.cache_tokens >= small.cache_tokens


@pytest.mark.parametrize("name", SHAPES)
def test_all_experts_fit_where_there_is_room(name: str) -> None:
    tensors, config = model(name)
    sizes = Sizes.of(tensors, config)
    found = placed(name, 76 * GIB, context=8192)
    assert found.layers_on_gpu == config.layers
    assert found.slots == sizes.expert_count
    assert found.slot_bytes >= sizes.experts
    assert found.prefill_chunk == 8192
    assert found.staging > 0


def test_gpt_oss_without_resident_experts_needs_1700_mib() -> None:
    """Dense part, context, captured steps, and long enough steps for streamed experts."""
    found = placed("gpt-oss-20b", int(1.7 * GIB), context=4096)
    assert found.head_on_gpu
    assert found.layers_on_gpu == 24
    assert found.context_length == 4096
    assert found.parts["graphs"] > 3 * 4 * 201088  # the logits of three ranges of contexts
    assert found.staging > 0
    assert found.prefill_chunk >= 768


@pytest.mark.parametrize("name", ["gpt-oss-20b", "qwen3-30b-a3b"])
def test_a_prompt_of_8192_tokens_is_one_step_in_4_gib(name: str) -> None:
    """Else every expert would come over the bus more than once; some still have a place."""
    found = placed(name, 4 * GIB, context=8400)
    assert found.prefill_chunk == 8192
    assert found.slots > 60
    assert placed(name, 3 * GIB, context=8400).prefill_chunk > 4096  # two steps


def test_experts_get_places_before_steps_are_as_long_as_can_be() -> None:
    for mib in range(2500, 4000, 100):
        found = placed("gpt-oss-20b", mib * MIB, context=8400)
        if found.prefill_chunk > 4096:
            assert found.slots > 0
        more = placed("gpt-oss-20b", (mib + 100) * MIB, context=8400)
        assert more.prefill_chunk >= found.prefill_chunk


@pytest.mark.parametrize("name", SHAPES)
def test_long_steps_stream_as_soon_as_two_experts_fit(name: str) -> None:
    tensors, config = model(name)
    sizes = Sizes.of(tensors, config)
    wish = Wish(vram=0, named=True, context=4096)
    plan = Plan(sizes, config, wish)
    two = 2 * sizes.slab + sizes.staged
    least = plan.need(True, config.layers) + two
    assert placed(name, least, context=4096).staging == two
    assert placed(name, least - 1, context=4096).staging == 0


def test_a_step_longer_than_asked_for_or_than_the_context_is_never_planned() -> None:
    small = placed("gpt-oss-20b", int(1.7 * GIB), context=8400, chunk=8192)
    assert small.layers_on_gpu == 24  # a named chunk is a limit, no demand
    assert 64 < small.prefill_chunk < 8192
    assert placed("gpt-oss-20b", 40 * GIB, context=8400, chunk=8192).prefill_chunk == 8192
    assert placed("gpt-oss-20b", 40 * GIB, context=1000).prefill_chunk == 1024
    assert placed("gpt-oss-20b", 40 * GIB, context=1000, chunk=40).prefill_chunk == 40


def test_what_the_allocator_takes_for_tensors_of_one_size_is_what_each_was_planned_with() -> None:
    for size in (700, 3 * MIB // 5, MIB, 4 * MIB, 6 * MIB, 10 * MIB, 13 * MIB):
        taken = reserved([size] * 240)
        assert taken - 20 * MIB <= 240 * reserved_each(size) <= taken + 20 * MIB
    assert reserved([9 * MIB, 9 * MIB, 2 * MIB]) == 20 * MIB
    assert reserved([512, MIB, 11 * MIB]) == 14 * MIB


def test_what_the_next_step_needs_is_enough_for_it() -> None:
    for name in SHAPES:
        tiny = placed(name, 40 * MIB)
        assert tiny.backend == "native"
        assert "hold not even one layer" in tiny.reason
        needed = int(tiny.reason.rsplit("; ", 1)[1].split()[0])
        first = placed(name, needed * MIB)
        assert (first.layers_on_gpu, first.head_on_gpu) != (0, False)
        assert placed(name, (needed - 1) * MIB).backend == "native"
        more = int(first.reason.rsplit("; ", 1)[1].split()[0])
        second = placed(name, more * MIB)
        assert second.parts["dense"] > first.parts["dense"]
        whole = int(first.reason.split(" MiB all of it")[0].rsplit(" ", 1)[1])
        assert placed(name, whole * MIB).layers_on_gpu == first.layers


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(SHAPES), st.integers(50 * MIB, 3 * GIB), wishes)
def test_the_next_step_is_next(name: str, budget: int, wish: dict) -> None:
    """At any budget below the whole dense part: what is said to hold more does, a MiB less does
    not."""
    now = placed(name, budget, **wish)
    if " all of it" not in now.reason and "hold not even" not in now.reason:
        return
    text = now.reason.split(" MiB hold more")[0] if now.backend == "cuda" else now.reason[:-3]
    needed = int(text.removesuffix(" MiB").rsplit(" ", 1)[1]) * MIB
    assert needed > budget

    def there(found: Placement) -> int:
        return found.parts.get("dense", 0)

    assert there(placed(name, needed, **wish)) > there(now)
    if needed - MIB > budget:
        assert there(placed(name, needed - MIB, **wish)) == there(now)


def test_rows_computed_at_a_time_are_planned_as_they_are_computed() -> None:
    from greenroom.experts import resident, stream, tiers

    assert EXPERT_ROWS == stream.EXPERT_ROWS == resident.EXPERT_ROWS
    assert BESIDE_STAGED == tiers.BESIDE_STAGED


@pytest.mark.parametrize("name", SHAPES)
def test_layers_on_the_gpu_always_have_their_recorded_steps_and_steps_long_enough(
    name: str,
) -> None:
    tensors, config = model(name)
    graphs = Plan(Sizes.of(tensors, config), config, Wish(context=4096)).graphs
    for mib in range(100, 2500, 50):
        found = placed(name, mib * MIB, context=4096)
        if found.backend == "cuda":
            assert found.parts["graphs"] == graphs
            assert found.prefill_chunk >= 256
            assert found.prefill_chunk <= 512 or not found.mixed

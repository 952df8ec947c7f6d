"""The rendezvous against the direct native call: a Python thread plays the device."""

import time

import numpy as np
import pytest

from greenroom.gguf import GGMLType

from .test_moe import Layer

LAYERS, TOKENS, K, D = 3, 2, 2, 256
FAILED = -(2**31)  # bit 31 of a bell


class Desk:
    """The shared memory, the layers behind it and a rendezvous over both."""

    def __init__(self, lib, pool, patience: float = 20.0) -> None:
        self.layers = [Layer(lib, pool, [GGMLType.Q8_0] * 3, d=D) for _ in range(LAYERS)]
        self.hidden = np.zeros((LAYERS, TOKENS, D), np.float32)
        self.ids = np.zeros((LAYERS, TOKENS, K), np.int32)
        self.weights = np.zeros((LAYERS, TOKENS, K), np.float32)
        self.result = np.full((LAYERS, TOKENS, D), np.nan, np.float32)
        self.ring, self.done = np.zeros((2, LAYERS, 16), np.int32)
        self.native = lib.Rendezvous(
            pool, [layer.native for layer in self.layers],
            (self.hidden, self.ids, self.weights, self.result), self.ring, self.done, patience,
        )  # fmt: skip

    def write(self, layer: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.hidden[layer] = rng.standard_normal((TOKENS, D))
        self.ids[layer] = [rng.permutation(5)[:K] - 1 for _ in range(TOKENS)]
        self.weights[layer] = rng.random((TOKENS, K))

    def expected(self, layer: int, tokens: int) -> np.ndarray:
        arrays = (self.hidden, self.ids, self.weights)
        return self.layers[layer].run(*(a[layer].reshape(TOKENS, -1)[:tokens] for a in arrays))

    def answered(self, layer: int, value: int) -> None:
        limit = time.monotonic() + 20
        while self.done[layer, 0] != value:
            assert time.monotonic() < limit, f"layer {layer} was not answered"
            time.sleep(0)


@pytest.fixture
def desk(lib, pool) -> Desk:
    return Desk(lib, pool)


def test_many_steps_give_the_bits_of_the_direct_call(desk: Desk) -> None:
    for number in range(1, 41):
        tokens = 1 + number % TOKENS
        desk.native.begin(number, tokens)
        for layer in range(LAYERS):
            desk.write(layer, number * LAYERS + layer)
            desk.ring[layer, 0] = number
            desk.answered(layer, number)
        assert desk.native.wait(20)
        for layer in range(LAYERS):
            np.testing.assert_array_equal(desk.result[layer, :tokens], desk.expected(layer, tokens))
    assert [s["calls"] for s in desk.native.stats()] == [40] * LAYERS
    assert all(s["compute_ns"] > 0 for s in desk.native.stats())


def test_a_layer_without_misses_is_left_alone(desk: Desk) -> None:
    desk.native.begin(2**31 - 1, 1)
    desk.ring[:, 0] = -1  # the number with bit 31
    assert desk.native.wait(20)
    assert np.isnan(desk.result).all()
    assert [s["calls"] for s in desk.native.stats()] == [0] * LAYERS
    assert (desk.done[:, 0] == 2**31 - 1).all()


@pytest.mark.parametrize("bad", [-2, 4, 2**31 - 1, -(2**31), 0])
def test_hostile_ids_fail_the_step_once(desk: Desk, bad: int) -> None:
    desk.ids[:] = [0, 1]
    desk.ids[1, 0, 1] = bad  # 0: the same expert twice
    desk.ring[:, 0] = 7
    desk.native.begin(7, TOKENS)
    with pytest.raises(RuntimeError, match=f"MoE layer 1 was sent expert id {bad},"):
        desk.native.wait(20)
    assert desk.native.wait(0)
    assert (desk.done[:, 0] == FAILED + 7).all()
    desk.ids[:] = [0, 1]
    desk.ring[:, 0] = 8
    desk.native.begin(8, TOKENS)
    assert desk.native.wait(20)


def test_a_device_that_never_rings_is_an_error(lib, pool) -> None:
    desk = Desk(lib, pool, patience=0.02)
    desk.native.begin(1, 1)
    with pytest.raises(RuntimeError, match="step 1, MoE layer 0: the device did not ring in time"):
        desk.native.wait(20)


def test_cancel_ends_a_step(desk: Desk) -> None:
    desk.native.begin(1, 1)
    assert not desk.native.wait(0.01)
    with pytest.raises(RuntimeError, match="still under way"):
        desk.native.begin(2, 1)
    desk.native.cancel()
    with pytest.raises(RuntimeError, match="cancelled"):
        desk.native.wait(20)


def test_layers_that_share_a_box_are_served_one_a_step(lib, pool) -> None:
    desk = Desk(lib, pool)
    boxes = tuple(part[:1] for part in (desk.hidden, desk.ids, desk.weights, desk.result))
    layers = [layer.native for layer in desk.layers]
    shared = lib.Rendezvous(pool, layers, boxes, desk.ring[:1], desk.done[:1], 20.0)
    for number, layer in enumerate((2, 0, 1, 1), 1):
        desk.write(0, number)
        shared.begin(number, TOKENS, layer)
        desk.ring[0, 0] = number
        desk.answered(0, number)
        assert shared.wait(20)
        arguments = (desk.hidden[0], desk.ids[0], desk.weights[0])
        np.testing.assert_array_equal(desk.result[0], desk.layers[layer].run(*arguments))
    assert [s["calls"] for s in shared.stats()] == [1, 2, 1]
    for layer in (LAYERS, None):
        with pytest.raises(ValueError, match="layer must be below 3, and told"):
            shared.begin(9, TOKENS, layer)


def test_one_layer_of_several_boxes_is_served_alone(desk: Desk) -> None:
    desk.write(1, 5)
    desk.native.begin(4, TOKENS, 1)
    desk.ring[1, 0] = 4
    assert desk.native.wait(20)
    np.testing.assert_array_equal(desk.result[1], desk.expected(1, TOKENS))
    assert (desk.done[:, 0] == [0, 4, 0]).all()


def test_arguments_are_checked(desk: Desk) -> None:
    for number, tokens in ((0, 1), (2**31, 1), (1, 0), (1, TOKENS + 1)):
        with pytest.raises(ValueError, match=r"number|tokens"):
            desk.native.begin(number, tokens)
    desk.native.begin(3, 1)
    del desk.native  # joins the worker in the middle of a step

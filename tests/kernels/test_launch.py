"""Launches that find again what Triton compiled, with a stand-in for Triton."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from greenroom.gguf import GGMLType
from greenroom.kernels import launch
from greenroom.kernels.launch import Kernel, power_of_two


class Compiled:
    def __init__(self, number: int, launched: list[Any]) -> None:
        self.number, self.launched = number, launched

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, stream: self.launched.append((self.number, grid, args, stream))


class Jitted:
    """x, y, n, loose, then BLOCK and FLAG."""

    def __init__(self) -> None:
        names = ["x", "y", "n", "loose", "BLOCK", "FLAG"]
        self.params = [SimpleNamespace(name=n, do_not_specialize=n == "loose") for n in names]
        self.compiled: list[Any] = []
        self.launched: list[Any] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*args: Any, **constants: Any) -> Compiled:
            self.compiled.append((grid, args, constants))
            return Compiled(len(self.compiled) - 1, self.launched)

        return run


@pytest.fixture
def jitted(monkeypatch: pytest.MonkeyPatch) -> Jitted:
    active = SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda _: "stream")
    monkeypatch.setattr(launch, "driver", SimpleNamespace(active=active))
    return Jitted()


MEMORY = torch.zeros(4096)
BASE = next(i for i in range(64) if MEMORY[i:].data_ptr() % launch.ALIGNED == 0)
X, Y = MEMORY[BASE : BASE + 64], MEMORY[BASE + 1024 :]


def test_the_second_launch_goes_past_triton_with_arguments_in_its_order(jitted: Jitted) -> None:
    kernel = Kernel(jitted)
    kernel[(2,)](X, Y, 7, 1, FLAG=True, num_warps=4, BLOCK=64)
    kernel[(3, 4)](Y, X, 7, 99, FLAG=True, num_warps=4, BLOCK=64)
    assert len(jitted.compiled) == 1
    (number, grid, args, stream) = jitted.launched[0]
    assert (number, grid, stream) == (0, (3, 4, 1, 1), "stream")
    assert [a is b for a, b in zip(args[:2], (Y, X), strict=True)] == [True, True]
    assert args[2:] == (7, 99, 64, True)


@pytest.mark.parametrize(
    ("args", "constants"),
    [
        ((X, Y, 8, 1), {}),  # a number that is compiled in
        ((X, Y[1:], 7, 1), {}),  # an address that is aligned otherwise
        ((X, Y.half(), 7, 1), {}),
        ((X, None, 7, 1), {}),
        ((X, Y, 7.0, 1), {}),
        ((X, Y, 7, 1 << 31), {}),  # needs 64 bits
        ((X, Y, True, 1), {}),
        ((X, Y, GGMLType.Q4_K, 1), {}),
        ((X, Y, 7, 1), {"BLOCK": 128}),
        ((X, Y, 7, 1), {"num_warps": 8}),
    ],
)
def test_what_differs_is_left_to_triton(args: Any, constants: dict, jitted: Jitted) -> None:
    kernel, usual = Kernel(jitted), {"BLOCK": 64, "FLAG": True, "num_warps": 4}
    kernel[(1,)](X, Y, 7, 1, **usual)
    for _ in range(2):
        kernel[(1,)](*args, **usual | constants)
        kernel[(1,)](X, Y, 7, 1, **usual)
    assert len(jitted.compiled) == 2
    assert [number for number, *_ in jitted.launched] == [0, 1, 0]


def test_another_device_has_code_of_its_own(jitted: Jitted, monkeypatch) -> None:
    kernel, constants = Kernel(jitted), {"BLOCK": 64, "FLAG": True}
    kernel[(1,)](X, Y, 7, 1, **constants)
    monkeypatch.setattr(launch.driver.active, "get_current_device", lambda: 1)
    kernel[(1,)](X, Y, 7, 1, **constants)
    assert len(jitted.compiled) == 2


def test_numbers_without_end_do_not_fill_the_memory(jitted: Jitted, monkeypatch) -> None:
    monkeypatch.setattr(launch, "MOST_FOUND", 5)
    kernel = Kernel(jitted)
    for n in range(100):
        kernel[(1,)](X, Y, n, 1, BLOCK=64, FLAG=True)
    assert len(kernel._found) <= 5


def test_a_launch_that_fails_is_forgotten(jitted: Jitted, monkeypatch) -> None:
    kernel, constants = Kernel(jitted), {"BLOCK": 64, "FLAG": True}
    with monkeypatch.context() as patch:
        patch.setattr(Jitted, "__getitem__", lambda *_: None)
        with pytest.raises(TypeError):
            kernel[(1,)](X, Y, 7, 1, **constants)
    assert not kernel._found
    kernel[(1,)](X, Y, 7, 1, **constants)
    assert len(jitted.compiled) == 1


def test_numbers_of_a_type_of_their_own_are_told_apart(jitted: Jitted) -> None:
    kernel, constants = Kernel(jitted), {"BLOCK": 64, "FLAG": True}
    for kind in (GGMLType.Q4_K, GGMLType.Q6_K, GGMLType.Q4_K):
        kernel[(1,)](X, Y, kind, 1, **constants)
    assert len(jitted.compiled) == 2


def test_a_constant_that_is_missing_is_noticed_before_the_launch(jitted: Jitted) -> None:
    with pytest.raises(KeyError, match="FLAG"):
        Kernel(jitted)[(1,)](X, Y, 7, 1, BLOCK=64)
    assert not jitted.compiled


def test_powers_of_two() -> None:
    assert [power_of_two(n) for n in (1, 2, 3, 4, 5, 64, 65)] == [1, 2, 4, 4, 8, 64, 128]

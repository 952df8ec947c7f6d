"""How kernels are launched: found again by what their arguments are, in less time than Triton takes
to look at each anew. Steps of many tokens wait for the host that launches them.
"""

from collections.abc import Callable, Iterable
from functools import partial
from operator import itemgetter
from typing import Any

import triton
from torch import Tensor
from triton.runtime import driver

INTERPRETED = triton.knobs.runtime.interpret
ALIGNED = 16  # bytes; whether addresses are multiples of it is compiled in
SMALL = 1 << 31  # from which on numbers need 64 bits
MOST_FOUND = 10_000  # of a kernel; numbers may take any value


def kernel(
    function: Callable[..., None] | None = None, *, do_not_specialize: Iterable[str] = ()
) -> Any:
    """Decorator of functions in Triton's language that the host launches, `f[grid](...)`.

    Args:
        function: to be compiled. Parameters that are constants come last, and by name.
        do_not_specialize: integers for whose values nothing is compiled anew.
    """
    if function is None:
        return partial(kernel, do_not_specialize=do_not_specialize)
    jitted = triton.jit(function, do_not_specialize=list(do_not_specialize))
    return jitted if INTERPRETED else Kernel(jitted)


def power_of_two(number: int) -> int:
    """The least that is no less than a positive number. Triton's own is made for kernels and takes
    the host microseconds."""
    return 1 << (number - 1).bit_length()


class Kernel:
    """A kernel and what was compiled of it.

    Triton's own way to launch stays in charge of what is new. What it compiled is used again for
    arguments of the same types with the same numbers, constants and alignment of addresses; a
    prompt of a new length is new to those kernels whose numbers tell it.

    Args:
        jitted: what `triton.jit` made. Constants, and nothing else, are given by name.
    """

    def __init__(self, jitted: Any) -> None:
        self._jitted = jitted
        self._forms: dict[tuple[type, ...], _Form] = {}
        self._found: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return partial(self._launch, grid)

    def _launch(self, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        types = tuple(map(type, args))
        form = self._forms.get(types)
        if form is None:
            form = self._forms[types] = _Form(args, self._jitted.params)
        device = driver.active.get_current_device()
        tensors = form.tensors(args)
        key = (
            types, device, form.numbers(args), form.wide(args), *constants.items(),
            *[tensor.dtype for tensor in tensors],
            *[tensor.data_ptr() % ALIGNED for tensor in tensors],
        )  # fmt: skip
        found = self._found.get(key)
        if found is None:
            if len(self._found) >= MOST_FOUND:
                self._found.clear()
            rest = tuple(constants[p.name] for p in self._jitted.params[len(args) :])
            self._found[key] = self._jitted[grid](*args, **constants), rest
            return
        compiled, rest = found
        stream = driver.active.get_current_stream(device)
        compiled[(*grid, 1, 1)](*args, *rest, stream=stream)


class _Form:
    """Where arguments of some types have what matters.

    Args:
        args: of those types.
        params: of the kernel, as Triton describes them.
    """

    def __init__(self, args: tuple[Any, ...], params: list[Any]) -> None:
        numbers = [i for i, value in enumerate(args) if isinstance(value, int)]
        loose = [i for i in numbers if params[i].do_not_specialize]
        self.tensors = _picker([i for i, value in enumerate(args) if isinstance(value, Tensor)])
        self.numbers = _picker([i for i in numbers if i not in loose])
        self._loose = _picker(loose)

    def wide(self, args: tuple[Any, ...]) -> tuple[bool, ...]:
        """Which of the loose integers need 64 bits."""
        return tuple([not -SMALL <= value < SMALL for value in self._loose(args)])


def _picker(places: list[int]) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    """Takes the items at some places."""
    if len(places) > 1:
        return itemgetter(*places)
    return lambda args: tuple([args[i] for i in places])

"""Compiles the Triton kernels for a GPU that need not be there, as their wrappers launch them.

    python compile_all.py [CAPABILITY [quick]]

Run without TRITON_INTERPRET. Prints one line a kernel: its name and bytes of shared memory;
fails at the first that does not compile. "quick" takes each way to store scales once.
"""

import sys

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from triton.runtime.jit import JITFunction

from greenroom.experts.slabs import SlabLayout
from greenroom.gguf import GGMLType
from greenroom.kernels import grouped, launch
from greenroom.kernels.attention import PREFILL_ROWS, ROWS, attend
from greenroom.kernels.carry import carry
from greenroom.kernels.dequantise import dequantise, dequantise_group
from greenroom.kernels.direct import direct
from greenroom.kernels.errand import meet, send, tell
from greenroom.kernels.expert_rows import activated_rows, add_rows, scaled_rows
from greenroom.kernels.experts import hits
from greenroom.kernels.gather import KINDS, gather
from greenroom.kernels.guests import Guests, choose_guests, fetch
from greenroom.kernels.handover import publish
from greenroom.kernels.matvec import matvec
from greenroom.kernels.norm import norm
from greenroom.kernels.packed import FORMATS
from greenroom.kernels.rendezvous import Box, collect, ring
from greenroom.kernels.rope import enter
from greenroom.kernels.router import RULES, choose, logits
from greenroom.kernels.rowmajor import rowmajor
from greenroom.kernels.sorting import by_expert

TARGET = GPUTarget("cuda", int(sys.argv[1]) if len(sys.argv) > 1 else 90, 32)
TYPES = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.uint8: "*u8",
    torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip


def type_of(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return TYPES[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def compile_instead(self: JITFunction, *args: object, grid: object, **named: object) -> None:
    """Takes the place of a launch."""
    names = [p.name for p in self.params]
    fixed = {p.name for p in self.params if p.is_constexpr}
    values = dict(zip(names, args, strict=False)) | {k: v for k, v in named.items() if k in names}
    signature = {n: "constexpr" if n in fixed else type_of(values[n]) for n in names}
    constants = {(names.index(n),): values[n] for n in fixed}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, n in enumerate(names)
        if isinstance(values[n], torch.Tensor)
        or (type(values[n]) is int and n not in fixed and values[n] and values[n] % 16 == 0)
    }
    options = {k: v for k, v in named.items() if k in ("num_warps", "num_stages")}
    done = compile(ASTSource(self, signature, constants, aligned), target=TARGET, options=options)
    print(self.fn.__name__, done.metadata.shared)


JITFunction.run = compile_instead
launch.Kernel._launch = lambda self, grid, *args, **named: self._jitted[grid](*args, **named)

ints = torch.zeros(8, dtype=torch.int32)
x = torch.zeros(2, 256)
quick = "quick" in sys.argv
# Q3_K (11) stores its scales as Q6_K does.
by_scales = {form.scales: kind for kind, form in FORMATS.items() if kind != 11}
for kind in by_scales.values() if quick else FORMATS:
    if not quick or kind in (14, 23):  # planes, and a table that is looked up
        matvec(torch.zeros(64, dtype=torch.uint8), kind, 32, 256, x, x)
        matvec(torch.zeros(64, dtype=torch.uint8), kind, 32, 256, torch.zeros(4, 256), x)
    dequantise(torch.zeros(64, dtype=torch.uint8), kind, torch.empty(32, 256))
for kind in (12, 14) if quick else sorted(KINDS):
    gather(torch.zeros(4, 210, dtype=torch.uint8), kind, ints.long(), ints.long(), x)
for rows, splits, dtype, size in [
    (ROWS, 4, torch.float16, 64),
    (PREFILL_ROWS, 1, torch.float16, 128),
    (PREFILL_ROWS, 1, torch.float32, 128),
][: 1 if quick else 3]:
    cache = torch.zeros(1, 2, 32, size, dtype=dtype)
    for window, sinks in [(128, x), (None, None)]:
        attend(
            torch.zeros(2, 8, size), cache, cache, ints.view(2, 4), ints, ints, ints, ints,
            scale=0.1, rows=rows, splits=splits, window=window, sinks=sinks,
        )  # fmt: skip
    line, places = cache[:, :, 0].float(), ints.long()
    for frequencies in (None, torch.zeros(size // 2), torch.zeros(12)):
        enter(line, line, line, places, cache, cache, places, frequencies, 1.25, size == 64)
for bias in (None, x):
    for cut in (0, 1, 2):
        norm(x, x, 1e-5, bias, x, cut)
    rowmajor(torch.zeros(2, 256, dtype=torch.bfloat16), x, bias)
for gating in RULES:
    choose(x, gating, 2)
choose(x, "softmax", 8, renormalise=True)
logits(x, torch.zeros(4, 256), x)
publish(x, ints.view(2, 4), torch.zeros(2, 4), (x, ints, x))
box = Box(x, ints.view(2, 4), torch.zeros(2, 4), x, ints, ints)
slabs = torch.zeros(8, 64, dtype=torch.uint8)
here, copied = Guests(ints, ints, slabs, slabs, 1), Guests(ints, ints, slabs[:2], slabs, 2)
fetch(copied)
choose_guests(ints.view(2, 4), None, here)
for table, part, guests in ((None, None, None), (ints, x, here), (None, x, copied)):
    ring(x, ints.view(2, 4), torch.zeros(2, 4), box, ints, table, table, guests)
    collect(box, 2, ints, part, part)
carry(ints, ints)
send(x, ints, ints, x)
tell(ints, 3)
meet(ints, 3)
by_expert(ints.view(2, 4), 60)
by_expert(ints.view(2, 4), 60, ints, ints)
routes = grouped.Routes(ints.view(2, 4), torch.zeros(2, 4), *[ints] * 3, ints.view(4, 2))
group = grouped.Group(0, 0, (2,))
for kinds in [(39, 39, 39), (12, 12, 14), (30, 30, 30)][: 1 if quick else 3]:
    layout = SlabLayout.plan(tuple(GGMLType(kind) for kind in kinds), 256, 256, True)
    memory = torch.zeros(1, 64, dtype=torch.uint8)
    for guests in (None, here):
        x_routes = x, ints.view(2, 4), torch.zeros(2, 4)
        hits(memory, ints, layout, *x_routes, "gpt-oss", guests=guests)
    both = torch.zeros(1, 512)
    activated_rows(both, memory, (0, 0), x, routes, group, 0, "gpt-oss")
    add_rows(x, x, x, memory, 0, routes, group, 0)
    half = torch.zeros(1, 32, 256, dtype=torch.float16)
    dequantise_group(memory, 0, kinds[0], half, routes, group)
    for rows in (64, 2048)[:: -1 if quick else 1][: 1 if quick else 2]:
        group = grouped.Group(0, 0, (rows,))
        grouped.wide = lambda device: TARGET.arch >= 90
        grouped.product(half[0], half, routes, group, 0, rows, gather=True)
    if kinds[0] != 30:
        direct(half[0], memory, 0, kinds[0], both[:, :256], routes, group, 0, gather=True)
    scaled_rows(x)

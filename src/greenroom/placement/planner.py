"""Decides what of a model goes to VRAM under a budget, before anything is allocated.

Dense layers, shared experts and the head first, together with scratch; what is left may hold
the KV cache. Routed experts and the embedding table stay in RAM. Knows a file's tensors and the
hardware; allocates nothing.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from greenroom import native
from greenroom.errors import BudgetError, RequestError
from greenroom.experts.slabs import stored_type
from greenroom.gguf import GGMLType, TensorInfo
from greenroom.layers.ledger import SCRATCH_BYTES
from greenroom.models.config import ModelConfig
from greenroom.placement.budget import mib
from greenroom.placement.hardware import Hardware

MARGIN = 512 << 20  # of "max", left to other programs and the allocator's rounding
# The allocator hands out pieces of 2 to 20 MiB, and the vendor's products take 32 MiB for
# themselves on Hopper.
ROUNDING = 96 << 20

_EXPERTS = re.compile(r"_exps\.|\.ffn_(gate|up|down)\.\d+\.")
_FLOAT32 = re.compile(r"ffn_gate_inp(_shexp)?\.weight$")  # routers are kept in float32
_NOT_PLACED = re.compile(r"^token_embd\.|^rope_f|attn_rot_embd|rotary_emb|attn\.masked_bias")


@dataclass(frozen=True, slots=True)
class Wish:
    """What the user asked for.

    Attributes:
        backend: "auto", "cuda", "native" or "reference".
        vram: bytes, None for all there is.
        named: whether the user named the budget.
        tokens: most tokens of one step.
        sequences: most sequences of one step.
    """

    backend: str
    vram: int | None
    named: bool
    tokens: int
    sequences: int


@dataclass(frozen=True, slots=True)
class Placement:
    """The decision.

    Attributes:
        backend: "cuda", "native" or "reference".
        reason: one line for the log.
        vram: bytes to be booked at most; None without a GPU.
        parts: bytes of VRAM by part; empty without a GPU.
    """

    backend: str
    reason: str
    vram: int | None = None
    parts: Mapping[str, int] | None = None

    @property
    def cache_room(self) -> int | None:
        """Bytes of VRAM the KV cache may take; None where it lives in RAM."""
        if self.vram is None or self.parts is None:
            return None
        return self.vram - sum(self.parts.values())


def place(
    tensors: Mapping[str, TensorInfo], config: ModelConfig, wish: Wish, hardware: Hardware
) -> Placement:
    """Chooses the backend and what goes to VRAM.

    Raises:
        BudgetError: the budget the user named is too small; the message says what is needed.
        RequestError: a GPU was asked for and there is none, or a budget for a backend without.
    """
    if wish.backend in ("native", "reference"):
        if wish.named and wish.vram != 0:
            raise RequestError(f"the {wish.backend} backend uses no VRAM; leave vram out", "vram")
        return Placement(wish.backend, f"computing on the CPU ({wish.backend} backend, as asked)")
    if wish.vram == 0:
        if wish.backend == "cuda":
            raise RequestError("the cuda backend needs VRAM; leave vram out or raise it", "vram")
        return Placement("native", "computing on the CPU: the VRAM budget is 0")
    if hardware.gpu is None:
        if wish.backend == "cuda" or wish.vram is not None:
            field = "backend" if wish.backend == "cuda" else "vram"
            raise RequestError(
                f"no GPU can be used: {hardware.reason}; leave {field} out to use the CPU", field
            )
        return Placement("native", f"computing on the CPU: {hardware.reason}")
    return _on_gpu(tensors, config, wish, hardware)


def _on_gpu(
    tensors: Mapping[str, TensorInfo], config: ModelConfig, wish: Wish, hardware: Hardware
) -> Placement:
    gpu = hardware.gpu
    assert gpu is not None
    usable = max(0, gpu.free - MARGIN)
    budget = usable if wish.vram is None else wish.vram
    if budget > gpu.free:
        raise BudgetError(
            f"vram is {mib(budget)}, but only {gpu.free >> 20} MiB of {gpu.name} are free; lower it"
        )
    parts = {
        "dense": dense_bytes(tensors),
        "scratch": SCRATCH_BYTES,
        "activations": activation_bytes(config, wish),
    }
    need = sum(parts.values())
    if need > budget:
        small = f"dense layers and workspace need {mib(need)} of VRAM and the KV cache more"
        if wish.named or wish.backend == "cuda":
            raise BudgetError(
                f"a VRAM budget of {budget >> 20} MiB is too small: {small}; raise it, or set it "
                "to 0 to compute on the CPU"
            )
        return Placement("native", f"computing on the CPU: {small} than {gpu.name} has free")
    reason = (
        f"{gpu.name}: dense layers ({mib(parts['dense'])}) and KV cache in VRAM, budget "
        f"{budget >> 20} MiB; experts and embedding in RAM, computed by the CPU"
    )
    return Placement("cuda", reason, budget, parts)


def dense_bytes(tensors: Mapping[str, TensorInfo]) -> int:
    """Bytes of everything but experts and embedding, as the cuda backend keeps it."""
    total = 0
    for name, tensor in tensors.items():
        if not (_EXPERTS.search(name) or _NOT_PLACED.search(name)):
            total += _placed_bytes(name, tensor)
    if "output.weight" not in tensors:  # the head is the embedding's twin
        total += _placed_bytes("output.weight", tensors["token_embd.weight"])
    return total


def _placed_bytes(name: str, tensor: TensorInfo) -> int:
    shape = tensor.shape
    if len(shape) < 2 or _FLOAT32.search(name):
        count = 1
        for size in shape:
            count *= size
        return 4 * count
    rows, cols = shape
    kept = stored_type(tensor.type, cols)
    if kept in (GGMLType.F32, GGMLType.F16, GGMLType.BF16):
        return rows * cols * kept.block_bytes
    return int(native.lib().packed_bytes(int(kept), rows, cols))


def activation_bytes(config: ModelConfig, wish: Wish) -> int:
    """Bytes of what one step computes, at most, with the allocator's rounding."""
    shape = config.attention
    attention = (shape.heads + 2 * shape.kv_heads) * max(shape.key_length, shape.value_length)
    moe = config.moe
    inner = max(config.feed_forward_length, moe.shared_width if moe else 0)
    # Residual, its norm and a sum; projections, their contiguous copies and the attention's
    # output; gate and up, their copies and product.
    width = 4 * config.hidden_size + 3 * attention + 5 * inner
    tokens = max(wish.tokens, wish.sequences)
    return 4 * (tokens * width + 2 * wish.sequences * config.vocabulary_size) + ROUNDING

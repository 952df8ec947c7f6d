"""What the planner decided, as numbers for the loader and as a table for people."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Placement:
    """The decision.

    Attributes:
        backend: "cuda", "native" or "reference".
        reason: one line for the log.
        vram: bytes to be used at most; None without a GPU.
        parts: bytes of VRAM by part; empty without a GPU. "activations" are what steps use
            besides what is booked for good, "allocator" is what nobody asked for.
        layers: of the model.
        layers_on_gpu: how many of them, the last ones, are computed by the GPU.
        head_on_gpu: whether the GPU computes the head.
        slots: experts that have a place in VRAM, and slot_bytes: what they take together.
        staging: bytes for experts on their way through VRAM in long steps; 0 for none.
        scratch: bytes for rows expanded to float32.
        prefill_chunk: most prompt tokens of a step; None if nothing limits it here.
        context_length: most tokens of a sequence; None if nothing limits it here.
        cache_tokens: tokens of the KV cache; None if nothing limits it here.
    """

    backend: str
    reason: str
    vram: int | None = None
    parts: Mapping[str, int] = field(default_factory=dict)
    layers: int = 0
    layers_on_gpu: int = 0
    head_on_gpu: bool = False
    slots: int = 0
    slot_bytes: int = 0
    staging: int = 0
    scratch: int = 0
    prefill_chunk: int | None = None
    context_length: int | None = None
    cache_tokens: int | None = None

    @property
    def mixed(self) -> bool:
        """Whether both processors have layers, or one the layers and the other the head."""
        whole = self.layers_on_gpu == self.layers and self.head_on_gpu
        return self.backend == "cuda" and not whole

    @property
    def lasting(self) -> int | None:
        """Bytes of VRAM for everything but what single steps use; None without a GPU."""
        if self.vram is None:
            return None
        return self.vram - self.parts.get("activations", 0) - self.parts.get("allocator", 0)

    @property
    def cache_room(self) -> int | None:
        """Bytes of VRAM the KV cache may take; None where it lives in RAM."""
        if self.vram is None or not self.layers_on_gpu:
            return None
        others = sum(size for part, size in self.parts.items() if part != "cache")
        return self.vram - others

    def table(self) -> list[tuple[str, str, int]]:
        """Rows for people: part, remark, bytes of VRAM; the last row is what is left free."""
        if self.vram is None:
            return []
        head = "and the head" if self.head_on_gpu else "without the head"
        remarks = {
            "dense": f"{self.layers_on_gpu} of {self.layers} layers {head}",
            "cache": f"{self.cache_tokens} tokens, context {self.context_length}",
            "scratch": "rows expanded for long steps",
            "activations": f"steps of up to {self.prefill_chunk} tokens",
            "allocator": "rounding, and the vendor's own",
            "graphs": "captured steps",
            "staging": "experts on their way in long steps",
            "experts": f"{self.slots} slots",
        }
        rows = [(part, remarks.get(part, ""), size) for part, size in self.parts.items() if size]
        return [*rows, ("free", "", self.vram - sum(self.parts.values()))]

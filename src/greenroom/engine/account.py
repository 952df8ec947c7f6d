"""What an engine says of its memory: bytes by part and tier, VRAM in use, stored prefixes, where
experts sit and what they cost. Knows no request.
"""

from collections import Counter
from collections.abc import Sequence as Items
from dataclasses import asdict
from typing import Any

from greenroom.engine.prefix_store import PrefixStore
from greenroom.engine.runner import ModelLike
from greenroom.layers.batch import KVCache
from greenroom.placement.enforce import usage
from greenroom.placement.placement import Placement


class Account:
    """A part of `Engine.stats()`.

    Args:
        model: the engine's.
        caches: its keys and values.
        store: its prefixes in RAM, or None.
    """

    def __init__(self, model: ModelLike, caches: Items[KVCache], store: PrefixStore | None) -> None:
        self._model: ModelLike | None = model
        self._store = store
        self._caches: Counter[str] = Counter()  # bytes of keys and values by where they are
        for cache in caches:
            part = "kv_cache.vram" if cache.k.is_cuda else "kv_cache"
            self._caches[part] += cache.k.nbytes + cache.v.nbytes

    def __call__(self, plan: Placement | None) -> dict[str, Any]:
        """The figures; `plan` is what was planned, where a file was loaded."""
        if (model := self._model) is None:
            return {"memory": {}}
        return {**self._memory(model, plan), **_experts(model), **_layers(model)}

    def close(self) -> None:
        """The memory is given back: from now on there is none to tell of."""
        self._model = self._store = None

    def _memory(self, model: ModelLike, plan: Placement | None) -> dict[str, Any]:
        memory = {**model.memory(), **self._caches}
        found: dict[str, Any] = {"memory": memory}
        store = self._store
        if plan is not None and plan.vram is not None:
            backends = getattr(model, "backends", ())
            booked = sum(getattr(backend, "booked", 0) for backend in backends)
            found["vram"] = usage(plan.vram, booked)
        if store is None:
            return found
        memory["prefixes.ram"] = store.bytes
        figures = {"budget": store.budget, "bytes": store.bytes, "blocks": len(store)}
        figures |= {"kept_blocks": store.kept, "restored_blocks": store.restored}
        return found | {"prefix_store": figures}


def _experts(model: ModelLike) -> dict[str, Any]:
    ask = getattr(model, "expert_stats", None)
    found = {} if ask is None else ask()
    return {"experts": found} if found else {}


def _layers(model: ModelLike) -> dict[str, Any]:
    meters = getattr(model, "meters", {}).items()
    return {"layers": [{"layer": i, **asdict(m)} for i, m in meters]} if meters else {}

"""What leads up to the layers of one device, and with them a decode step can be recorded: the
embedding, and the layers that are computed in RAM.
"""

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from greenroom.layers.batch import Batch, KVCache

if TYPE_CHECKING:
    from greenroom.models.model import Model


class Lead:
    """See `layers.backend.Start`.

    Args:
        model: of which the last layers, the head or both are computed by one device.

    Attributes:
        device: the backend of what follows.
        layers: of the model that are not; the first ones.
    """

    def __init__(self, model: "Model") -> None:
        self._model: Model = weakref.proxy(model)  # it has this, and is freed when it is closed
        last = model.blk[-1].backend
        self.device = model.ending if model.ending.tier else last
        owners = [blk.backend for blk in model.blk]
        self.layers = owners.index(self.device) if self.device in owners else len(owners)

    @property
    def reads(self) -> bool:
        """See `Start.reads`."""
        return not self.layers and self._model.token_embd.reads

    def rows(self, batch: Batch, caches: Sequence[KVCache]) -> Tensor:
        """See `Start.rows`."""
        model = self._model
        x = model.scaled(model.token_embd.rows(batch.tokens))
        if not self.layers:
            return x
        steps = {id(model.backend): model.backend.step(batch, model.rope)}
        x, delta = model.through(x, steps, caches, slice(self.layers))
        return x if delta is None else x.add_(delta)

    def gather(self, ids: Tensor, chosen: Tensor) -> Tensor:
        """See `Start.gather`."""
        return self._model.scaled(self._model.token_embd.gather(ids, chosen))

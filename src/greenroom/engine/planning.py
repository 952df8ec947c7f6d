"""Which backend an engine would take and what would go where, said from a file's header: torch is
not needed, unless to ask a GPU.
"""

from greenroom.engine.config import EngineConfig
from greenroom.gguf import GGUFFile
from greenroom.models.registry import place_of, read_config
from greenroom.placement.budget import parse_size
from greenroom.placement.calibrate import saved_profile
from greenroom.placement.hardware import Hardware, probe
from greenroom.placement.machine import machine
from greenroom.placement.placement import Placement
from greenroom.placement.planner import Wish, place
from greenroom.placement.worth import worthwhile

VALUE_BYTES = {"f16": 2, "f32": 4}  # of one value in the cache


def planned(file: GGUFFile, config: EngineConfig, hardware: Hardware | None = None) -> Placement:
    """Which backend an engine would take, and what would go to VRAM; loads nothing.

    Args:
        file: the model.
        config: the settings.
        hardware: instead of this machine's, of which more is known where it was measured: that
            computing some layers on the GPU and some on the CPU does not pay.

    Raises:
        BudgetError, RequestError: see `placement.planner.place`.
    """
    place_of(file)  # an unknown architecture is a better complaint than a missing key
    vram = None if config.vram is None else parse_size(config.vram, "vram")
    wish = Wish(
        backend=config.backend,
        vram=vram,
        named=config.vram is not None,
        sequences=config.max_sequences,
        chunk=config.prefill_chunk,
        context=config.context_length,
        cache_tokens=config.cache_tokens,
        block_size=config.block_size,
        value_bytes=VALUE_BYTES[config.kv_type],
    )
    wanted = config.backend in ("auto", "cuda") and vram != 0
    model = read_config(file)
    if hardware is not None:
        return place(file.tensors, model, wish, hardware)
    hardware = probe() if wanted else Hardware(None, "not asked for")
    found = place(file.tensors, model, wish, hardware)
    if not found.mixed or config.backend == "cuda":
        return found
    profile = saved_profile(machine().fingerprint)
    return found if profile is None else worthwhile(found, file.tensors, model, profile)

"""Whether sharing the layers between both processors pays: a budget is a bound, not a duty. Reads a
file's tensors, a decision of the planner and a machine's measured rates.
"""

from collections.abc import Mapping

from greenroom.gguf import TensorInfo
from greenroom.models.config import ModelConfig
from greenroom.placement import predict
from greenroom.placement.budget import mib
from greenroom.placement.calibrate import MachineProfile
from greenroom.placement.placement import Placement
from greenroom.placement.work import Work

PROMPT, ANSWER = 512, 128  # tokens by which placements are compared
LEAST_GAIN = 1.05  # a GPU costs the CPU a thread, and nothing is predicted more closely


def worthwhile(
    found: Placement,
    tensors: Mapping[str, TensorInfo],
    config: ModelConfig,
    profile: MachineProfile,
) -> Placement:
    """The placement, or all layers on the CPU where the GPU has only some of them and is not
    predicted to be worth it."""
    if not found.mixed:
        return found
    work = Work.of(tensors, config)
    cpu = Placement("native", "", layers=found.layers)
    gain = _seconds(cpu, work, profile) / _seconds(found, work, profile)
    if gain >= LEAST_GAIN:
        return found
    head = " and the head" if found.head_on_gpu else ""
    reason = (
        f"computing on the CPU: {mib(found.vram or 0)} of VRAM hold {found.layers_on_gpu} of "
        f"{found.layers} layers{head}, and with those a prompt and its answer are predicted to "
        f"take {1 / gain:.0%} of the CPU's time, which is not worth it; a larger budget may be"
    )
    return Placement("native", reason, layers=found.layers)


def _seconds(place: Placement, work: Work, profile: MachineProfile) -> float:
    """Of a prompt and an answer."""
    prompt = predict.prefill(work, place, profile, PROMPT)
    token = predict.decode(work, place, profile, PROMPT + ANSWER // 2)
    return sum(prompt.parts.values()) + ANSWER * sum(token.parts.values())

"""Which class implements which `general.architecture`; imported only when a file asks for it."""

from greenroom.errors import ModelFileError, UnsupportedModelError
from greenroom.gguf import GGUFFile
from greenroom.models.config import ModelConfig

ARCHITECTURES: dict[str, str] = {
    "gpt-oss": "greenroom.models.gpt_oss:GptOss",
    "gptoss": "greenroom.models.gpt_oss:GptOss",  # as Ollama writes it
    "phimoe": "greenroom.models.phimoe:PhiMoe",
    "deepseek": "greenroom.models.deepseek:DeepSeek",
    "llama": "greenroom.models.llama:Llama",
    "qwen3moe": "greenroom.models.qwen3:Qwen3Moe",
    "qwen3": "greenroom.models.qwen3:Qwen3",
    "qwen2moe": "greenroom.models.qwen2:Qwen2Moe",
    "qwen2": "greenroom.models.qwen2:Qwen2",
    "olmoe": "greenroom.models.olmoe:OlMoe",
    "granitemoe": "greenroom.models.granitemoe:GraniteMoe",
}


def place_of(file: GGUFFile) -> str:
    """`module:class` of the file's architecture.

    Raises:
        UnsupportedModelError: it is not implemented.
    """
    architecture = file.metadata.get("general.architecture")
    place = ARCHITECTURES.get(architecture) if isinstance(architecture, str) else None
    if place is None:
        raise UnsupportedModelError(
            f"{file.path.name}: architecture {architecture!r:.40} is not implemented; "
            f"implemented: {', '.join(ARCHITECTURES)}"
        )
    return place


def read_config(file: GGUFFile) -> ModelConfig:
    """The configuration of an open file; errors name the file."""
    try:
        return ModelConfig.from_metadata(file.metadata, file.tensors)
    except (ModelFileError, UnsupportedModelError) as error:
        raise type(error)(f"{file.path.name}: {error}") from None

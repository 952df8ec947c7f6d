"""Which class implements which `general.architecture`; imported only when a file asks for it."""

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

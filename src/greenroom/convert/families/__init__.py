"""Which file converts which class of checkpoint; imported only when a config names it.

Adding a family adds one small file and its lines here.
"""

FAMILIES: dict[str, str] = {
    "LlamaForCausalLM": "greenroom.convert.families.llama:Llama",
    "MistralForCausalLM": "greenroom.convert.families.llama:Llama",
    "MixtralForCausalLM": "greenroom.convert.families.mixtral:Mixtral",
    "Qwen2ForCausalLM": "greenroom.convert.families.qwen:Qwen2",
    "Qwen2MoeForCausalLM": "greenroom.convert.families.qwen:Qwen2Moe",
    "Qwen3ForCausalLM": "greenroom.convert.families.qwen:Qwen3",
    "Qwen3MoeForCausalLM": "greenroom.convert.families.qwen:Qwen3Moe",
    "OlmoeForCausalLM": "greenroom.convert.families.olmoe:OlMoe",
    "GraniteMoeForCausalLM": "greenroom.convert.families.granitemoe:GraniteMoe",
    "GraniteMoeSharedForCausalLM": "greenroom.convert.families.granitemoe:GraniteMoe",
    "DeepseekForCausalLM": "greenroom.convert.families.deepseek:DeepSeek",
    "PhiMoEForCausalLM": "greenroom.convert.families.phimoe:PhiMoe",
    "PhimoeForCausalLM": "greenroom.convert.families.phimoe:PhiMoe",
    "GRIN-MoE": "greenroom.convert.families.phimoe:PhiMoe",
    "GRINMoEForCausalLM": "greenroom.convert.families.phimoe:PhiMoe",
    "GptOssForCausalLM": "greenroom.convert.families.gpt_oss:GptOss",
    "OpenAI original": "greenroom.convert.families.gpt_oss_original:GptOssOriginal",
}

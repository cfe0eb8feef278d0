"""Architectures of vLLM's registry that have no line in the table of families, and what was seen when it was tried.

Seen with vLLM 0.32 on CPU and transformers 5.19, with plain vLLM: expo had no part in any of it.
"""

from __future__ import annotations

REMOTE_CODE = "neither transformers nor vLLM has a class for its config: it is remote code of the hub"
_DRAFT = "a draft of speculative decoding, never the deployed model"
_BACKEND = "a name that vLLM gives itself for --model-impl transformers, which two lines of the table use"
_SPARSE = "vLLM has no sparse attention for CPU"
_PROCESSOR = "wants the image processor or tokenizer of a real checkpoint while it is built"
_CONFIG = "vLLM reads keys that the config class of transformers does not have: "
_CONFIG_CLASS = "the config that vLLM's own class makes by default lacks "
_PROJECTION = "has a projection that no class of transformers writes"
_MISTRAL = "ships in Mistral's own format (params.json), which has no config.json"


def _each(names: str, reason: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), reason)


LEFT_OUT: dict[str, str] = {
    **_each(
        "BeeForConditionalGeneration ClefOmniForJointSchema ColBERTJinaRobertaModel "
        "DeciLMForCausalLM "
        "Eagle2_5_VLForConditionalGeneration "
        "FireRedASR2ForConditionalGeneration FunASRForConditionalGeneration GLM4VForCausalLM GteNewModel "
        "GteNewForSequenceClassification H2OVLChatModel HCXVisionV2ForCausalLM HfMoondream "
        "InternVLChatModel InternS1ProForConditionalGeneration InternS2MobiusForConditionalGeneration "
        "InternS2PreviewForConditionalGeneration JinaVLForRanking "
        "K2HorizonForCausalLM KananaVForConditionalGeneration KeyeForConditionalGeneration "
        "KeyeVL1_5ForConditionalGeneration LlamaNemotronVLForSequenceClassification LlamaNemotronVLModel "
        "Llama_Nemotron_Nano_VL LlavaOnevision2ForConditionalGeneration "
        "MiMoV2OmniForCausalLM MiniCPMO MiniCPMV MolmoForCausalLM Molmo2ForConditionalGeneration "
        "MoonshotKimiaForCausalLM MossAudioModel NVLM_D NanbeigeForCausalLM NemotronH_Nano_Omni_Reasoning_V3 "
        "NemotronH_Nano_VL_V2 NemotronH_Super_Omni_Reasoning_V3 NemotronParseForConditionalGeneration "
        "OpenCUAForConditionalGeneration OpenPanguVLForConditionalGeneration Ovis2_5 Ovis2_6ForCausalLM "
        "Ovis2_6_MoeForCausalLM Phi3VForCausalLM Phi4ForCausalLMV Phi4MMForCausalLM "
        "RForConditionalGeneration "
        "SarvamMLAForCausalLM SkyworkR1VChatModel StepVLForConditionalGeneration TeleChat2ForCausalLM ",
        REMOTE_CODE,
    ),
    **_each(
        "BailingMoeV25MTPModel BailingMoeV3MTPModel DFlash2DraftModel DFlashDraftModel DFlashLagunaForCausalLM "
        "DFlashMuseGlimmerAssistantModel DSparkDraftModel DSparkV41DraftModel DeepSeekMTPModel DeepSeekV4MTPModel "
        "DeepseekV32MTPModel Dots3NoteMTPModel Eagle3DeepseekV2ForCausalLM Eagle3DeepseekV3ForCausalLM "
        "Eagle3LlamaForCausalLM Eagle3MiniMaxM2ForCausalLM Eagle3Qwen2_5vlForCausalLM Eagle3Qwen3ForCausalLM "
        "Eagle3Qwen3vlForCausalLM EagleCohereForCausalLM EagleDeepSeekMTPModel EagleLlama4ForCausalLM "
        "EagleLlamaForCausalLM EagleMiniCPMForCausalLM EagleMistralForCausalLM EagleMistralLarge3ForCausalLM "
        "ErnieMTPModel Exaone4_5_MTP ExaoneMoeMTP ExtractHiddenStatesModel Gemma4DSparkModel Gemma4MTPModel "
        "Glm4MoeLiteMTPModel Glm4MoeMTPModel Glm5NextMTPModel GlmOcrMTPModel HYV3MTPModel HYV4MTPModel InklingMTPModel "
        "InternS2MobiusMTP K3DSparkModel KimiK3MTPModel LiLiCorrDraftModel LlamaForCausalLMEagle3 LongCatFlashMTPModel "
        "MedusaModel MiMoMTPModel MiMoV2MTPModel MiMoV2OmniMTPModel MiniMaxM3MTP MuseGlimmerAssistantModel "
        "NemotronHMTPModel OpenPanguMTPModel PEagleDraftModel PeagleLlamaForCausalLM PeagleQwen3ForCausalLM "
        "Qwen3DSparkModel Qwen3NextMTP Qwen3OmniDSparkModel Qwen3_5MTP Qwen3_5MoeMTP Qwen4ExpMTP Step3p5MTP",
        _DRAFT,
    ),
    **_each(
        "TransformersForCausalLM TransformersMoEForCausalLM TransformersMultiModalForCausalLM "
        "TransformersMultiModalMoEForCausalLM TransformersEmbeddingModel TransformersMoEEmbeddingModel "
        "TransformersMultiModalEmbeddingModel TransformersForSequenceClassification "
        "TransformersMoEForSequenceClassification TransformersMultiModalForSequenceClassification",
        _BACKEND,
    ),
    **_each("DeepseekV32ForCausalLM GlmMoeDsaForCausalLM HYV4ForCausalLM", _SPARSE),
    **_each(
        "ColModernVBertForRetrieval ColQwen3 ColQwen3_5 HunYuanVLForConditionalGeneration OpsColQwen3Model "
        "Qwen3VLNemotronEmbedModel VibeVoiceAsrForConditionalGeneration",
        _PROCESSOR,
    ),
    **_each("HF_ColBERT JinaForRanking VoyageQwen3BidirectionalEmbedModel", _PROJECTION),
    **_each("MistralLarge3ForCausalLM PixtralForConditionalGeneration VoxtralRealtimeGeneration", _MISTRAL),
    "BailingMoeV3VLForConditionalGeneration": "vLLM refuses the default config: layer_types against layer_group_size",
    "BailingMoeV3ForCausalLM": "transformers does not know vLLM's own config class for it",
    "BgeM3EmbeddingModel": "takes further weights from pickle files (sparse_linear.pt), which are never opened",
    "Cosmos3ForConditionalGeneration": "ships its weights in folders of their own (transformer, vision_encoder)",
    "DeepseekOCR2ForCausalLM": _CONFIG_CLASS + "num_attention_heads",
    "DeepseekOCRForCausalLM": _CONFIG_CLASS + "num_attention_heads",
    "DeepseekV4ForConditionalGeneration": "plain vLLM 0.32 refuses it: it does not support generating with this class",
    "LongcatFlashNgramForCausalLM": "needs the V2 model runner of vLLM, which is for GPUs",
    "Qwen3ASRForcedAlignerForTokenClassification": _CONFIG + "the number of classes",
    "Terratorch": "needs the package terratorch",
    "CohereAsrForConditionalGeneration": "needs torchaudio, which has no build for this torch",
    "CohereCompassForConditionalGeneration": "transformers refuses its own default config: KeyError full_attention",
    "Cosmos3EdgeForConditionalGeneration": _CONFIG + "rope_parameters of its text part",
    "DbrxForCausalLM": "plain vLLM 0.32 cannot load it: KeyError blocks.0.ffn.experts.w13_weight",
    "DeepseekV4ForCausalLM": "transformers and vLLM spell mlp_layer_types differently: neither takes the other's",
    "DeepseekV41ForCausalLM": _CONFIG_CLASS + "hidden_size",
    "DeepseekVLV2ForCausalLM": _CONFIG_CLASS + "num_attention_heads",
    "DiffusionGemmaForBlockDiffusion": "transformers cannot build its own default config: a size is None",
    "DotsOCRForCausalLM": "vLLM's config class is not registered with transformers under its own model type",
    "Dots3NoteForCausalLM": "needs vllm_flash_attn, which is for NVIDIA GPUs",
    "Emu3ForConditionalGeneration": "transformers cannot build it from its own default config",
    "Ernie4_5_VLMoeForConditionalGeneration": "transformers cannot build it from its own default config",
    "FunAudioChatForConditionalGeneration": "vLLM's class refuses its own default config: a size is None",
    "Gemma3nForConditionalGeneration": "its tower (timm's MobileNet) has one size: 40 s; run by hand, bits equal",
    "Glm5NextForCausalLM": _SPARSE,
    "Glm5NextForConditionalGeneration": _SPARSE,
    "Granite4VisionForConditionalGeneration": "transformers cannot build it from its own default config",
    "InklingForCausalLM": "vLLM's implementations are for NVIDIA and AMD GPUs",
    "InklingForConditionalGeneration": "vLLM's implementations are for NVIDIA and AMD GPUs",
    "IsaacForConditionalGeneration": "vLLM's class refuses its own default config",
    "KimiK3ForConditionalGeneration": "needs cutlass, which is for NVIDIA GPUs",
    "KimiLinearForCausalLM": "needs cutlass, which is for NVIDIA GPUs",
    "LightOnOCRForConditionalGeneration": _CONFIG + "projector_hidden_act",
    "MiDashengLMModel": "needs torchaudio, which has no build for this torch",
    "MiniMaxM3SparseForCausalLM": "transformers does not know vLLM's own config class for it",
    "MiniMaxM3SparseForConditionalGeneration": _CONFIG + "img_token_compression_config",
    "Moondream3ForCausalLM": "vLLM's class does not read the config that it writes: a part stays a dict",
    "MossTranscribeDiarizeForConditionalGeneration": "fuses its audio tower's projections without saying how",
    "MuseGlimmerForConditionalGeneration": "its vision tower has one size: output_dim is fixed to 6144",
    "NemotronH_Omni_Reasoning_V3": _CONFIG + "patch_size",
    "OlmoHybridForCausalLM": "needs triton.set_allocator, and CPU has no Triton",
    "OpenVLAForActionPrediction": "its towers (of timm) have one size: 110 s; run by hand, bits and tokens equal",
    "Ovis": _CONFIG_CLASS + "hidden_size",
    "QianfanOCRForConditionalGeneration": "transformers and vLLM read image_size differently: a list against a number",
    "Qwen3OmniMoeForConditionalGeneration": _CONFIG + "image_size of its vision part",
    "Qwen4ExpForCausalLM": "its attention needs FlashAttention, which is for NVIDIA GPUs",
    "Qwen4ExpForConditionalGeneration": "its attention needs FlashAttention, which is for NVIDIA GPUs",
    "Rnj1ForCausalLM": "vLLM's attention for CPU does not take chunk_lookback",
    "Step1ForCausalLM": "vLLM's attention for CPU does not take use_alibi_sqrt",
    "Step3TextForCausalLM": "vLLM's class does not read the config that it writes: a list where it wants text",
    "Step3VLForConditionalGeneration": "vLLM's config class names no architecture for its text part",
    "Step3p5ForCausalLM": "vLLM's class refuses its own default config",
    "Step3p7ForConditionalGeneration": _CONFIG + "output_dim of its vision part",
    "UltravoxModel": _CONFIG_CLASS + "vocab_size; its language model comes from the hub",
    "UnlimitedOCRForCausalLM": _CONFIG_CLASS + "num_attention_heads",
    "VoxtralForConditionalGeneration": _CONFIG + "downsample_factor, window_size",
}

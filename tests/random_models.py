"""A random model of each architecture with a row, three layers deep; and some without one."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from conftest import byte_level_tokenizer
from lightning_blue.language_model.multimodal import auto_class

TOKENS = {"vocab_size": 480, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 479}
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "initializer_range": 0.2,
}
GROUPED = {**SIZES, "num_key_value_heads": 2, "head_dim": 8}
GPT = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_inner": 64, "n_positions": 64}
FALCON = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
GEMMA = {
    **GROUPED,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 8,
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
OPT = {**SIZES, "ffn_dim": 64, "init_std": 0.2}
EXPERTS = {**GROUPED, "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
LATENT = {
    **EXPERTS,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 2,
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
EYES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def seeing(text: dict[str, Any], model_type: str, eyes: str) -> dict[str, Any]:
    """A model that sees, around a text model."""
    return {
        "text_config": {**TOKENS, **text, "model_type": model_type},
        "vision_config": {**EYES, "model_type": eyes},
        "image_token_index": 470,
    }


SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {**GPT, "initializer_range": 0.2}),
    "gptj": ("gptj", {**GPT, "rotary_dim": 4, "initializer_range": 0.2}),
    "gpt_neox": ("gpt_neox", SIZES),
    "opt": ("opt", {**OPT, "word_embed_proj_dim": 32}),
    "opt, norms behind": ("opt", {**OPT, "word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "bloom": ("bloom", {"hidden_size": 32, "n_layer": 3, "n_head": 4, "initializer_range": 0.2}),
    "falcon": ("falcon", {**FALCON, "initializer_range": 0.2}),
    "falcon, alibi": (
        "falcon",
        {**FALCON, "alibi": True, "parallel_attn": False, "bias": True, "initializer_range": 0.2},
    ),
    "mpt": (
        "mpt",
        {"d_model": 32, "n_layers": 3, "n_heads": 4, "max_seq_len": 64, "initializer_range": 0.2},
    ),
    "llama": ("llama", GROUPED),
    "llama, tied head": ("llama", {**GROUPED, "tie_word_embeddings": True}),
    "mistral": ("mistral", {**GROUPED, "sliding_window": None}),
    "mistral, short window": ("mistral", {**GROUPED, "sliding_window": 4}),
    "qwen2": ("qwen2", GROUPED),
    "qwen3": ("qwen3", GROUPED),
    "phi": ("phi", SIZES),
    "phi3": ("phi3", GROUPED),
    "gemma": ("gemma", {**GROUPED, "tie_word_embeddings": True}),
    "gemma2": ("gemma2", GEMMA),
    "gemma3_text": ("gemma3_text", GEMMA),
    "cohere": ("cohere", {**GROUPED, "logit_scale": 1.0}),
    "exaone4": ("exaone4", GROUPED),
    "glm4": ("glm4", GROUPED),
    "granite": ("granite", {**GROUPED, "residual_multiplier": 0.22}),
    "olmo2": ("olmo2", GROUPED),
    "smollm3": ("smollm3", GROUPED),
    "starcoder2": ("starcoder2", GROUPED),
    "gemma3 that sees": ("gemma3", seeing(GEMMA, "gemma3_text", "siglip_vision_model")),
    "llava": ("llava", seeing(GROUPED, "llama", "clip_vision_model")),
    "mistral3": ("mistral3", seeing(GROUPED, "mistral", "pixtral")),
    "qwen2_5_vl_text": (
        "qwen2_5_vl",
        {
            "text_config": {
                **TOKENS,
                **GROUPED,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 10_000.0,
                    "mrope_section": [1, 1, 2],
                },
            },
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 64,
                "depth": 1,
                "num_heads": 2,
                "out_hidden_size": 32,
            },
        },
    ),
    "qwen2_moe": ("qwen2_moe", {**EXPERTS, "mlp_only_layers": [0, 2]}),
    "qwen3_moe": ("qwen3_moe", {**EXPERTS, "mlp_only_layers": [0, 2]}),
    "deepseek_v2": ("deepseek_v2", LATENT),
    "deepseek_v3": ("deepseek_v3", LATENT),
}

OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "stablelm": ("stablelm", {**SIZES, "num_key_value_heads": 2}),
    "mixtral": ("mixtral", {**GROUPED, "num_local_experts": 4}),
    "gpt_oss": ("gpt_oss", {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe, all": (
        "qwen2_moe",
        {**EXPERTS, "shared_expert_intermediate_size": 48, "decoder_sparse_step": 1},
    ),
    "qwen3_moe, all": ("qwen3_moe", EXPERTS),
}


@cache
def tokenizer(bos: bool) -> PreTrainedTokenizerBase:
    """The byte-level tokenizer of all of them."""
    return byte_level_tokenizer(bos=bos)


def configuration(name: str) -> PreTrainedConfig:
    """Return the configuration of a name in SETTINGS or OTHERS."""
    model_type, settings = (SETTINGS | OTHERS)[name]
    tokens = {} if "text_config" in settings else TOKENS
    return AutoConfig.for_model(model_type, **tokens, **settings)


def random_model(name: str) -> PreTrainedModel:
    """Make the model of a name, the same each time, in eval mode."""
    config = configuration(name)
    torch.manual_seed(0)
    return auto_class(config).from_config(config).eval()


def saved(model: PreTrainedModel, folder: Path) -> str:
    """Save a model with the tokenizer; return the folder's name."""
    model.save_pretrained(folder)
    tokenizer(bos=True).save_pretrained(folder)
    return str(folder)

"""Tiny configs of every Mixture-of-Experts type of the installed transformers, made from its own config classes.

A field gets the value that `SIZES` has under its name, whatever the family; `CHANGES` holds what a type needs beyond.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING
from transformers.models.auto.configuration_auto import model_type_to_module_name
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

_HYBRID = ["linear_attention", "full_attention"] * 2
SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "unpadded_vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_layers": 4,
    "num_attention_heads": 4,
    "swa_num_attention_heads": 4,
    "num_key_value_heads": 2,
    "swa_num_key_value_heads": 2,
    "head_dim": 16,
    "swa_head_dim": 16,
    "max_position_embeddings": 512,
    "sliding_window": 8,
    "sliding_window_size": 8,
    # Feed-forward
    "intermediate_size": 48,
    "dense_intermediate_size": 48,
    "ffn_hidden_size": 48,
    "moe_intermediate_size": 32,
    "expert_ffn_hidden_size": 32,
    "moe_hidden_size": 32,
    "shared_expert_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "share_expert_dim": 32,
    "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    # Routing
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "top_k_experts": 2,
    "n_group": 2,
    "num_expert_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    # Latent and indexed attention
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "index_head_dim": 16,
    "index_n_heads": 16,  # few would often agree on no token at all, and ties be broken by chance
    "index_topk": 8,
    # Recurrent layers
    "linear_num_heads": 4,
    "linear_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "mamba_n_heads": 8,
    "mamba_num_heads": 8,
    "mamba_d_head": 16,
    "mamba_head_dim": 16,
    "mamba_d_state": 16,
    "ssm_state_size": 16,
    # Encoders of images and sound, which a text never reaches
    "depth": 1,
    "num_heads": 4,
    "out_hidden_size": 64,
    "text_hidden_size": 64,
    "encoder_layers": 1,
    "adapter_in_dim": 64,
    "adapter_input_size": 64,
    "adapter_out_dim": 64,
    # Tokens
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CHANGES: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_types": _HYBRID},
    "dbrx": {
        "d_model": 64,
        "n_layers": 4,
        "n_heads": 4,
        "max_seq_len": 512,
        "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 32, "moe_num_experts": 8, "moe_top_k": 2},
    },
    "deepseek_ocr2_text": {"num_key_value_heads": 4, "head_dim": 16},
    "deepseek_v4": {
        "num_key_value_heads": 1,
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
        "mlp_layer_types": ["hash_moe", "hash_moe", "moe", "moe"],
        "o_groups": 2,
        "o_lora_rank": 16,
    },
    "doge": {"is_moe": True, "num_experts": 16},
    "dots3_note_text": {"per_layer_config": {}, "head_dim": 16},
    "ernie4_5_vl_moe_text": {
        "moe_intermediate_size": [32, 16],
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 3, 2]},
    },
    "gemma4_text": {"enable_moe_block": True, "hidden_size_per_layer_input": 0},
    "glm4v_moe_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}},
    "glm5_next_text": {
        "index_kpool": 4,
        "qk_rope_head_dim": 0,
        "layer_types": ["linear_attention", "indexed_attention"] * 2,
        "indexer_types": ["full"] * 4,
    },
    "granitemoehybrid": {"layer_types": _HYBRID},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"layer_types": _HYBRID},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"zero_expert_num": 4, "head_dim": 8},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 125},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "step3p5": {"sliding_window": 8},
    "zaya": {"num_experts_per_tok": 1},
}


def moe_types() -> list[str]:
    """The model types that generate text and whose modelling file defines experts, vision-language ones included."""
    generating = {**MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, **MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}
    return sorted(name for name in CONFIG_MAPPING if name in generating and _defines_experts(name))


def _defines_experts(model_type: str) -> bool:
    module = model_type_to_module_name(model_type)
    spec = importlib.util.find_spec(f"transformers.models.{module}")
    assert spec is not None and spec.origin is not None, module
    file = Path(spec.origin).parent / f"modeling_{module}.py"
    return file.is_file() and re.search(r"^class \w*(Experts?|MoE|Moe)\(", file.read_text("utf-8"), re.M) is not None


def tiny_config(model_type: str, **changes: Any) -> Any:
    """The config of a tiny model of a type."""
    return _tiny(CONFIG_MAPPING[model_type], CHANGES.get(model_type, {}) | changes)


def _tiny(cls: Any, changes: dict[str, Any]) -> Any:
    fields = {field.name for field in dataclasses.fields(cls)}
    values, usual = {name: value for name, value in SIZES.items() if name in fields}, cls()
    if "kv_lora_rank" in fields:
        values["num_key_value_heads"] = values["num_attention_heads"]
    if "sliding_window" in fields and not usual.sliding_window:
        del values["sliding_window"]
    for name in cls.sub_configs.keys() - changes.keys():
        part = getattr(usual, name)
        if part is not None:
            values[name] = _tiny(type(part), CHANGES.get(part.model_type, {})).to_dict()
    return cls(**(values | changes))

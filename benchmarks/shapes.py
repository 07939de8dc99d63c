"""Layer shapes of published MoE models, as the `config.json` that transformers reads, and their GGUF counterparts.

Only the vocabulary is ours (small, so that a few layers are not dwarfed by embeddings) and the number of layers is
free.
"""

from __future__ import annotations

from typing import Any, NamedTuple

VOCABULARY = 8192


class Shape(NamedTuple):
    """One published architecture. `full_layers` is the real model's number of layers."""

    name: str
    full_layers: int
    gguf_arch: str | None
    """llama.cpp's name of the architecture, or None where `synthesize` writes no GGUF."""
    config: dict[str, Any]
    codec: str = "int4-g32"
    """What its experts are in our store: as published where that is a format of four bits."""

    def config_json(self, layers: int) -> dict[str, Any]:
        """The content of config.json for `layers` layers."""
        config = {
            **self.config,
            "num_hidden_layers": layers,
            "vocab_size": VOCABULARY,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "bos_token_id": None,
            "eos_token_id": 257,
            "pad_token_id": 256,
        }
        if "layer_types" in config:
            config["layer_types"] = [config["layer_types"][i % 2] for i in range(layers)]
        return config


_SHAPES = (
    Shape(
        "qwen3-30b-a3b",
        48,
        "qwen3moe",
        {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        },
    ),
    Shape(
        "mixtral-8x7b",
        32,
        "llama",
        {
            "architectures": ["MixtralForCausalLM"],
            "model_type": "mixtral",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "sliding_window": None,
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        },
    ),
    Shape(
        "olmoe",
        16,
        "olmoe",
        {
            "architectures": ["OlmoeForCausalLM"],
            "model_type": "olmoe",
            "hidden_size": 2048,
            "intermediate_size": 1024,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "norm_topk_prob": False,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
    Shape(
        "gpt-oss-20b",
        24,
        "gpt-oss",
        {
            "architectures": ["GptOssForCausalLM"],
            "model_type": "gpt_oss",
            "hidden_size": 2880,
            "intermediate_size": 2880,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "num_local_experts": 32,
            "num_experts_per_tok": 4,
            "hidden_act": "silu",
            "swiglu_limit": 7.0,
            "attention_bias": True,
            "sliding_window": 128,
            "layer_types": ["sliding_attention", "full_attention"],
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 150000.0},
        },
        "mxfp4",
    ),
)
SHAPES = {shape.name: shape for shape in _SHAPES}

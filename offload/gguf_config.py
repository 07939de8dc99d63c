"""config.json out of the metadata of a GGUF file: one function per architecture.

Metadata keys are documented at https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; what a file does not say is
what llama.cpp's graph of that architecture does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .errors import DataError
from .gguf_file import GgufFile

_SIGMOID = 2  # llama.cpp's LLAMA_EXPERT_GATING_FUNC_TYPE_SIGMOID


def model_config(file: GgufFile) -> dict[str, Any]:
    """The content of config.json.

    Raises:
        DataError: an architecture that is not known here, a dense model, or metadata that is missing or not supported.
    """
    family = _FAMILIES.get(file.architecture)
    if family is None:
        raise DataError(
            f"{file.path} is of architecture {file.architecture!r}; GGUF files of {', '.join(sorted(_FAMILIES))} can "
            "be read, other families as Hugging Face checkpoints"
        )
    if not file.field("expert_count", 0):
        raise DataError(f"{file.path} is dense: it has no routed experts, so there is nothing to offload")
    if "rope_freqs.weight" in file.tensors:
        raise DataError(f"{file.path} has its own rotary frequencies (rope_freqs.weight), which are not supported")
    return _common(file) | family(file)


def decimal(value: float) -> float:
    """The decimal number that was meant by a float32."""
    return float(f"{value:.6g}")


def _common(file: GgufFile) -> dict[str, Any]:
    heads = _single(file, "attention.head_count")
    return {
        "vocab_size": _shape(file, "token_embd.weight")[0],
        "hidden_size": file.field("embedding_length"),
        "intermediate_size": _single(file, "feed_forward_length", 0),
        "num_hidden_layers": file.field("block_count") - file.field("nextn_predict_layers", 0),
        "num_attention_heads": heads,
        "num_key_value_heads": _single(file, "attention.head_count_kv", heads),
        "head_dim": file.field("attention.key_length", file.field("embedding_length") // heads),
        "hidden_act": "silu",
        "max_position_embeddings": file.field("context_length"),
        "rms_norm_eps": decimal(file.field("attention.layer_norm_rms_epsilon")),
        "rope_parameters": _rope(file),
        "num_experts_per_tok": file.field("expert_used_count"),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "bos_token_id": file.fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": file.fields.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": file.fields.get("tokenizer.ggml.padding_token_id"),
    }


def _single(file: GgufFile, key: str, default: Any = None) -> int:
    """A number that some architectures give for each layer."""
    value = file.field(key, default)
    numbers = set(value) if isinstance(value, list) else {value}
    if len(numbers) != 1:
        raise DataError(f"{file.path} has layers of different {key}, which is not supported")
    return numbers.pop()


def _shape(file: GgufFile, name: str) -> tuple[int, ...]:
    if name not in file.tensors:
        raise DataError(f"{file.path} has no tensor {name}; is a part missing?")
    return file.tensors[name].shape


def _rope(file: GgufFile) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": decimal(file.field("rope.freq_base", 10000.0))}
    kind = file.field("rope.scaling.type", "none")
    if kind == "none":
        return rope
    if kind not in ("linear", "yarn"):
        raise DataError(f"{file.path} scales its rotary positions by {kind!r}, which is not supported")
    rope |= {"rope_type": kind, "factor": decimal(file.field("rope.scaling.factor"))}
    if kind == "yarn":
        rope["original_max_position_embeddings"] = file.field(
            "rope.scaling.original_context_length", file.field("context_length")
        )
        for name in ("beta_fast", "beta_slow"):
            if value := file.field(f"rope.scaling.yarn_{name}", 0):
                rope[name] = decimal(value)
    return rope


def _some(file: GgufFile, suffix: str) -> str:
    """The name of the first layer's tensor of that kind."""
    names = (name for name in file.tensors if name.startswith("blk.") and name.endswith(f".{suffix}"))
    return min(names, key=lambda name: int(name.split(".")[1]), default=f"blk.*.{suffix}")


def _expert_width(file: GgufFile) -> int:
    return _shape(file, _some(file, "ffn_down_exps.weight"))[-1]


def _has(file: GgufFile, suffix: str) -> bool:
    return _some(file, suffix) in file.tensors


def _dense_layers(file: GgufFile) -> list[int]:
    return [i for i in range(file.field("block_count")) if f"blk.{i}.ffn_gate_inp.weight" not in file.tensors]


def _mixtral(file: GgufFile) -> dict[str, Any]:
    if any(name.startswith("blk.0.ffn_gate.") and name != "blk.0.ffn_gate.weight" for name in file.tensors):
        raise DataError(f"{file.path} has one tensor per expert, as files before April 2024; get a newer one")
    return {
        "model_type": "mixtral",
        "intermediate_size": _expert_width(file),
        "num_local_experts": file.field("expert_count"),
        "sliding_window": None,
    }


def _qwen(file: GgufFile) -> dict[str, Any]:
    """What both generations have in common."""
    return {
        "num_experts": file.field("expert_count"),
        "moe_intermediate_size": _expert_width(file),
        "mlp_only_layers": _dense_layers(file),
        "use_sliding_window": False,
    }


def _qwen2_moe(file: GgufFile) -> dict[str, Any]:
    return _qwen(file) | {
        "model_type": "qwen2_moe",
        "shared_expert_intermediate_size": _shape(file, _some(file, "ffn_gate_shexp.weight"))[0],
        "norm_topk_prob": file.field("expert_weights_norm", False),
        "qkv_bias": _has(file, "attn_q.bias"),
    }


def _qwen3_moe(file: GgufFile) -> dict[str, Any]:
    attention_bias = _has(file, "attn_q.bias")
    return _qwen(file) | {"model_type": "qwen3_moe", "norm_topk_prob": True, "attention_bias": attention_bias}


def _olmoe(file: GgufFile) -> dict[str, Any]:
    return {
        "model_type": "olmoe",
        "intermediate_size": _expert_width(file),
        "num_experts": file.field("expert_count"),
        "norm_topk_prob": file.field("expert_weights_norm", False),
        "clip_qkv": file.field("attention.clamp_kqv", 0) or None,
        "attention_bias": _has(file, "attn_q.bias"),
    }


def _grouped(file: GgufFile) -> dict[str, Any]:
    """What DeepSeek's kind of routing has in common."""
    return {
        "n_routed_experts": file.field("expert_count"),
        "n_shared_experts": file.field("expert_shared_count", 0),
        "moe_intermediate_size": _expert_width(file),
        "first_k_dense_replace": file.field("leading_dense_block_count", 0),
        "norm_topk_prob": file.field("expert_weights_norm", False),
        "routed_scaling_factor": decimal(file.field("expert_weights_scale", 1.0)),
        "n_group": file.field("expert_group_count", 1),
        "topk_group": file.field("expert_group_used_count", 1),
    }


def _deepseek(file: GgufFile) -> dict[str, Any]:
    rotary = file.field("rope.dimension_count")
    key = file.field("attention.key_length_mla", file.field("attention.key_length"))
    sigmoid = file.field("expert_gating_func", 1) == _SIGMOID
    config = _grouped(file) | {
        "model_type": "deepseek_v3" if sigmoid else "deepseek_v2",
        "num_key_value_heads": _single(file, "attention.head_count"),  # files for absorbed attention say 1
        "head_dim": rotary,
        "q_lora_rank": file.field("attention.q_lora_rank", 0) or None,
        "kv_lora_rank": file.field("attention.kv_lora_rank"),
        "qk_rope_head_dim": rotary,
        "qk_nope_head_dim": key - rotary,
        "v_head_dim": file.field("attention.value_length_mla", file.field("attention.value_length")),
        "attention_bias": _has(file, "attn_q_a.bias") or _has(file, "attn_kv_a_mqa.bias"),
    }
    if not sigmoid:
        config["topk_method"] = "group_limited_greedy" if config["n_group"] > 1 else "greedy"
    if multiplier := file.field("rope.scaling.yarn_log_multiplier", 0):
        mscale = decimal(multiplier * 10)  # llama.cpp keeps 0.1 * mscale_all_dim and takes mscale to be the same
        config["rope_parameters"] = _rope(file) | {"mscale": mscale, "mscale_all_dim": mscale}
    return config


def _glm4_moe(file: GgufFile) -> dict[str, Any]:
    head = file.field("attention.key_length")
    rotary = file.field("rope.dimension_count", head) / head
    return _grouped(file) | {
        "model_type": "glm4_moe",
        "rope_parameters": _rope(file) | {"partial_rotary_factor": rotary},
        "attention_bias": _has(file, "attn_q.bias"),
        "use_qk_norm": _has(file, "attn_q_norm.weight"),
        "norm_topk_prob": file.field("expert_weights_norm", True),
    }


def _gpt_oss(file: GgufFile) -> dict[str, Any]:
    rope = _rope(file)
    if rope["rope_type"] == "yarn":
        rope = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": False} | rope
    layers = range(file.field("block_count"))
    return {
        "model_type": "gpt_oss",
        "intermediate_size": _expert_width(file),
        "num_local_experts": file.field("expert_count"),
        "rope_parameters": rope,
        "sliding_window": file.field("attention.sliding_window"),
        "layer_types": ["full_attention" if i % 2 else "sliding_attention" for i in layers],
        "attention_bias": True,
    }


_FAMILIES: dict[str, Callable[[GgufFile], dict[str, Any]]] = {
    "llama": _mixtral,
    "qwen2moe": _qwen2_moe,
    "qwen3moe": _qwen3_moe,
    "olmoe": _olmoe,
    "deepseek2": _deepseek,
    "glm4moe": _glm4_moe,
    "gpt-oss": _gpt_oss,
}

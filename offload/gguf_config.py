"""config.json out of the metadata of a GGUF file: one function per architecture.

Metadata keys are documented at https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; what a file does not say is
what llama.cpp's graph of that architecture does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .errors import DataError
from .gguf_file import GgufFile, decimal

_SIGMOID = 2  # llama.cpp's LLAMA_EXPERT_GATING_FUNC_TYPE_SIGMOID
_HEADS = "attention.head_count"


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
    if not file.count("expert_count", 0):
        raise DataError(f"{file.path} is dense: it has no routed experts, so there is nothing to offload")
    if "rope_freqs.weight" in file.tensors:
        raise DataError(f"{file.path} has its own rotary frequencies (rope_freqs.weight), which are not supported")
    return _common(file) | family(file)


def _common(file: GgufFile) -> dict[str, Any]:
    vocabulary, hidden, heads = _shape(file, "token_embd.weight")[0], file.count("embedding_length"), file.count(_HEADS)
    blocks, not_run = file.count("block_count"), file.count("nextn_predict_layers", 0)
    experts, used = file.count("expert_count"), file.count("expert_used_count")
    if not not_run < blocks <= len(file.tensors):
        raise file.wrong("block_count", blocks, f"more than {not_run} and at most its {len(file.tensors)} tensors")
    if used > experts:
        raise file.wrong("expert_used_count", used, f"at most the {experts} experts of a layer")
    return {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": file.count("feed_forward_length", 0),
        "num_hidden_layers": blocks - not_run,
        "num_attention_heads": heads,
        "num_key_value_heads": file.count("attention.head_count_kv", heads),
        "head_dim": file.count("attention.key_length", hidden // heads or 1),
        "hidden_act": "silu",
        "max_position_embeddings": file.count("context_length"),
        "rms_norm_eps": file.number("attention.layer_norm_rms_epsilon"),
        "rope_parameters": _rope(file),
        "num_experts_per_tok": used,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "bos_token_id": _token(file, "bos", vocabulary),
        "eos_token_id": _token(file, "eos", vocabulary),
        "pad_token_id": _token(file, "padding", vocabulary),
    }


def _token(file: GgufFile, role: str, vocabulary: int) -> int | None:
    """A special token, if the vocabulary has it."""
    index = file.fields.get(f"tokenizer.ggml.{role}_token_id")
    return index if isinstance(index, int) and 0 <= index < vocabulary else None


def _shape(file: GgufFile, name: str) -> tuple[int, ...]:
    if name not in file.tensors:
        raise DataError(f"{file.path} has no tensor {name}; is a part missing?")
    return file.tensors[name].shape


def _rope(file: GgufFile) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": file.number("rope.freq_base", 10000.0)}
    kind = file.field("rope.scaling.type", "none")
    if kind == "none":
        return rope
    if kind not in ("linear", "yarn"):
        raise DataError(f"{file.path} scales its rotary positions by {kind!r}, which is not supported")
    rope |= {"rope_type": kind, "factor": file.number("rope.scaling.factor")}
    if kind == "yarn":
        rope["original_max_position_embeddings"] = file.count(
            "rope.scaling.original_context_length", file.count("context_length")
        )
        for name in ("beta_fast", "beta_slow"):
            if value := file.number(f"rope.scaling.yarn_{name}", 0):
                rope[name] = value
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
    return [i for i in range(file.count("block_count")) if f"blk.{i}.ffn_gate_inp.weight" not in file.tensors]


def _mixtral(file: GgufFile) -> dict[str, Any]:
    if any(name.startswith("blk.0.ffn_gate.") and name != "blk.0.ffn_gate.weight" for name in file.tensors):
        raise DataError(f"{file.path} has one tensor per expert, as files before April 2024; get a newer one")
    return {
        "model_type": "mixtral",
        "intermediate_size": _expert_width(file),
        "num_local_experts": file.count("expert_count"),
        "sliding_window": None,
    }


def _qwen(file: GgufFile) -> dict[str, Any]:
    """What both generations have in common."""
    return {
        "num_experts": file.count("expert_count"),
        "moe_intermediate_size": _expert_width(file),
        "mlp_only_layers": _dense_layers(file),
        "use_sliding_window": False,
    }


def _qwen2_moe(file: GgufFile) -> dict[str, Any]:
    return _qwen(file) | {
        "model_type": "qwen2_moe",
        "shared_expert_intermediate_size": _shape(file, _some(file, "ffn_gate_shexp.weight"))[0],
        "norm_topk_prob": file.flag("expert_weights_norm", False),
        "qkv_bias": _has(file, "attn_q.bias"),
    }


def _qwen3_moe(file: GgufFile) -> dict[str, Any]:
    attention_bias = _has(file, "attn_q.bias")
    return _qwen(file) | {"model_type": "qwen3_moe", "norm_topk_prob": True, "attention_bias": attention_bias}


def _olmoe(file: GgufFile) -> dict[str, Any]:
    return {
        "model_type": "olmoe",
        "intermediate_size": _expert_width(file),
        "num_experts": file.count("expert_count"),
        "norm_topk_prob": file.flag("expert_weights_norm", False),
        "clip_qkv": file.number("attention.clamp_kqv", 0) or None,
        "attention_bias": _has(file, "attn_q.bias"),
    }


def _grouped(file: GgufFile) -> dict[str, Any]:
    """What DeepSeek's kind of routing has in common."""
    return {
        "n_routed_experts": file.count("expert_count"),
        "n_shared_experts": file.count("expert_shared_count", 0),
        "moe_intermediate_size": _expert_width(file),
        "first_k_dense_replace": file.count("leading_dense_block_count", 0),
        "norm_topk_prob": file.flag("expert_weights_norm", False),
        "routed_scaling_factor": file.number("expert_weights_scale", 1.0),
        "n_group": file.count("expert_group_count", 1),
        "topk_group": file.count("expert_group_used_count", 1),
    }


def _deepseek(file: GgufFile) -> dict[str, Any]:
    rotary = file.count("rope.dimension_count")
    key = file.count("attention.key_length_mla", file.count("attention.key_length"))
    sigmoid = file.count("expert_gating_func", 0) == _SIGMOID
    if rotary >= key:
        raise file.wrong("rope.dimension_count", rotary, f"less than the {key} columns of a key")
    config = _grouped(file) | {
        "model_type": "deepseek_v3" if sigmoid else "deepseek_v2",
        "num_key_value_heads": file.count(_HEADS),  # files for absorbed attention say 1
        "head_dim": rotary,
        "q_lora_rank": file.count("attention.q_lora_rank", 0) or None,
        "kv_lora_rank": file.count("attention.kv_lora_rank"),
        "qk_rope_head_dim": rotary,
        "qk_nope_head_dim": key - rotary,
        "v_head_dim": file.count("attention.value_length_mla", file.count("attention.value_length")),
        "attention_bias": _has(file, "attn_q_a.bias") or _has(file, "attn_kv_a_mqa.bias"),
    }
    if not sigmoid:
        config["topk_method"] = "group_limited_greedy" if config["n_group"] > 1 else "greedy"
    if multiplier := file.number("rope.scaling.yarn_log_multiplier", 0):
        mscale = decimal(multiplier * 10)  # llama.cpp keeps 0.1 * mscale_all_dim and takes mscale to be the same
        config["rope_parameters"] = _rope(file) | {"mscale": mscale, "mscale_all_dim": mscale}
    return config


def _glm4_moe(file: GgufFile) -> dict[str, Any]:
    head = file.count("attention.key_length")
    rotary = file.count("rope.dimension_count", head) / head
    return _grouped(file) | {
        "model_type": "glm4_moe",
        "rope_parameters": _rope(file) | {"partial_rotary_factor": rotary},
        "attention_bias": _has(file, "attn_q.bias"),
        "use_qk_norm": _has(file, "attn_q_norm.weight"),
        "norm_topk_prob": file.flag("expert_weights_norm", True),
    }


def _gpt_oss(file: GgufFile) -> dict[str, Any]:
    rope = _rope(file)
    if rope["rope_type"] == "yarn":
        rope = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": False} | rope
    layers = range(file.count("block_count"))
    return {
        "model_type": "gpt_oss",
        "intermediate_size": _expert_width(file),
        "num_local_experts": file.count("expert_count"),
        "rope_parameters": rope,
        "sliding_window": file.count("attention.sliding_window"),
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

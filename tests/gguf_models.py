"""GGUF files of tiny random models, with the metadata and the order of rows that llama.cpp's converter writes."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize, quantize

ARCHITECTURES = {
    "mixtral": "llama",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
    "olmoe": "olmoe",
    "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
    "glm4_moe": "glm4moe",
    "gpt_oss": "gpt-oss",
}
SPECIAL = ["<pad>", "<bos>", "<|end|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}<|assistant|>"


def write_model(
    path: Path, name: str, model: Any, kind_of: Callable[[str], Kind] = lambda name: Kind.F32, latent: bool = False
) -> Path:
    """Write a stock model, and give the model the values that the file stands for.

    Args:
        name: of its family in `tiny`.
        kind_of: what a tensor of two or more dimensions is packed as, by its name in the file; F32 if its rows are no
            multiple of a block.
        latent: DeepSeek's kv_b as two tensors, as files for attention on the compressed cache have it.
    """
    config = model.config
    writer = gguf.GGUFWriter(path, ARCHITECTURES[name])
    _write_metadata(writer, name, config, latent)
    write_tokenizer(writer, config.vocab_size)
    arch = next(arch for arch, its in gguf.MODEL_ARCH_NAMES.items() if its == ARCHITECTURES[name])
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    state = model.state_dict()

    def put(gguf_name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Write a tensor; returns what the file stands for."""
        values = tensor.float().contiguous().numpy()
        kind = kind_of(gguf_name) if values.ndim > 1 and gguf_name.endswith("weight") else Kind.F32
        if values.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
            kind = Kind.F32
        data = quantize(values, kind)
        writer.add_tensor(gguf_name, data, raw_dtype=kind)
        return torch.from_numpy(np.array(dequantize(data, kind))).reshape(tensor.shape)

    for key, tensor in state.items():
        block = re.search(r"layers\.(\d+)\.", key)
        experts = f"blk.{block[1] if block else '?'}.ffn_%s_exps.%s"
        suffix = "bias" if key.endswith("bias") else "weight"
        if ".experts.gate_up_proj" in key:
            transposed = name == "gpt_oss"
            both = tensor.transpose(1, 2) if transposed and suffix == "weight" else tensor
            gate, up = (both[:, 0::2], both[:, 1::2]) if transposed else both.chunk(2, 1)
            gate, up = put(experts % ("gate", suffix), gate), put(experts % ("up", suffix), up)
            back = torch.stack((gate, up), 2).flatten(1, 2) if transposed else torch.cat((gate, up), 1)
            tensor.copy_(back.transpose(1, 2) if transposed and suffix == "weight" else back)
        elif ".experts.down_proj" in key:
            turned = tensor.transpose(1, 2) if name == "gpt_oss" and suffix == "weight" else tensor
            back = put(experts % ("down", suffix), turned)
            tensor.copy_(back.transpose(1, 2) if name == "gpt_oss" and suffix == "weight" else back)
        elif latent and "kv_b_proj" in key:
            heads = tensor.unflatten(0, (config.num_attention_heads, -1))
            k, v = heads.split((config.qk_nope_head_dim, config.v_head_dim), 1)
            prefix = f"blk.{block[1] if block else '?'}.attn_"
            k_back, v_back = put(prefix + "k_b.weight", k.transpose(1, 2)), put(prefix + "v_b.weight", v)
            tensor.copy_(torch.cat((k_back.transpose(1, 2), v_back), 1).flatten(0, 1))
        else:
            found = names.get_name(key.replace("correction_bias", "correction.bias"), (".weight", ".bias"))
            assert found is not None, key
            found = found if found.endswith((".weight", ".bias")) else found + ".weight"
            projection = re.search(r"self_attn\.([qk])_proj", key)
            if name == "mixtral" and projection:
                heads = config.num_attention_heads if projection[1] == "q" else config.num_key_value_heads
                paired = tensor.reshape(heads, 2, -1, tensor.shape[1]).transpose(1, 2)
                back = put(found, paired.flatten(0, 2)).reshape(paired.shape)
                tensor.copy_(back.transpose(1, 2).flatten(0, 2))
            elif key.endswith("shared_expert_gate.weight"):
                tensor.copy_(put(found, tensor[0])[None])
            else:
                tensor.copy_(put(found, tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _write_metadata(writer: gguf.GGUFWriter, name: str, config: Any, latent: bool) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(1 if latent else config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        if "mscale_all_dim" in rope:
            writer.add_rope_scaling_yarn_log_mul(0.1 * rope["mscale_all_dim"])
    counts = (getattr(config, key, None) for key in ("num_local_experts", "num_experts", "n_routed_experts"))
    writer.add_expert_count(next(count for count in counts if count))
    writer.add_expert_used_count(config.num_experts_per_tok)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if name.startswith("deepseek"):
        key, value = config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim
        if latent:
            writer.add_key_length(config.kv_lora_rank + config.qk_rope_head_dim)
            writer.add_value_length(config.kv_lora_rank)
            writer.add_key_length_mla(key)
            writer.add_value_length_mla(value)
        else:
            writer.add_key_length(key)
            writer.add_value_length(value)
        if config.q_lora_rank:
            writer.add_q_lora_rank(config.q_lora_rank)
        writer.add_kv_lora_rank(config.kv_lora_rank)
        writer.add_rope_dimension_count(config.qk_rope_head_dim)
        gating = gguf.ExpertGatingFuncType
        writer.add_expert_gating_func(gating.SIGMOID if name == "deepseek_v3" else gating.SOFTMAX)
    elif name in ("qwen3_moe", "glm4_moe", "gpt_oss"):
        writer.add_key_length(head)
        writer.add_value_length(head)
    if name in ("qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3", "glm4_moe"):
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if name == "qwen2_moe":
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    if name in ("deepseek_v2", "deepseek_v3", "glm4_moe"):
        writer.add_leading_dense_block_count(config.first_k_dense_replace)
        writer.add_expert_shared_count(config.n_shared_experts)
        writer.add_expert_weights_scale(config.routed_scaling_factor)
        writer.add_expert_weights_norm(config.norm_topk_prob)
        writer.add_expert_group_count(config.n_group)
        writer.add_expert_group_used_count(config.topk_group)
    if name == "glm4_moe":
        writer.add_rope_dimension_count(int(head * rope["partial_rotary_factor"]))
    elif name == "mixtral":
        writer.add_rope_dimension_count(head)
    elif name == "gpt_oss":
        writer.add_sliding_window(config.sliding_window)


def write_tokenizer(writer: gguf.GGUFWriter, size: int, pre: str = "qwen2") -> None:
    """A byte-level vocabulary of that size: special tokens, printable characters, fillers."""
    letters = ["Ġ", "Ċ", *map(chr, range(33, 127))]
    tokens = (SPECIAL + letters + [f"<{i}>" for i in range(size)])[:size]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in SPECIAL else 1 for token in tokens])
    writer.add_token_merges([])
    writer.add_pad_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_eot_token_id(3)
    writer.add_chat_template(CHAT_TEMPLATE)

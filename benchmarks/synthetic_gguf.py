"""The synthetic checkpoint as a GGUF file in Q4_0, with experts in MXFP4 where they are, streamed a tensor at a time.

llama.cpp knows the architectures by other names, and for those of Llama's family it wants the rows of q and k in the
order of its own rotary embedding (neighbouring pairs instead of halves).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from .shapes import VOCABULARY
from .synthetic_source import CHAT_TEMPLATE, SPECIAL, SyntheticSource, byte_alphabet, vocabulary
from .synthetic_weights import Int4Matrix, to_gguf_mxfp4

_TRUNK = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_proj.bias": "attn_q.bias",
    "self_attn.k_proj.bias": "attn_k.bias",
    "self_attn.v_proj.bias": "attn_v.bias",
    "self_attn.o_proj.bias": "attn_output.bias",
    "self_attn.sinks": "attn_sinks.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.router.weight": "ffn_gate_inp.weight",
    "mlp.router.bias": "ffn_gate_inp.bias",
}
_ARCHITECTURES = {"gpt-oss": {"post_attention_layernorm.weight": "post_attention_norm.weight"}}
"""Names that an architecture has of its own."""
_EXPERTS = {
    "gate_proj": "ffn_gate_exps.weight",
    "up_proj": "ffn_up_exps.weight",
    "down_proj": "ffn_down_exps.weight",
    "gate_proj_bias": "ffn_gate_exps.bias",
    "up_proj_bias": "ffn_up_exps.bias",
    "down_proj_bias": "ffn_down_exps.bias",
}
_Q4_0, _MXFP4 = (gguf.GGMLQuantizationType.Q4_0, 18), (gguf.GGMLQuantizationType.MXFP4, 17)
"""Formats and the bytes of their blocks of 32."""


def write_gguf(source: SyntheticSource, dest: Path) -> None:
    """Write `dest`, under a temporary name until it is whole."""
    arch = source.shape.gguf_arch
    assert arch is not None, source.shape.name
    partial = dest.with_name(dest.name + ".partial")
    writer = gguf.GGUFWriter(partial, arch)
    _write_settings(writer, source)
    pieces: list[Callable[[], np.ndarray]] = []

    def announce(
        name: str,
        shape: tuple[int, ...],
        make: Callable[[], np.ndarray],
        quantized: tuple[gguf.GGMLQuantizationType, int] | None,
    ) -> None:
        if quantized:
            kind, block_bytes = quantized
            stored = (*shape[:-1], shape[-1] // 32 * block_bytes)
            writer.add_tensor_info(name, stored, np.dtype(np.uint8), int(np.prod(stored)), raw_dtype=kind)
        else:
            writer.add_tensor_info(name, shape, np.dtype(np.float32), int(np.prod(shape)) * 4)
        pieces.append(make)

    for name in source.skeleton.trunk_names():
        size = tuple(source.skeleton.full_state[name].shape)
        quantized = _Q4_0 if len(size) == 2 and not name.endswith(("mlp.gate.weight", "router.weight")) else None
        announce(_gguf_name(arch, name), size, lambda name=name: _trunk_bytes(source, arch, name), quantized)
    for layer, moe in enumerate(source.layers()):
        for part, rest in moe.shape.parts().items():
            size = (moe.num_experts, *rest)
            quantized = None if len(rest) == 1 else _MXFP4 if source.shape.codec == "mxfp4" else _Q4_0
            make = lambda at=(layer, part, rest): _expert_bytes(source, *at)  # noqa: E731
            announce(f"blk.{layer}.{_EXPERTS[part]}", size, make, quantized)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for make in pieces:
        writer.write_tensor_data(make())
    writer.close()
    partial.rename(dest)


def _gguf_name(arch: str, name: str) -> str:
    if name in _TRUNK:
        return _TRUNK[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{(_LAYER | _ARCHITECTURES.get(arch, {}))[rest]}"


def _trunk_bytes(source: SyntheticSource, arch: str, name: str) -> np.ndarray:
    tensor = source.trunk_tensor(name)
    if not isinstance(tensor, Int4Matrix):
        return tensor
    if arch == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
        config = source.config
        heads = config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
        tensor = Int4Matrix(_to_pairs(tensor.codes, heads), _to_pairs(tensor.scales, heads))
    return tensor.to_q4_0()


def _to_pairs(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head from halves (i and i + d/2 are rotated together) to neighbouring pairs."""
    total, cols = rows.shape
    return rows.reshape(heads, 2, total // heads // 2, cols).swapaxes(1, 2).reshape(total, cols)


def _expert_bytes(source: SyntheticSource, layer: int, part: str, size: tuple[int, ...]) -> np.ndarray:
    count = source.layers()[layer].num_experts
    if len(size) == 1:  # a bias
        return np.zeros((count, *size), np.float32)
    matrices = (source.expert_matrix(layer, e, part) for e in range(count))
    return np.stack([m.to_q4_0() if isinstance(m, Int4Matrix) else to_gguf_mxfp4(m) for m in matrices])


def _write_settings(writer: gguf.GGUFWriter, source: SyntheticSource) -> None:
    c: dict[str, Any] = source.config
    moe = source.layers()[0]
    head_dim = c.get("head_dim", c["hidden_size"] // c["num_attention_heads"])
    writer.add_name(source.name)
    writer.add_block_count(source.num_layers)
    writer.add_context_length(c["max_position_embeddings"])
    writer.add_embedding_length(c["hidden_size"])
    writer.add_feed_forward_length(c["intermediate_size"])
    writer.add_head_count(c["num_attention_heads"])
    writer.add_head_count_kv(c["num_key_value_heads"])
    writer.add_rope_freq_base(c["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(c["rms_norm_eps"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_expert_count(moe.num_experts)
    writer.add_expert_used_count(moe.top_k)
    writer.add_expert_feed_forward_length(moe.shape.intermediate)
    if window := c.get("sliding_window"):
        writer.add_sliding_window(window)
    writer.add_vocab_size(VOCABULARY)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    tokens, space = vocabulary(), byte_alphabet()[32]
    kinds = [gguf.TokenType.CONTROL if token in SPECIAL else gguf.TokenType.NORMAL for token in tokens]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([f"{space} {space}"])
    writer.add_pad_token_id(256)
    writer.add_eos_token_id(257)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)

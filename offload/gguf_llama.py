"""A dense llama-type model in one GGUF file, read tensor by tensor under transformers' names.

This file knows the names of a dense llama. It does not know experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .errors import DataError
from .gguf_file import decimal, read_gguf
from .gguf_tensor import GgufTensor, unpermute
from .gguf_tokenizer import write_tokenizer

_LAYER_TENSORS = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}


class GgufLlama:
    """The weights, hyperparameters and tokenizer of a GGUF file of architecture `llama` with tied embeddings.

    Raises:
        DataError: not a GGUF file, another architecture, or one with its own output matrix.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._file = path, read_gguf(path)
        self._fields, self._tensors = self._file.fields, self._file.tensors
        architecture = self._field("general.architecture")
        if architecture != "llama" or "output.weight" in self._tensors:
            raise DataError(
                f"{path} is not a llama-type GGUF file with tied embeddings (architecture {architecture!r})"
            )
        self.layers: int = self._field("llama.block_count")
        self.hidden: int = self._field("llama.embedding_length")
        self.intermediate: int = self._field("llama.feed_forward_length")
        self.heads: int = self._field("llama.attention.head_count")
        self.kv_heads: int = self._field("llama.attention.head_count_kv")

    def _field(self, key: str) -> Any:
        if key not in self._fields:
            raise DataError(f"{self.path} has no GGUF field {key}; it is not the file that the demo is made from")
        return self._fields[key]

    def config(self) -> dict[str, Any]:
        """The entries that transformers' LlamaConfig and MixtralConfig share."""
        return {
            "vocab_size": self._tensors["token_embd.weight"].shape[0],
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self._field("llama.rope.dimension_count"),
            "hidden_act": "silu",
            "max_position_embeddings": self._field("llama.context_length"),
            "rms_norm_eps": decimal(self._field("llama.attention.layer_norm_rms_epsilon")),
            "rope_parameters": {"rope_type": "default", "rope_theta": float(self._field("llama.rope.freq_base"))},
            "attention_dropout": 0.0,
            "initializer_range": 0.02,
            "tie_word_embeddings": True,
            "use_cache": True,
            "bos_token_id": self._field("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self._field("tokenizer.ggml.eos_token_id"),
            "pad_token_id": self._field("tokenizer.ggml.padding_token_id"),
        }

    def names(self) -> Iterator[str]:
        """transformers' name of every tensor (the tied output matrix is not repeated)."""
        yield "model.embed_tokens.weight"
        for layer in range(self.layers):
            yield from (f"model.layers.{layer}.{name}" for name in _LAYER_TENSORS)
        yield "model.norm.weight"

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor of that transformers name, float32, exactly the values that the file stands for.

        Raises:
            DataError: the file lacks it.
        """
        if name == "model.embed_tokens.weight":
            return self._read("token_embd.weight")
        if name == "model.norm.weight":
            return self._read("output_norm.weight")
        layer, _, rest = name.removeprefix("model.layers.").partition(".")
        weight = self._read(f"blk.{layer}.{_LAYER_TENSORS[rest]}")
        if rest == "self_attn.q_proj.weight":
            return unpermute(weight, self.heads)
        if rest == "self_attn.k_proj.weight":
            return unpermute(weight, self.kv_heads)
        return weight

    def _read(self, name: str) -> torch.Tensor:
        place = self._tensors.get(name)
        if place is None:
            raise DataError(f"{self.path} has no tensor {name}; it is not the file that the demo is made from")
        return GgufTensor(place).read()

    def token_id(self, token: str) -> int:
        """The number of a token of the vocabulary. Raises ValueError if there is none."""
        return self._field("tokenizer.ggml.tokens").index(token)

    def write_tokenizer(self, dest: Path) -> None:
        """Write tokenizer.json, tokenizer_config.json (with the chat template) and special_tokens_map.json."""
        write_tokenizer(self._file, dest)

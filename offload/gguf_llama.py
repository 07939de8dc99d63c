"""A dense llama-type model in one GGUF file, read tensor by tensor under transformers' names.

This file knows GGUF's names, row order and tokenizer metadata. It does not know experts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from .errors import DataError
from .memory import return_freed_memory

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
_ROWS = 4096
_CONTROL_TOKEN = 3
"""GGUF's token type of tokens that are parsed in the text but never shown (gguf.TokenType.CONTROL)."""


def unpermute(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a GGUF llama q or k projection in transformers' order.

    GGUF keeps the two members of a rotary pair next to each other (rows 2i and 2i + 1 of a head), transformers half a
    head apart (rows i and i + head_dim / 2).

    Args:
        weight: [heads * head_dim, hidden].
    """
    rows, cols = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, cols).transpose(1, 2).reshape(rows, cols).contiguous()


class _Place(NamedTuple):
    """Where a tensor lies in the file. `stored` is the shape and `dtype` the type of its encoded bytes."""

    kind: Any
    shape: tuple[int, ...]
    stored: tuple[int, ...]
    dtype: np.dtype
    offset: int


class GgufLlama:
    """The weights, hyperparameters and tokenizer of a GGUF file of architecture `llama` with tied embeddings.

    Raises:
        DataError: not a GGUF file, another architecture, or one with its own output matrix.
    """

    def __init__(self, path: Path) -> None:
        from gguf import GGUFReader

        try:
            reader = GGUFReader(path)
        except (OSError, ValueError, IndexError, KeyError) as error:
            raise DataError(f"{path} cannot be read as a GGUF file: {error}; download it again") from error
        self.path = path
        # The reader holds several objects for every token, 170 MB in all, and maps the file: only its results are kept.
        self._fields = {key: field.contents() for key, field in reader.fields.items()}
        self._tensors = {
            tensor.name: _Place(
                tensor.tensor_type,
                tuple(reversed(tensor.shape.tolist())),
                tensor.data.shape,
                tensor.data.dtype,
                tensor.data_offset,
            )
            for tensor in reader.tensors
        }
        del reader
        return_freed_memory()
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
            # GGUF holds the float32 nearest to the intended decimal number.
            "rms_norm_eps": float(f"{self._field('llama.attention.layer_norm_rms_epsilon'):.6g}"),
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
        from gguf.quants import dequantize

        place = self._tensors.get(name)
        if place is None:
            raise DataError(f"{self.path} has no tensor {name}; it is not the file that the demo is made from")
        values = torch.empty(place.shape, dtype=torch.float32)
        row = prod(place.stored[1:])
        # A few rows at a time: dequantising the embedding at once would take three times its float32 size.
        with open(self.path, "rb") as file:
            file.seek(place.offset)
            for part in values.split(_ROWS):
                data = np.fromfile(file, place.dtype, len(part) * row).reshape(-1, *place.stored[1:])
                part[:] = torch.from_numpy(np.array(dequantize(data, place.kind), dtype=np.float32))
        return values

    def token_id(self, token: str) -> int:
        """The number of a token of the vocabulary. Raises ValueError if there is none."""
        return self._field("tokenizer.ggml.tokens").index(token)

    def write_tokenizer(self, dest: Path) -> None:
        """Write tokenizer.json, tokenizer_config.json (with the chat template) and special_tokens_map.json.

        The pre-tokenizer is the one that GGUF calls "smollm": digits one by one, then GPT-2's byte-level BPE.

        Raises:
            DataError: the file's tokenizer is of another kind.
        """
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

        kind = self._field("tokenizer.ggml.model"), self._field("tokenizer.ggml.pre")
        if kind != ("gpt2", "smollm"):
            raise DataError(f"{self.path} has a tokenizer of kind {'/'.join(kind)}, expected gpt2/smollm")
        tokens: list[str] = self._field("tokenizer.ggml.tokens")
        types: list[int] = self._field("tokenizer.ggml.token_type")
        merges = [tuple(merge.split(" ")) for merge in self._field("tokenizer.ggml.merges")]
        vocab = {token: index for index, token in enumerate(tokens)}
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
        control = [token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL_TOKEN]
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
        tokenizer.save(str(dest / "tokenizer.json"), pretty=False)

        special = {
            f"{role}_token": tokens[self._field(f"tokenizer.ggml.{field}_token_id")]
            for role, field in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown"))
        }
        config = special | {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": self._field("llama.context_length"),
            "clean_up_tokenization_spaces": False,
            "chat_template": self._field("tokenizer.chat_template"),
        }
        write_json(dest / "tokenizer_config.json", config)
        write_json(dest / "special_tokens_map.json", special)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """A JSON file as transformers writes them."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

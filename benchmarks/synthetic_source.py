"""A checkpoint that exists only as a random generator: what `synthesize` writes in each format."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pocketmoe.offload import hf
from pocketmoe.offload.packing import packable_names
from pocketmoe.offload.source import MoeLayer, TrunkSize
from pocketmoe.quant.mxfp4 import Mxfp4Matrix
from transformers import AutoConfig

from .shapes import VOCABULARY, Shape
from .synthetic_weights import Int4Matrix, embeddings, random_matrix, random_mxfp4, router

SPECIAL = ("<|pad|>", "<|im_end|>", "<|im_start|>")
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_STD, _ATTENTION_OUT_STD, _DOWN_STD = 0.02, 0.002, 0.05


class SyntheticSource:
    """A `Source` for `convert`: weights of real layer shapes made on demand, one tensor at a time.

    Args:
        layers: number of decoder layers.
        seed: of all weights.
    """

    dtype = torch.bfloat16

    def __init__(self, shape: Shape, layers: int, seed: int = 0) -> None:
        self.shape, self.num_layers, self.seed = shape, layers, seed
        self.name = f"synthetic {shape.name}, {layers} layers, seed {seed}"
        self.config: dict[str, Any] = shape.config_json(layers)
        settings = {key: value for key, value in self.config.items() if key != "model_type"}
        self.skeleton = hf.build_skeleton(AutoConfig.for_model(self.config["model_type"], **settings), torch.bfloat16)

    def layers(self) -> list[MoeLayer]:
        return [site.layer for site in self.skeleton.sites]

    def expert_matrix(self, layer: int, index: int, part: str) -> Int4Matrix | Mxfp4Matrix:
        """`part` is gate_proj, up_proj or down_proj, as Linear [out, in]."""
        make = random_mxfp4 if self.shape.codec == "mxfp4" else random_matrix
        rows, cols = self.layers()[layer].shape.parts()[part]
        std = _DOWN_STD if part == "down_proj" else _STD
        return make(self.seed, f"{layer}.{index}.{part}", rows, cols, std)

    def expert(self, layer: int, index: int) -> dict[str, torch.Tensor]:
        return {
            part: torch.as_tensor(self.expert_matrix(layer, index, part).dequantize())
            if len(size) == 2
            else torch.zeros(size)
            for part, size in self.layers()[layer].shape.parts().items()
        }

    def trunk_tensor(self, name: str) -> Int4Matrix | np.ndarray:
        """A trunk tensor by transformers' name: INT4 for large matrices, float32 for norms, routers, biases, sinks."""
        size = tuple(self.skeleton.full_state[name].shape)
        if "embed_tokens" in name:
            return embeddings(self.seed, *size)
        if len(size) < 2:
            return np.ones(size, np.float32) if "norm" in name else np.zeros(size, np.float32)
        if name.endswith(("mlp.gate.weight", "router.weight")):
            return router(self.seed, name, *size)
        rows, cols = size
        return random_matrix(self.seed, name, rows, cols, _ATTENTION_OUT_STD if "o_proj" in name else _STD)

    def trunk(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name in self.skeleton.trunk_names():
            tensor = self.trunk_tensor(name)
            values = tensor.dequantize() if isinstance(tensor, Int4Matrix) else tensor
            yield name, torch.from_numpy(values).bfloat16()

    def trunk_sizes(self) -> list[TrunkSize]:
        tensors = (self.skeleton.full_state[name] for name in self.skeleton.trunk_names())
        return [TrunkSize(tensor.numel(), tensor.nbytes) for tensor in tensors]

    def packable(self) -> set[str]:
        return packable_names(self.skeleton)

    def fingerprint(self) -> list[Any]:
        return [self.shape.name, self.num_layers, self.seed]

    def copy_files(self, dest: Path) -> None:
        write_tokenizer(dest)


def vocabulary() -> list[str]:
    """Token texts by id: 256 bytes (in GPT-2's printable alphabet), the special tokens, one merge, and fillers."""
    alphabet = byte_alphabet()
    fillers = [f"w{i}" for i in range(256 + len(SPECIAL) + 1, VOCABULARY)]
    return [*alphabet, *SPECIAL, alphabet[32] * 2, *fillers]


def byte_alphabet() -> list[str]:
    """GPT-2's character for each byte: itself where it is printable, otherwise one from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (b for b in range(256) if b not in printable)
    moved = {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [moved.get(byte, chr(byte)) for byte in range(256)]


def write_tokenizer(dest: Path) -> None:
    """A byte-level tokenizer with a chat template, so that the synthetic model can be talked to (it answers noise)."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = vocabulary()
    space = byte_alphabet()[32]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, [(space, space)]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer.save(str(dest / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": SPECIAL[1],
        "pad_token": SPECIAL[0],
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
    }
    (dest / "tokenizer_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    (dest / "generation_config.json").write_text(json.dumps({"eos_token_id": 257, "do_sample": True}), encoding="utf-8")

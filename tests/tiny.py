"""Tiny random checkpoints of the families that the exactness tests cover, written as the library itself writes them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from pocketmoe.cache.expert import ExpertId
from pocketmoe.offload.store import ExpertStore
from pocketmoe.quant.codecs import decode_expert
from transformers import AutoConfig, AutoModelForCausalLM

VOCABULARY = 97
_COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 256,
    "intermediate_size": 96,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_DEEPSEEK: dict[str, Any] = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
    },
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16},
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 2},
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": _DEEPSEEK,
    "gpt_oss": {
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "head_dim": 16,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "sliding_window": 8,
    },
    "glm4_moe": {
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "head_dim": 16,
    },
    "granitemoe": {"num_local_experts": 8, "num_experts_per_tok": 2},
}


def config(name: str, **changes: Any) -> Any:
    """The config of a tiny model of that family."""
    return AutoConfig.for_model(name, **(_COMMON | FAMILIES[name] | changes))


def make_checkpoint(path: Path, name: str, dtype: torch.dtype = torch.float32, shards: int = 1, **changes: Any) -> Any:
    """Write a random checkpoint to `path` and return the stock model that holds the same weights."""
    torch.manual_seed(0)
    cfg = config(name, **changes)
    cfg._experts_implementation = "eager"
    model = AutoModelForCausalLM.from_config(cfg).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter) * 0.1
            is_norm = parameter.dim() == 1 and "bias" not in parameter_name and "sinks" not in parameter_name
            parameter.copy_(1 + noise if is_norm else noise)
    model.to(dtype)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    model.save_pretrained(path, max_shard_size="5GB" if shards == 1 else f"{max(1, size // shards // 1000)}KB")
    return model


def make_mxfp4_checkpoint(path: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """Write a gpt_oss checkpoint with random MXFP4 experts, as openai/gpt-oss-20b has them, and return the stock model
    that holds the same weights."""
    from safetensors.torch import load_file, save_file
    from transformers.utils.quantization_config import Mxfp4Config

    make_checkpoint(path, "gpt_oss", dtype, **changes)
    tensors = load_file(path / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, cols, rows = tensors.pop(name).shape
        size = (experts, rows, cols // 32)
        tensors[f"{name}_blocks"] = torch.randint(256, (*size, 16), generator=generator, dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(118, 123, size, generator=generator, dtype=torch.uint8)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    content = json.loads((path / "config.json").read_text(encoding="utf-8"))
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    content["quantization_config"] = {"modules_to_not_convert": kept, "quant_method": "mxfp4"}
    del content["dtype"]  # as upstream's own has none
    (path / "config.json").write_text(json.dumps(content), encoding="utf-8")
    return AutoModelForCausalLM.from_pretrained(
        path, quantization_config=Mxfp4Config(dequantize=True), dtype=dtype, experts_implementation="eager"
    ).eval()


CHAT_VOCABULARY = 6 + 95
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def add_tokenizer(path: Path, chat_template: str | None = CHAT_TEMPLATE) -> None:
    """Write a tokenizer of CHAT_VOCABULARY tokens: special ones, then the printable ASCII characters, so that whatever
    a random model says is a valid text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<bos>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    letters = ["Ġ", *map(chr, range(33, 127))]  # "Ġ" is how byte-level tokenizers write a space
    vocabulary = {token: i for i, token in enumerate(special + letters)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<|end|>",
        chat_template=chat_template,
    )
    fast.save_pretrained(path)


def make_chat_store(path: Path, name: str = "mixtral", **changes: Any) -> Path:
    """A store of a tiny model that has a tokenizer and a chat template."""
    from pocketmoe.offload.checkpoint import CheckpointSource
    from pocketmoe.offload.convert import convert

    checkpoint = path / "checkpoint"
    make_checkpoint(checkpoint, name, vocab_size=CHAT_VOCABULARY, **changes)
    add_tokenizer(checkpoint)
    return convert(CheckpointSource(checkpoint), path / "store", "f32")


def records(path: Path) -> Iterator[tuple[ExpertId, dict[str, torch.Tensor]]]:
    """(expert, its decoded tensors) of every record of a store."""
    store = ExpertStore(path)
    codec, layouts = store.manifest.codec_and_layouts()
    for layer, of in enumerate(store.manifest.layers):
        for index in range(of.num_experts):
            record = torch.empty(store.record_bytes + 4096, dtype=torch.uint8)
            record = record[-record.data_ptr() % 4096 :][: store.record_bytes]
            store.read_into(ExpertId(layer, index), record.numpy().data)
            yield ExpertId(layer, index), decode_expert(codec, layouts[layer], record)
    store.close()

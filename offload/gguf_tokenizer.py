"""The tokenizer, chat template and generation defaults that a GGUF file's metadata describe, as transformers' files.

Byte-level BPE ("gpt2") is built here, because the file names its pre-tokenizer and its special tokens exactly;
SentencePiece ("llama") is left to transformers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, normalizers, processors

from .byte_level import cuts_as, make_byte_level
from .errors import DataError
from .gguf_file import GgufFile, decimal
from .source import OnNotice

_CONTROL, _USER_DEFINED = 3, 4
"""Types of tokens (gguf.TokenType): parsed in the text and never shown; parsed and shown."""
_ENDS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<end_of_turn>",
    "<｜end▁of▁sentence｜>",
)
"""Control tokens that end an answer, whether a file says so or not: most name only one."""
_HARMONY = {"<|return|>", "<|call|>"}
"""Where these end an answer, `<|end|>` ends only a part of it."""
_ROLES = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}


def write_tokenizer(file: GgufFile, dest: Path, on_notice: OnNotice = lambda _: None) -> None:
    """Write tokenizer.json, tokenizer_config.json (with the chat template) and special_tokens_map.json.

    Raises:
        DataError: the file has no tokenizer, or one of a kind that is not known.
    """
    kind, tokens = file.fields.get("tokenizer.ggml.model"), file.fields.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens:
        raise DataError(f"{file.path} has no tokenizer")
    for name, kind_of in (("tokens", str), ("merges", str), ("token_type", int)):
        values = file.fields.get(f"tokenizer.ggml.{name}", [])
        if not isinstance(values, list) or not all(isinstance(value, kind_of) for value in values):
            raise DataError(
                f"{file.path} has a damaged tokenizer: tokenizer.ggml.{name} is no list of {kind_of.__name__}"
            )
    special = {}
    for role, field in _ROLES.items():
        index = file.fields.get(f"tokenizer.ggml.{field}_token_id")
        if isinstance(index, int) and 0 <= index < len(tokens):
            special[f"{role}_token"] = tokens[index]
    if kind == "gpt2":
        tokenizer, begins = _byte_level(file, tokens, on_notice), False
    elif kind == "llama":
        tokenizer, begins = _sentencepiece(file), True
    else:
        raise DataError(f"{file.path} has a tokenizer of kind {kind!r}; gpt2 and llama are supported")
    bos = special.get("bos_token")
    if bos is not None and file.fields.get("tokenizer.ggml.add_bos_token", begins):
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokens.index(bos))]
        )
    tokenizer.save(str(dest / "tokenizer.json"), pretty=False)
    config: dict[str, Any] = special | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": file.count("context_length"),
        "clean_up_tokenization_spaces": False,
    }
    if template := file.fields.get("tokenizer.chat_template"):
        config["chat_template"] = template
    write_json(dest / "tokenizer_config.json", config)
    write_json(dest / "special_tokens_map.json", special)


def _byte_level(file: GgufFile, tokens: list[str], on_notice: OnNotice) -> Any:
    lines = (merge.partition(" ") for merge in file.fields.get("tokenizer.ggml.merges", ()))
    merges = [(left, right) for left, _, right in lines]
    name, vocab = str(file.fields.get("tokenizer.ggml.pre", "?")), {token: i for i, token in enumerate(tokens)}
    if not cuts_as(name):
        on_notice(f"the pre-tokenizer {name!r} of {file.path} is not known; text is cut as GPT-2 does")
    try:
        tokenizer = make_byte_level(name, vocab, merges)
    except Exception as error:  # the library's own kind, for merges of tokens that are not there
        raise DataError(f"{file.path} has a damaged tokenizer: {error}") from None
    types = file.fields.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    for kind, add in ((_CONTROL, tokenizer.add_special_tokens), (_USER_DEFINED, tokenizer.add_tokens)):
        chosen = [token for token, its in zip(tokens, types, strict=False) if its == kind]
        add([AddedToken(token, special=kind == _CONTROL, normalized=False) for token in chosen])
    return tokenizer


def _sentencepiece(file: GgufFile) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(
            str(file.parts[0].parent), gguf_file=file.parts[0].name
        ).backend_tokenizer
    except Exception as error:  # many kinds, for metadata that do not fit together
        raise DataError(f"{file.path} has a tokenizer that transformers cannot use: {error}") from None
    # As the models' own tokenizer.json files and llama.cpp do it: a space more in front, also where one is already.
    prefix = [normalizers.Prepend("▁")] if file.fields.get("tokenizer.ggml.add_space_prefix", True) else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = None
    return tokenizer


def write_generation_config(file: GgufFile, dest: Path) -> None:
    """Write generation_config.json: what ends an answer, and the sampling that the file recommends."""
    fields = file.fields
    said = (fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
    ends = {end for end in said if isinstance(end, int)} | _known_ends(fields)
    config: dict[str, Any] = {"eos_token_id": sorted(ends)}
    for role in ("bos", "pad"):
        if isinstance(index := fields.get(f"tokenizer.ggml.{_ROLES[role]}_token_id"), int):
            config[f"{role}_token_id"] = index
    for ours, theirs in (("temperature", "temp"), ("top_p", "top_p"), ("top_k", "top_k"), ("min_p", "min_p")):
        value = fields.get(f"general.sampling.{theirs}")
        if isinstance(value, (int, float)):
            config |= {ours: decimal(value) if isinstance(value, float) else value, "do_sample": True}
    write_json(dest / "generation_config.json", config)


def _known_ends(fields: dict[str, Any]) -> set[int]:
    types = fields.get("tokenizer.ggml.token_type") or []
    pairs = enumerate(zip(fields.get("tokenizer.ggml.tokens") or [], types, strict=False))
    found = {token: i for i, (token, kind) in pairs if kind == _CONTROL and token in _ENDS}
    if found.keys() >= _HARMONY:
        found.pop("<|end|>", None)
    return set(found.values())


def write_json(path: Path, content: dict[str, Any]) -> None:
    """A JSON file as transformers writes them."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

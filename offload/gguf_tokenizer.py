"""The tokenizer, chat template and generation defaults that a GGUF file's metadata describe, as transformers' files.

Byte-level BPE ("gpt2") is built here, because the file names its pre-tokenizer and its special tokens exactly;
SentencePiece ("llama") is left to transformers. The patterns are those of the models' own tokenizer.json files.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from .errors import DataError
from .gguf_file import GgufFile, decimal
from .source import OnNotice

_CONTROL, _USER_DEFINED = 3, 4
"""Types of tokens (gguf.TokenType): parsed in the text and never shown; parsed and shown."""
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_QWEN2 = rf"{_ENDINGS}|{_LETTERS}|\p{{N}}|{_REST}"
_LLAMA3 = rf"{_ENDINGS}|{_LETTERS}|\p{{N}}{{1,3}}|{_REST}"
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENDINGS}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ENDINGS}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PUNCTUATION = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"""
_DEEPSEEK3 = (
    rf"{_PUNCTUATION}[A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+| ?[\p{{P}}\p{{S}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS: dict[str, tuple[str, ...]] = {
    "qwen2": (_QWEN2,),
    "deepseek-r1-qwen": (_QWEN2,),
    "llama-bpe": (_LLAMA3,),
    "llama3": (_LLAMA3,),
    "dbrx": (_LLAMA3,),
    "chatglm-bpe": (_LLAMA3,),
    "glm4": (_LLAMA3,),
    "gpt-4o": (_GPT4O,),
    "deepseek-llm": (
        r"[\r\n]",
        r"\s?[\p{Lu}\p{Ll}\p{Lt}]+",
        r"\s?[!-/:-~！-／：-～‘-‟　-。]+",
        r"\s+$",
        r"[一-龥ࠀ-一가-퟿]+",
    ),
    "deepseek-coder": (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-퟿]+"),
    "deepseek-v3": (r"\p{N}{1,3}", r"[一-龥぀-ゟ゠-ヿ]+", _DEEPSEEK3),
}
"""Pre-tokenizer, by the name in `tokenizer.ggml.pre`: patterns that cut the text, one after the other."""
_WHOLE = ("llama-bpe", "llama3", "tekken")
"""Pre-tokenizers whose pieces are tokens if the vocabulary has them, whatever the merges would make of them."""
_DIGITS = ("smollm", "refact", "starcoder", "command-r", "deepseek-llm", "deepseek-coder")
"""Pre-tokenizers that take digits one by one."""
_PLAIN = ("gpt-2", "mpt", "olmo", "smollm", "refact", "starcoder", "command-r")
"""Pre-tokenizers with GPT-2's own pattern."""
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
    merges = [tuple(merge.split(" ", 1)) for merge in file.fields.get("tokenizer.ggml.merges", ())]
    name, vocab = str(file.fields.get("tokenizer.ggml.pre", "?")), {token: i for i, token in enumerate(tokens)}
    try:
        tokenizer: Any = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=name in _WHOLE))
    except Exception as error:  # the library's own kind, for merges of tokens that are not there
        raise DataError(f"{file.path} has a damaged tokenizer: {error}") from None
    if name not in _SPLITS and name not in _PLAIN:
        on_notice(f"the pre-tokenizer {name!r} of {file.path} is not known; text is cut as GPT-2 does")
    patterns = _SPLITS.get(name, ())
    steps: list[Any] = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    if name in _DIGITS:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not patterns))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
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
    ends = [fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    config: dict[str, Any] = {"eos_token_id": sorted({end for end in ends if isinstance(end, int)})}
    for role in ("bos", "pad"):
        if isinstance(index := fields.get(f"tokenizer.ggml.{_ROLES[role]}_token_id"), int):
            config[f"{role}_token_id"] = index
    for ours, theirs in (("temperature", "temp"), ("top_p", "top_p"), ("top_k", "top_k"), ("min_p", "min_p")):
        value = fields.get(f"general.sampling.{theirs}")
        if isinstance(value, (int, float)):
            config |= {ours: decimal(value) if isinstance(value, float) else value, "do_sample": True}
    write_json(dest / "generation_config.json", config)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """A JSON file as transformers writes them."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

"""Tokenizers that ship as tiktoken's ranked tokens with Python code around them, which is never run: Kimi's.

The code says only how text is cut, which is known here, and the numbers of the special tokens, which
tokenizer_config.json repeats.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from .byte_level import make_byte_level
from .errors import DataError

RANKS = "tiktoken.model"
_CLASS = "TikTokenTokenizer"
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")


def is_tiktoken(path: Path) -> bool:
    """Whether a directory's tokenizer is of this kind, and there is no other form of it."""
    return (path / RANKS).is_file() and not (path / "tokenizer.json").is_file()


def require_known(path: Path) -> dict[str, Any]:
    """The tokenizer_config.json of such a directory. Raises DataError where it is not for the code that is known."""
    try:
        config = json.loads((path / "tokenizer_config.json").read_text(encoding="utf-8"))
        found = config.get("tokenizer_class")
    except (OSError, ValueError, AttributeError) as error:
        raise _damaged(path, error) from None
    if found != _CLASS:
        raise DataError(
            f"{path}: the tokenizer in {RANKS} is of class {found!r}, whose code ships with it and is never run; put "
            "the tokenizer.json of a converted copy of the model beside it"
        )
    return config


def _damaged(path: Path, error: Exception) -> DataError:
    return DataError(f"{path}: the tokenizer is damaged ({error!r}); download it again")


def load_tiktoken(path: Path) -> Any:
    """The tokenizer of transformers that a directory's files describe.

    Raises:
        DataError: they are damaged, or for other code than the known one.
    """
    from transformers import PreTrainedTokenizerFast

    config = require_known(path)
    try:
        ranks = _read_ranks(path / RANKS)
        added = {
            int(i): AddedToken(token["content"], special=bool(token.get("special", True)), normalized=False)
            for i, token in config["added_tokens_decoder"].items()
        }
        template = path / "chat_template.jinja"
        chat = template.read_text(encoding="utf-8") if template.is_file() else config.get("chat_template")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, error) from None
    printable = {token: "".join(_PRINTABLE[byte] for byte in token) for token in ranks}
    merges = [
        (printable[token[:i]], printable[token[i:]])
        for token in sorted(ranks, key=lambda token: ranks[token])
        for i in range(1, len(token))
        if token[:i] in ranks and token[i:] in ranks
    ]
    vocab = {printable[token]: rank for token, rank in ranks.items()}
    vocab |= {str(token): i for i, token in added.items()}  # else they would be numbered anew
    tokenizer = make_byte_level("kimi-k2", vocab, merges)
    tokenizer.add_tokens([token for _, token in sorted(added.items())])
    special = {name: config[name] for name in _SPECIAL if isinstance(config.get(name), str)}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=chat, **special)


def _read_ranks(file: Path) -> dict[bytes, int]:
    """Lines of a token in base64 and its number, which is also its rank among the merges."""
    pairs = (line.split() for line in file.read_bytes().splitlines() if line)
    return {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}


def _printable() -> dict[int, str]:
    """GPT-2's characters for bytes: itself where a byte is visible in Latin-1, else one from 256 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


_PRINTABLE = _printable()

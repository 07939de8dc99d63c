"""The tokenizer that comes with a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .errors import DataError
from .tiktoken_file import is_tiktoken, load_tiktoken


def load_tokenizer(path: Path) -> Any:
    """None when the directory has none. Code that ships with one is never run.

    Raises:
        DataError: it cannot be loaded.
    """
    from transformers import AutoTokenizer

    if is_tiktoken(path):
        return load_tiktoken(path)
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json", "tekken.json", "vocab.txt")
    if not any((path / name).is_file() for name in names):
        return None
    try:
        return AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
    except Exception as error:  # the library raises many kinds
        reason = " ".join(str(error).split())
        if "trust_remote_code" in reason:
            raise DataError(
                f"{path}: the tokenizer needs code that ships with it, which is never run; put the tokenizer.json of a "
                "converted copy of the model beside its other files"
            ) from None
        raise DataError(f"{path}: the tokenizer cannot be loaded: {reason}") from None

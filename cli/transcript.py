"""Saved conversations: JSON files that only their owner can read. What is in them is `Conversation`'s business."""

from __future__ import annotations

import contextlib
import json
import os
import stat
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..offload.errors import DataError, UsageError

if TYPE_CHECKING:
    from ..offload.chat import Conversation

MAX_BYTES = 256 * 10**6


def save_transcript(path: Path, data: dict[str, Any]) -> None:
    """Write the file at once or not at all, mode 0600. Only another conversation is replaced.

    Raises:
        UsageError: the file can not be written, or is something else.
    """
    if os.path.lexists(path) and not _is_conversation(path, data.get("format")):
        raise UsageError(f"{path} is there and is no saved conversation: choose another name.")
    content = json.dumps(data, ensure_ascii=False, indent=1).encode("utf-8", "replace")
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # mode 0600
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        raise UsageError(f"The conversation can not be saved in {path}: {error.strerror}.") from None


def load_transcript(path: Path, conversation: Conversation) -> None:
    """Put a saved conversation in the place of this one.

    Raises:
        DataError: the file can not be read or is not such a file; the conversation is as it was.
    """
    data = _read(path)
    try:
        conversation.restore(data)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


def _read(path: Path) -> Any:
    """The JSON in the file. Raises DataError."""
    try:
        found = path.stat()
        if stat.S_ISCHR(found.st_mode) or stat.S_ISFIFO(found.st_mode):  # without an end
            raise DataError(f"{path} is no file.")
        if found.st_size > MAX_BYTES:
            raise DataError(f"{path} is too large for a saved conversation ({found.st_size:,} bytes).")
        return json.loads(path.read_bytes().decode("utf-8"))
    except OSError as error:
        raise DataError(f"{path} can not be read: {error.strerror}.") from None
    except (ValueError, RecursionError):
        raise DataError(f"{path} is no conversation that /save wrote: it is not JSON.") from None


def _is_conversation(path: Path, form: str | None) -> bool:
    try:
        data = _read(path)
    except DataError:
        return False
    return isinstance(data, dict) and data.get("format") == form

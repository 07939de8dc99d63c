"""What a user names as a model: a path or, where there is none, a model on the hub. Known without torch."""

from __future__ import annotations

from pathlib import Path

from .errors import DataError, UsageError
from .hub_name import parse_name


def exists(path: Path) -> bool:
    """Whether there is something of that name that can be reached; a name that is too long is of nothing."""
    try:
        return path.exists()
    except OSError:
        return False


def locate(model: str, revision: str | None = None) -> tuple[Path, tuple[str, str] | None]:
    """The path, and None if there is something; else what `parse_name` makes of it.

    Args:
        revision: of a model on the hub, if one was named.

    Raises:
        DataError: it is neither.
        UsageError: a revision of a path; or see `parse_name`.
    """
    try:
        path = Path(model).expanduser()
    except RuntimeError:  # of a user that is not
        path = Path(model)
    if exists(path):
        if revision is not None:
            raise UsageError(f"{path} is a local path, which has no revisions; leave out --revision {revision}")
        return path, None
    named = parse_name(model)
    if named is None:
        raise DataError(
            f"there is no file or directory {path}; give a store, a checkpoint directory, a GGUF file, or a model on "
            "the Hugging Face Hub as ORGANISATION/NAME, or as ORGANISATION/NAME:Q4_K_M for one of its GGUF files"
        )
    return path, named

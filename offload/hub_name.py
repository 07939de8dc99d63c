"""What a user may write for a model on the Hugging Face Hub: its name, one of its GGUF files, or an address."""

from __future__ import annotations

import re
from urllib.parse import unquote

from .errors import UsageError

_ID = re.compile(r"\w([\w.-]{0,94}\w)?/\w([\w.-]{0,94}\w)?", re.ASCII)
"""As `huggingface_hub` checks it: at most 96 characters each."""
_ADDRESS = re.compile(r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/(.*)")
_AT_REVISION = re.compile(r"([^/]+/[^/]+)/(?:blob|resolve|tree)/([^/]+)(?:/(.*))?")
_TAG = re.compile(r"[\w.-]+", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
GGUF = ".gguf"


def is_hub_id(text: str) -> bool:
    """Whether a text can be the name of a model on the hub."""
    return _ID.fullmatch(text) is not None and "--" not in text and not text.endswith(".git") and ".." not in text


def is_commit(revision: str | None) -> bool:
    return revision is not None and _COMMIT.fullmatch(revision) is not None


def parse_name(text: str) -> tuple[str, str] | None:
    """ORGANISATION/NAME of a model on the hub and what of it is meant: a quantisation after a colon, a GGUF file, or
    nothing. None for what cannot be one.

    Raises:
        UsageError: an address of another revision than the main branch.
    """
    if address := _ADDRESS.fullmatch(text):
        text = _without_revision(unquote(re.split(r"[?#]", address[1])[0]).rstrip("/"))
    name, colon, wanted = text.partition(":")
    if not colon and name.lower().endswith(GGUF):
        organisation, _, rest = name.partition("/")
        repository, _, wanted = rest.partition("/")
        name = f"{organisation}/{repository}"
    if not is_hub_id(name) or (colon and not _TAG.fullmatch(wanted)) or ".." in wanted or wanted.startswith("/"):
        return None
    return name, "" if wanted == "latest" else wanted


def _without_revision(path: str) -> str:
    """The name or file that the path of an address says."""
    found = _AT_REVISION.fullmatch(path)
    if found is None:
        return path
    name, revision, file = found.groups()
    named = f"{name}/{file}" if file else name
    if revision != "main":
        where = f"and --revision {revision} where a command has it"
        raise UsageError(f"the address names revision {revision} of {name}: write {named}, {where}")
    return named

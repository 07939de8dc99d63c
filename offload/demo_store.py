"""Where the demo model's store is, and whether it is there: built in a process of its own on first use, without torch
in this one."""

from __future__ import annotations

import json
from pathlib import Path

import platformdirs

from .apart import run_apart
from .demo_download import GGUF_SHA256
from .errors import DataError
from .manifest import read_identity
from .memory import left_for_child
from .source import OnNotice, OnProgress

RECIPE = Path(__file__).with_name("data") / "demo_recipe.safetensors"
CODEC = "int4-g32-asym"
"""Scale and float minimum per 32 columns: holds the source's Q4_1 values exactly."""


def recipe_version() -> int:
    """The version of the recipe that ships, from its file's header."""
    with open(RECIPE, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return int(header["__metadata__"]["version"])


def default_place(version: int) -> Path:
    """The store's directory in the user's cache; a new recipe makes a new store."""
    return platformdirs.user_cache_path("pocketmoe") / "models" / f"smollm2-135m-moe-8x-v{version}"


def is_built(dest: Path, version: int) -> bool:
    """Whether `dest` is that recipe's finished store."""
    try:
        identity = read_identity(dest)
    except DataError:
        return False
    return identity.get("files") == [GGUF_SHA256, version] and identity.get("codec") == CODEC


def find_demo_store(
    dest: Path | None = None,
    on_progress: OnProgress | None = None,
    on_notice: OnNotice | None = None,
    wheel: Path | None = None,
    ram: int | None = None,
) -> Path:
    """The store of the demo model; `demo.build_demo` in a process of its own if it is not there yet.

    Args:
        ram: bytes that this process and the build's may take together.
    """
    version = recipe_version()
    dest = dest or default_place(version)
    if is_built(dest, version):
        return dest
    request = {"dest": str(dest), "wheel": None if wheel is None else str(wheel), "ram": left_for_child(ram)}
    watch = on_progress, on_notice
    return Path(run_apart(f"{__package__}.demo:build_demo", request, *watch, "the conversion", resumes=True))

"""Running a Mixture-of-Experts model whose experts live in slots over a store on disk."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .config import OffloadConfig
    from .model import Model, load

__all__ = ["Model", "OffloadConfig", "load"]


def __getattr__(name: str):
    # Late, so that `import pocketmoe.offload` costs no torch until something is used.
    if name in ("Model", "load"):
        from . import model

        return getattr(model, name)
    if name == "OffloadConfig":
        from .config import OffloadConfig

        return OffloadConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

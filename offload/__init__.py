"""Running a Mixture-of-Experts model whose experts live in slots over a store on disk."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .config import OffloadConfig
    from .loading import load
    from .model import Model

__all__ = ["Model", "OffloadConfig", "load"]


def __getattr__(name: str):
    # Late, so that `import pocketmoe.offload` costs no torch until something is used.
    if name == "load":
        from .loading import load

        return load
    if name == "Model":
        from .model import Model

        return Model
    if name == "OffloadConfig":
        from .config import OffloadConfig

        return OffloadConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

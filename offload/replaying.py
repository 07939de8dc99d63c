"""Who replays recorded routing: the native library, which takes a tenth of Python's time or less."""

from __future__ import annotations

from collections.abc import Callable

from ..quant.native_library import load_native, why_missing
from ..quant.native_replay import NativeReplayer


def native_replayer(on_notice: Callable[[str], None] | None = None) -> NativeReplayer | None:
    """It stands for a `cache.replay.Replayer`; None, and a notice that says so, where there is no library."""
    library = load_native()
    if library is None and on_notice is not None:
        on_notice(f"{why_missing()} Replays are done in Python until then, which takes ten to twenty times as long.")
    return library and NativeReplayer(library)

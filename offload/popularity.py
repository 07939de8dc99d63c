"""How often past runs asked for each expert of a store: a small file beside it, or in the user's cache folder where the
store can not be written to. Whoever deletes it loses nothing but a warm start.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import platformdirs
import xxhash

from ..cache.expert import ExpertId
from .manifest import Manifest
from .source import OnNotice

FILE = "popularity.json"
FORMAT, VERSION = "pocketmoe-popularity", 1
_HALF_LIFE = 50
"""Requests per expert of the store after which old ones count half."""


class Popularity:
    """The counts of a store's experts."""

    def __init__(self, store: Path, manifest: Manifest) -> None:
        self._layers = [layer.num_experts for layer in manifest.layers]
        self._identity = xxhash.xxh3_64_hexdigest("".join(manifest.record_checksums).encode())
        elsewhere = platformdirs.user_cache_path("pocketmoe") / "popularity" / f"{self._identity}.json"
        self._places = [store / FILE, elsewhere]

    def order(self, on_notice: OnNotice) -> list[ExpertId]:
        """Experts that were asked for, the most wanted first. A file that is damaged, or belongs to another store, is
        ignored with a notice."""
        counts = self._read(on_notice)
        return sorted(counts, key=lambda expert: (-counts[expert], expert))

    def add(self, uses: Mapping[ExpertId, int]) -> None:
        """Count a run, all or nothing. Where nothing can be written nothing is kept."""
        if not uses:
            return
        counts = self._read(lambda _: None)
        kept = 0.5 ** (sum(uses.values()) / (_HALF_LIFE * sum(self._layers)))
        rows = [[0.0] * experts for experts in self._layers]
        for old, weight in ((counts, kept), (uses, 1.0)):
            for (layer, index), count in old.items():
                rows[layer][index] += round(count * weight, 2) if count * weight > _LEAST else 0
        largest = max(map(max, rows))
        if largest > _MOST:
            rows = [[round(count * _MOST / largest, 2) for count in row] for row in rows]
        text = json.dumps({"format": FORMAT, "version": VERSION, "store": self._identity, "requests": rows})
        for place in self._places:
            try:
                _write(place, text)
            except OSError:
                continue
            return

    def _read(self, on_notice: OnNotice) -> dict[ExpertId, float]:
        for place in self._places:
            try:
                with open(place, encoding="utf-8") as file:
                    text = file.read(_LARGEST)
                return self._counts(json.loads(text))
            except FileNotFoundError:
                continue
            except OSError as error:
                on_notice(f"{place} can not be read ({error.strerror}): starting without it")
            except (ValueError, LookupError, TypeError, RecursionError) as error:
                on_notice(f"{place} is ignored, it is not this store's popularity of experts ({error or 'damaged'})")
        return {}

    def _counts(self, data: Any) -> dict[ExpertId, float]:
        if (data["format"], data["version"]) != (FORMAT, VERSION):
            raise ValueError("another format")
        if data["store"] != self._identity:
            raise ValueError("another store's")
        rows = data["requests"]
        if [len(row) for row in rows] != self._layers:
            raise ValueError("another number of experts")
        counts = {ExpertId(layer, i): float(count) for layer, row in enumerate(rows) for i, count in enumerate(row)}
        if not all(0 <= count <= _MOST for count in counts.values()):
            raise ValueError("counts that can not be")
        return {expert: count for expert, count in counts.items() if count}


_LEAST, _MOST = 0.05, 1e6
"""Below this an expert is forgotten; above, all counts become smaller."""
_LARGEST = 16 << 20
"""Bytes that are read at most: 12 for each of a million experts."""


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)

"""What `benchmarks.prefetch` takes for a way, and how it compares two."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest


@pytest.fixture
def prefetch(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parent.parent))
    return importlib.import_module("benchmarks.prefetch")


def test_a_way_that_is_not_known_is_refused_and_not_taken_to_be_on(prefetch):
    for name in ("off", "on", "tested", "worth=0.7,idle_worth=0.5,depth=4"):
        assert prefetch.way_name(name) == name
    for name in ("onn", "wroth=0.7", "worth", "worth=", "worth=0.7,", "depth=-1"):
        with pytest.raises(argparse.ArgumentTypeError, match=f"'{name}' is no way: use off, on, tested, or numbers"):
            prefetch.way_name(name)


def test_a_token_that_took_one_way_much_longer_counts_for_neither(prefetch):
    seconds = np.ones((2, 3, 10))  # ways, rounds, tokens
    seconds[1] = 0.5
    seconds[0, 1, 4] = 100
    assert prefetch.ratios(seconds, of=1, over=0) == [2.0, 2.0, 2.0]

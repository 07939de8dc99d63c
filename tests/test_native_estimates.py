"""The compiled estimates rank every expert as the plain ones do."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from pocketmoe.cache.analog import Analog, Estimates, PlainEstimates
from pocketmoe.offload import eviction
from pocketmoe.quant.native_estimates import NativeEstimates
from pocketmoe.quant.native_library import NativeError, load_native

pytestmark = pytest.mark.skipif(load_native() is None, reason="the native library is not built")
EXPERTS, CYCLE, PROMPT = (7, 12, 300, 9), 8, 31


def native() -> NativeEstimates:
    library = load_native()
    assert library is not None
    return NativeEstimates(library, EXPERTS, CYCLE)


def order(estimates: Estimates, layer: int) -> list[tuple[int, float]]:
    found, place = [], estimates.after(layer)
    while place is not None:
        found.append(place)
        place = estimates.after(layer, place[0])
    return found


def test_every_rank_is_that_of_the_plain_estimates():
    """More tokens than the window, prompts, tokens and layers without experts, experts that leave and come back."""
    rng, plain, compiled = np.random.default_rng(0), PlainEstimates(CYCLE), native()
    for token in range(700):
        popular = np.arange(300) + 5 * (token // 30)
        for layer, experts in enumerate(EXPERTS):
            weights = 1.0 / (1 + popular[:experts] % experts) ** 1.5
            count = experts if token % PROMPT == 9 else rng.integers(4) * (token % 13 > 0)
            chosen = rng.choice(experts, count, replace=False, p=weights / weights.sum()).tolist()
            for part in (chosen[:2], chosen[2:]):
                if part:
                    assert plain.use(layer, part) == compiled.use(layer, part)
            if token % PROMPT in (8, 9, 10) or token > 650:
                assert order(compiled, layer) == order(plain, layer)
            first = plain.after(layer)
            assert compiled.after(layer) == first
            if first and token % 3:
                plain.leave(layer, first[0])
                compiled.leave(layer, first[0])
        plain.tick()
        compiled.tick()


def test_a_copy_knows_nothing():
    estimates = native()
    estimates.use(1, [3, 4])
    assert order(copy.deepcopy(estimates), 1) == []
    assert [expert for expert, _ in order(estimates, 1)] == [3, 4]


def test_who_is_not_resident_cannot_leave_and_who_does_not_exist_cannot_come():
    estimates = native()
    with pytest.raises(KeyError):
        estimates.leave(0, 3)
    for layer, expert in ((0, 7), (0, -1), (4, 0), (-1, 0)):
        with pytest.raises(NativeError, match="bad argument"):
            estimates.use(layer, [expert])
    assert all(estimates.after(layer) is None for layer in (*estimates.layers(), 4, -1))


def test_a_running_model_has_compiled_estimates_where_there_is_the_library(monkeypatch):
    policy = eviction.make_policy("analog", 20, CYCLE, EXPERTS)
    assert isinstance(policy, Analog)
    assert isinstance(policy.estimates, NativeEstimates)
    assert not isinstance(eviction.make_policy("lru", 20, CYCLE, EXPERTS), Analog)
    monkeypatch.setattr(eviction, "load_native", lambda: None)
    policy = eviction.make_policy("analog", 20, CYCLE, EXPERTS)
    assert isinstance(policy, Analog)
    assert isinstance(policy.estimates, PlainEstimates)

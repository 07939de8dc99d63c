"""The compiled replay misses exactly what the plain one misses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from pocketmoe.cache.policy import policy_names
from pocketmoe.cache.replay import NONE, OPTIMUM, Array, Case, PlainReplayer, Requests, compare, lru_curve, replay
from pocketmoe.cache.trace import read_trace
from pocketmoe.offload import replaying
from pocketmoe.quant.native_library import NativeError, load_native
from pocketmoe.quant.native_replay import NativeReplayer
from test_replay import make_trace

pytestmark = pytest.mark.skipif(load_native() is None, reason="the native library is not built")
COLLECTION = Path(__file__).resolve().parent.parent.parent / "shared/traces/gpt-oss-20b_decode.npz"
EVERYBODY = (OPTIMUM, *policy_names())


@pytest.fixture(scope="module")
def native() -> NativeReplayer:
    library = load_native()
    assert library is not None
    return NativeReplayer(library)


def routing(seed: int, tokens: int, layers: int, experts: int, top_k: int, absent: float = 0.0) -> Array:
    """Topics that last some tokens and come back; layers differ in how many experts they use. `absent`: the share of
    places, and of whole steps, without an expert."""
    rng = np.random.default_rng(seed)
    topics = 3 * rng.gumbel(size=(4, layers, experts)) * rng.random((layers, 1))
    topic = np.repeat(rng.integers(4, size=tokens // 5 + 1), 5)[:tokens]
    scores = topics[topic] + rng.gumbel(size=(tokens, layers, experts))
    chosen = np.sort(np.argsort(-scores, axis=2)[..., :top_k], axis=2).astype(np.int32)
    chosen[rng.random(chosen.shape) < absent] = NONE
    chosen[rng.random(chosen.shape[:2]) < absent] = NONE
    return chosen


SHAPES = {  # tokens, layers, experts, top-k, absent; slots
    "one cycle of slots": ((140, 5, 11, 3), 15),
    "floors that bind": ((140, 5, 11, 3), 18),
    "half of the experts": ((140, 5, 11, 3), 28),
    "all experts": ((70, 3, 8, 2), 24),
    "steps without experts": ((140, 4, 9, 3, 0.2), 17),
    "one layer": ((300, 1, 40, 3), 20),
    "longer than the memory for similar tokens": ((600, 2, 9, 1), 8),
    "more experts a token than are compared": ((40, 45, 12, 3), 270),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("policy", EVERYBODY)
def test_every_step_misses_what_it_misses_in_python(native, policy, shape):
    numbers, slots = SHAPES[shape]
    chosen = routing(len(shape), *numbers)
    misses = native.misses(chosen, policy, slots)
    assert misses.dtype == np.int32
    np.testing.assert_array_equal(misses, PlainReplayer().misses(chosen, policy, slots))


def test_the_depths_of_lru_are_those_of_the_plain_stack(native):
    for seed, absent in enumerate((0.0, 0.2)):
        chosen = routing(seed, tokens=200, layers=5, experts=11, top_k=3, absent=absent)
        np.testing.assert_array_equal(native.lru_depths(chosen), PlainReplayer().lru_depths(chosen))


@pytest.mark.parametrize("per_layer", [False, True])
def test_a_comparison_has_the_same_results_by_whomever_it_is_made(native, per_layer):
    requests = Requests(make_trace(80, layers=3, experts=8, top_k=2, sequences=3))
    cases = [Case(policy, slots) for slots in (7, 14) for policy in (OPTIMUM, "lru", "analog")]
    plain = list(compare(requests, cases, per_layer, jobs=1))
    assert list(compare(requests, cases, per_layer, jobs=2, replayer=native)) == plain
    assert lru_curve(requests, native) == lru_curve(requests)


def test_what_cannot_be_replayed_is_refused(native):
    chosen = routing(0, tokens=5, layers=2, experts=6, top_k=2)
    for policy, slots in (("lru", 3), ("lru3", 8)):
        with pytest.raises(NativeError, match=f"'{policy}' with {slots} slots .*bad argument"):
            native.misses(chosen, policy, slots)
    for row in ([3, 3], [3, 2]):
        chosen[2, 1] = row
        with pytest.raises(NativeError, match="bad argument"):
            native.misses(chosen, "lru", 8)


def test_more_experts_than_have_a_number_are_refused(native):
    chosen = np.full((1, 40_000, 1), NONE, np.int32)
    chosen[0, 0, 0] = 65_534
    with pytest.raises(NativeError, match="bad argument"):
        native.misses(chosen, "lru", 40_000)
    with pytest.raises(NativeError, match="bad argument"):
        native.lru_depths(chosen)


def test_nothing_requested_is_nothing_missed(native):
    for tokens in (0, 3):
        chosen = np.full((tokens, 2, 2), NONE, np.int32)
        for policy in EVERYBODY:
            assert not native.misses(chosen, policy, 4).any()


def test_without_the_library_python_replays_and_it_is_said(monkeypatch):
    notices: list[str] = []
    assert replaying.native_replayer(notices.append) is not None
    monkeypatch.setattr(replaying, "load_native", lambda: None)
    monkeypatch.setattr(replaying, "why_missing", lambda: "The kernels are missing.")
    assert notices == []
    assert replaying.native_replayer(notices.append) is None
    assert [notice.partition(", which")[0] for notice in notices] == [
        "The kernels are missing. Replays are done in Python until then"
    ]


@pytest.mark.skipif(not COLLECTION.exists(), reason="the collection of published traces is not beside the repository")
def test_published_routing_gives_the_known_hit_rates(native):
    requests = Requests(read_trace(COLLECTION))
    rates = {name: replay(requests, name, 460, replayer=native).hit_rate for name in ("lru", "analog", OPTIMUM)}
    assert rates == pytest.approx({"lru": 0.937, "analog": 0.944, OPTIMUM: 0.962}, abs=0.001)


@pytest.mark.slow
@pytest.mark.skipif(not COLLECTION.exists(), reason="the collection of published traces is not beside the repository")
@pytest.mark.parametrize("policy", EVERYBODY)
def test_published_routing_misses_step_by_step_what_it_misses_in_python(native, policy):
    for chosen in Requests(read_trace(COLLECTION)).sequences:
        np.testing.assert_array_equal(native.misses(chosen, policy, 192), PlainReplayer().misses(chosen, policy, 192))

"""The policy that looks for tokens like the latest one."""

from __future__ import annotations

import numpy as np
import pytest
from pocketmoe.cache.analog import Lookback
from pocketmoe.cache.policy import get_policy
from pocketmoe.cache.replay import Requests, replay
from pocketmoe.cache.trace import DECODE, Trace
from test_policy_contract import ids, serve


def test_what_came_two_tokens_after_a_similar_one_has_the_most_votes_and_what_came_later_half_as_many_each():
    lookback = Lookback(cycle=2)
    for chosen in ([1, 2], [3, 4], [5, 6], [7, 8], [1, 3], [2, 4]):
        lookback.shares(np.array(chosen), 9)
    votes = lookback.shares(np.array([1, 2]), 9)
    assert votes[5] == votes[6] == votes.max()
    assert votes[7] == pytest.approx(votes[5] / 2, rel=0.1)
    assert votes.sum() == pytest.approx(2)  # a vote is for all experts of a token


def test_without_a_similar_token_nobody_has_a_vote():
    lookback = Lookback(cycle=2)
    for chosen in ([1, 2], [3, 4], [5, 6], [7, 8]):
        votes = lookback.shares(np.array(chosen), 9)
    assert not votes.any()


def test_old_tokens_are_forgotten_and_columns_may_grow():
    lookback = Lookback(cycle=1)
    for token in range(2000):
        votes = lookback.shares(np.array([1 + token % 5]), 6 + token)
    assert (votes.argmax(), len(votes)) == (2, 2005)  # the last was 5, and 1 comes next


def periodic(tokens: int, period: int) -> Trace:
    """A few tokens, over and over: 2 layers x 16 experts, top-2."""
    once = np.random.default_rng(0).permuted(np.tile(np.arange(16, dtype=np.uint8), (period, 2, 1)), axis=2)[..., :2]
    return Trace(np.resize(once, (tokens, 2, 2)), np.zeros(tokens), np.full(tokens, DECODE), 16)


def test_routing_that_repeats_itself_is_foreseen():
    requests = Requests(periodic(200, period=9))
    hits = {name: replay(requests, name, 10).hits for name in ("belady", "analog", "forecast", "lru")}
    assert hits["lru"] < hits["forecast"] < hits["analog"] < hits["belady"]
    assert hits["analog"] > 0.8 * hits["belady"]


def test_a_prompt_is_like_no_token():
    """All experts at once would be like every token."""
    prompt = ids(*((layer, index) for layer in range(2) for index in range(8)))
    tokens = [ids((0, t % 4), (0, 4 + t % 4), (1, t % 4), (1, 4 + t % 4)) for t in range(60)]
    alone = serve(get_policy("analog", 8, 4), tokens, 8)
    assert serve(get_policy("analog", 8, 4), [prompt, *tokens], 8) >= alone

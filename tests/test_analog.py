"""The policy that looks for tokens like the latest one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from pocketmoe.cache.analog import Analog
from pocketmoe.cache.expert import ExpertId
from pocketmoe.cache.policy import get_policy
from pocketmoe.cache.replay import Requests, replay
from pocketmoe.cache.trace import DECODE, Trace
from test_policy_contract import ids, serve


def run(tokens: Iterable[Sequence[Sequence[int]]], cycle: int) -> Analog:
    """All stay resident. The last token is not over."""
    policy = get_policy("analog", 1000, cycle)
    assert isinstance(policy, Analog)
    for number, token in enumerate(tokens):
        if number:
            policy.tick()
        for layer, experts in enumerate(token):
            if experts:
                policy.touch([ExpertId(layer, index) for index in experts])
    return policy


def leaving(policy: Analog, layer: int) -> list[int]:
    return [expert.index for expert, _ in policy.victims(layer)]


def test_who_came_after_a_similar_token_stays_longest_and_who_came_later_leaves_before():
    policy = run([[[1, 2]], [[3, 4]], [[5, 6]], [[7, 8]], [[1, 2]]], cycle=2)
    assert leaving(policy, 0) == [1, 2, 7, 8, 5, 6, 3, 4]


def test_without_a_similar_token_the_oldest_leave_first():
    policy = run([[[1, 2]], [[3, 4]], [[5, 6]], [[7, 8]]], cycle=2)
    assert leaving(policy, 0) == [1, 2, 3, 4, 5, 6, 7, 8]


def test_old_tokens_are_forgotten_and_there_may_always_be_new_experts():
    policy = run(([[token % 5], [token]] for token in range(1500)), cycle=2)
    assert leaving(policy, 0)[-1] == 0  # the last was 4
    assert sorted(leaving(policy, 1)) == list(range(1500))


def test_a_layer_learns_from_what_the_token_has_chosen_in_the_layers_before():
    """Layer 1 chooses 4, and in the next token 5 if layer 0 chose 0 beside that 4, but 6 if it chose 1."""
    pairs = {0: [[[0], [4]], [[2], [5]]], 1: [[[1], [4]], [[3], [6]]]}
    kinds = np.random.default_rng(0).integers(2, size=40).tolist()
    past = [token for kind in kinds for token in pairs[kind]]
    for kind, (first, second) in pairs.items():
        assert leaving(run([*past, first], cycle=2), 1)[-1] == second[1][0], kind


def test_who_is_about_to_leave_is_looked_at_again_with_what_the_token_has_chosen_since():
    """Layer 1 chooses 4 if layer 0 chose 0, and 5 if it chose 1."""
    past = [[[kind], [4 + kind]] for kind in np.random.default_rng(0).integers(2, size=40).tolist()]
    for kind in range(2):
        policy = run([*past, [[kind], []]], cycle=2)
        for index in range(2):
            policy.reconsider(ExpertId(1, 4 + index))
            assert not policy.reconsider(ExpertId(1, 4 + index))
        assert leaving(policy, 1) == [5 - kind, 4 + kind]
    assert policy.stale == {0, 1}


def test_of_equals_who_is_in_the_layer_whose_turn_comes_last_leaves_first():
    policy = get_policy("analog", 9, 3)
    for layer in range(3):
        policy.insert(ExpertId(layer, 0))
    assert [expert.layer for expert, _ in policy.victims()] == [2, 1, 0]


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

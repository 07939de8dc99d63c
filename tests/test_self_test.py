"""Something that tests itself stays the quicker way, and asks again now and then."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import tiny
from pocketmoe.cache.self_test import SelfTest
from pocketmoe.offload.loading import load

TEST = SelfTest.period * len(SelfTest.turns)


class Bench:
    """Tokens of 20 ms with noise, which take `cost` more when it is on, and 1 ms for each missing expert."""

    def __init__(self, cost: float, noise: float = 0.001, missing: int = 10, seed: int = 0) -> None:
        self.cost, self.noise, self.missing, self.rng = cost, noise, missing, random.Random(seed)
        self.tested = SelfTest()
        self.was_on: list[bool] = []

    def run(self, tokens: int) -> Bench:
        for _ in range(tokens):
            on = self.tested.on
            self.was_on.append(on)
            missing = self.rng.randint(1, 2 * self.missing) if self.missing else 0
            seconds = 0.02 + on * self.cost + 0.001 * missing + self.rng.gauss(0, self.noise)
            self.tested.step(seconds, missing)
        return self


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("cost", "on"), [(-0.004, True), (0.004, False)])
def test_it_stays_the_quicker_way_and_says_so(cost, on, seed):
    bench = Bench(cost, seed=seed).run(SelfTest.first + TEST)
    assert bench.tested.on is on
    assert bench.tested.tests == 1
    assert bench.tested.gain == pytest.approx(-cost / 0.03, abs=0.06)
    assert (bench.tested.state or "").startswith("On after 1 test" if on else "Switched itself off after 1 test")


def test_before_the_first_test_it_is_on_and_says_nothing():
    bench = Bench(0.01).run(SelfTest.first)
    assert all(bench.was_on)
    assert bench.tested.state is None


def test_a_test_goes_on_off_off_on():
    bench = Bench(0.0).run(SelfTest.first + TEST)
    turns = bench.was_on[SelfTest.first :]
    assert turns == [way for way in (True, False, False, True) for _ in range(SelfTest.period)]


@pytest.mark.parametrize("seed", range(5))
def test_a_difference_below_the_margin_or_in_the_noise_changes_nothing(seed):
    assert Bench(0.0002, noise=0.0, seed=seed).run(SelfTest.first + TEST).tested.on
    assert Bench(0.002, noise=0.03, seed=seed).run(SelfTest.first + TEST).tested.on


def test_where_nothing_is_gained_or_lost_it_says_that():
    tested = SelfTest()
    for _ in range(SelfTest.first + TEST):
        tested.step(0.02, 5)
    assert tested.state == "On after 1 test on and off: no difference."


def test_it_is_tried_again_and_comes_back_when_it_has_become_worth_it():
    bench = Bench(0.005).run(SelfTest.first + TEST)
    assert not bench.tested.on
    bench.cost = -0.005
    bench.run(SelfTest.rest + TEST)
    assert bench.tested.on
    assert bench.tested.tests == 2


def test_tests_that_agree_become_rarer():
    tested = Bench(-0.005).run(20_000).tested
    assert tested.tests <= 9
    once = SelfTest.first + TEST
    assert Bench(-0.005).run(once + SelfTest.sure_rest + TEST - 1).tested.tests == 1
    assert Bench(-0.005).run(once + SelfTest.sure_rest + TEST).tested.tests == 2


@pytest.mark.parametrize(("cost", "on"), [(-0.0015, True), (0.0015, False)])
def test_a_small_difference_is_found_by_many_tests_where_one_cannot(cost, on):
    """5 % of a token's time, where tokens differ by 15 % for other reasons."""
    ends = [Bench(cost, noise=0.0045, seed=seed).run(2000).tested for seed in range(20)]
    assert sum(tested.gain is not None and (tested.gain > 0) is on for tested in ends) >= 17
    assert all(tested.tests <= 16 for tested in ends)


def test_a_cost_that_comes_and_goes_slowly_does_not_decide():
    """Tokens become slower all the time, as with a growing context."""
    tested = SelfTest()
    for at in range(SelfTest.first + TEST):
        tested.step(0.02 + 0.0003 * at, 5)
    assert tested.gain == pytest.approx(0, abs=0.01)


def test_how_many_experts_a_token_missed_is_taken_into_account():
    """While it is off, tokens happen to miss more."""
    tested, rng = SelfTest(), random.Random(1)
    for _ in range(SelfTest.first + TEST):
        missing = rng.randint(0, 10) + (0 if tested.on else 4)
        tested.step(0.02 + 0.001 * missing + (0.004 if tested.on else 0), missing)
    assert not tested.on


def test_as_long_as_nothing_is_missing_nothing_is_tested():
    bench = Bench(0.01, missing=0).run(2000)
    assert all(bench.was_on)
    assert bench.tested.tests == 0


def test_prefetch_that_has_switched_itself_off_makes_no_guesses_and_goes_on_being_timed(tmp_path):
    path = tiny.make_chat_store(tmp_path)
    with load(path, ram="4GB", slots=6) as model:
        steps = []
        model._runtime.self_test = SimpleNamespace(  # type: ignore[assignment]
            on=False, tests=0, state="off", step=lambda seconds, missing: steps.append((seconds, missing))
        )
        model.generate("hello there", max_tokens=6, temperature=0.0)
        stats = model.stats()
        assert stats.total("prefetch_issued") == 0
        assert [missing for _, missing in steps] == [step.missing for step in stats.pace]
        assert all(seconds > 0 for seconds, _ in steps)
        assert stats.prefetch is None
        model._runtime.self_test.tests = 0
        model._runtime.self_test.step = lambda *_: setattr(model._runtime.self_test, "tests", 1)  # type: ignore[method-assign]
        model.generate("hello", max_tokens=3, temperature=0.0)
        assert model.stats().prefetch == "off", "the statistics say how a test went"

"""A warm start: what past runs wanted fills free slots, costs nobody anything, and changes no answer."""

from __future__ import annotations

import json

import pytest
import tiny
from fakes_runtime import FakeReader
from fakes_store import FakeSource
from pocketmoe.cache.expert import ExpertId
from pocketmoe.cache.plain_cache import PlainCache
from pocketmoe.cache.policy import get_policy
from pocketmoe.cache.stats import RunStats
from pocketmoe.offload.convert import convert
from pocketmoe.offload.loading import load
from pocketmoe.offload.manifest import Manifest
from pocketmoe.offload.popularity import FILE, Popularity
from pocketmoe.offload.prefetch import NoPrefetch, Prefetcher
from pocketmoe.offload.tiers import RamSlots
from pocketmoe.offload.transfer import SyncTransfers, Urgency
from pocketmoe.offload.warm_start import WarmStart
from test_prefetch import CAPACITY, FLOOR, RECORD, ManualTransfers

A, B, C, D, E = (ExpertId(1, index) for index in range(5))


@pytest.fixture
def store(tmp_path):
    path = convert(FakeSource(), tmp_path / "store", "f32")
    return path, Manifest.read(path)


def order(store, notices: list[str] | None = None) -> list[ExpertId]:
    return Popularity(*store).order([].append if notices is None else notices.append)


def test_experts_come_back_the_most_wanted_first_and_old_runs_fade(store):
    assert order(store) == []
    Popularity(*store).add({A: 5, B: 9})
    assert order(store) == [B, A]
    Popularity(*store).add({C: 14})
    assert order(store) == [C, B, A]
    for _ in range(10):
        Popularity(*store).add({C: 400})
    assert order(store) == [C], "forgotten"
    Popularity(*store).add({A: 10**12})
    assert order(store) == [A, C][: len(order(store))], "counts stay bounded"
    assert json.loads((store[0] / FILE).read_text())["requests"][1][0] <= 1e6
    assert [entry.name for entry in store[0].iterdir() if "partial" in entry.name] == []


def test_a_short_run_does_not_wipe_out_what_long_ones_have_shown(store):
    Popularity(*store).add({A: 1000})
    Popularity(*store).add({B: 10})
    assert order(store) == [A, B]


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", '{"format": "x"}', "other store", "other shape", "negative"]
)
def test_a_file_that_is_damaged_or_of_another_store_is_ignored_with_a_notice_and_written_anew(store, content):
    path = store[0] / FILE
    Popularity(*store).add({A: 5})
    data = json.loads(path.read_text())
    if content == "other store":
        content = json.dumps(data | {"store": "0" * 16})
    elif content == "other shape":
        content = json.dumps(data | {"requests": [[1]]})
    elif content == "negative":
        content = json.dumps(data | {"requests": [[-1, 0, 0, 0]] * 2})
    path.write_text(content)
    notices: list[str] = []
    assert order(store, notices) == []
    assert len(notices) == 1 and str(path) in notices[0]
    Popularity(*store).add({B: 5})
    assert order(store, notices) == [B]


def test_beside_a_store_that_can_not_be_written_to_it_is_kept_in_the_users_cache(store, monkeypatch):
    from pocketmoe.offload import popularity

    def refuse(path, text):
        if path.parent == store[0]:
            raise PermissionError(13, "read-only")
        write(path, text)

    write = popularity._write
    monkeypatch.setattr(popularity, "_write", refuse)
    Popularity(*store).add({A: 5})
    assert not (store[0] / FILE).exists()
    assert order(store) == [A]


class Bench:
    """A cache of two layers that starts with these experts."""

    def __init__(self, *experts, transfers=None):
        self.cache = PlainCache(CAPACITY, get_policy("lru", CAPACITY, 2 * FLOOR), 2, FLOOR)
        self.slots = RamSlots(CAPACITY, RECORD)
        self.transfers = transfers or ManualTransfers()
        self.warm = WarmStart(NoPrefetch(), self.cache, self.slots, self.transfers, experts)
        self.warm.start()

    def arriving(self) -> set[ExpertId]:
        return {expert for expert in self.cache.residents() if self.cache.is_arriving(expert)}


MANY = [ExpertId(layer, index) for index in range(5) for layer in (1, 0)]


def test_as_many_as_fit_are_read_the_most_wanted_first_and_leave_last():
    bench = Bench(*MANY)
    assert list(bench.transfers.tickets) == MANY[:CAPACITY]
    assert all(ticket.urgency is Urgency.FILL for ticket in bench.transfers.tickets.values())
    bench.transfers.finish(*range(3), layer=0)
    bench.transfers.finish(*range(3), layer=1)
    bench.warm.settle(0, {0})
    assert bench.arriving() == set()
    admission = bench.cache.admit(ExpertId(1, 4))
    assert admission is not None
    assert admission.evicted == MANY[CAPACITY - 1]
    bench.cache.abandon(ExpertId(1, 4))


def test_demand_takes_the_slots_of_the_least_wanted_that_are_not_being_read():
    bench = Bench(*MANY)
    bench.transfers.begin(0, 1, layer=1)
    bench.warm.settle(0, {3, 4})
    assert bench.arriving() == {*MANY[: CAPACITY - 2]}, "two slots are free for what the layer has chosen"
    while bench.warm._cancel_one():
        pass
    assert bench.arriving() == {ExpertId(1, 0), ExpertId(1, 1)}
    assert bench.warm.make_room(), "what is being read is waited for"
    bench.transfers.finish(0, 1, layer=1)
    bench.warm.drain()
    bench.cache.check_integrity(idle=True)


def test_an_expert_on_its_way_is_claimed_by_who_needs_it():
    bench = Bench(*MANY)
    ticket = bench.warm.claim(B)
    assert ticket.expert == B and ticket.urgency is Urgency.DEMAND
    bench.warm.drain()
    assert bench.arriving() == {B}


def test_a_read_that_fails_leaves_its_slot_free_and_demand_to_meet_the_error():
    bench = Bench(A, B)
    bench.transfers.finish(0, error=OSError("broken"))
    bench.transfers.finish(1)
    bench.warm.settle(0, {0})
    assert set(bench.cache.residents()) == {B}
    bench.cache.check_integrity(idle=True)


def test_slots_that_a_prompt_has_borrowed_are_filled_again_once_it_is_over():
    bench = Bench(*MANY, transfers=SyncTransfers(FakeReader(), RunStats(2)))
    bench.warm.drain()
    assert len(bench.cache.resize(2 * FLOOR)) == CAPACITY - 2 * FLOOR
    bench.warm.drain()
    bench.cache.resize(CAPACITY)
    bench.warm.settle(0, set(range(5)))
    assert len(bench.cache) == 2 * FLOOR, "not for a prompt"
    bench.warm.settle(1, {0, 1})
    assert set(bench.cache.residents()) == set(MANY[:CAPACITY])
    bench.warm.drain()
    bench.cache.check_integrity(idle=True)


def test_guesses_go_on_meanwhile_and_are_settled_by_who_made_them():
    cache_bench = Bench(A)
    stats = RunStats(2, RECORD)
    inner = Prefetcher(cache_bench.cache, cache_bench.slots, cache_bench.transfers, stats)  # type: ignore[arg-type]
    warm = WarmStart(inner, cache_bench.cache, cache_bench.slots, cache_bench.transfers, [])  # type: ignore[arg-type]
    warm.request(0, [2, 3])
    assert stats.total("prefetch_issued") == 2
    assert warm.claim(ExpertId(0, 2)).urgency is Urgency.DEMAND
    warm.settle(0, {2})
    assert stats.total("prefetch_cancelled") == 1


def test_a_second_start_finds_experts_in_memory_and_answers_the_same(tmp_path):
    path = tiny.make_chat_store(tmp_path)
    answers, hits = [], []
    for warm_start in (True, True, False):
        with load(path, ram="4GB", slots=8, prefetch=False, warm_start=warm_start) as model:
            if len(answers) == 1:
                assert len(model._runtime.cache) > 0, "reads have been asked for before the first prompt"
            answers.append(model.generate("hello there", max_tokens=12, temperature=0.0).text)
            hits.append(model.stats().prompt.hits)
            model.check_integrity()
    assert answers[0] == answers[1] == answers[2]
    assert (path / FILE).exists()
    assert hits[2] == hits[0], "a cold start stays one"


def test_without_a_warm_start_nothing_is_kept(tmp_path):
    path = tiny.make_chat_store(tmp_path)
    with load(path, ram="4GB", slots=8, warm_start=False) as model:
        model.generate("hello", max_tokens=3, temperature=0.0)
    assert not (path / FILE).exists()

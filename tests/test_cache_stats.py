"""Counters that add up, rates of nothing, files, and the text made of them; amounts of bytes."""

from __future__ import annotations

import json
import threading
from contextlib import suppress

import pytest
from fakes_run import Clock
from fakes_runtime import Interruption
from pocketmoe.cache.expert import ExpertId, Lookup
from pocketmoe.cache.stats import LayerStats, RunStats
from pocketmoe.cache.units import format_bytes, parse_bytes

RECORD = 2_650_000


def lookup(hits: int, misses: int, layer: int = 0) -> Lookup:
    experts = tuple(ExpertId(layer, index) for index in range(hits + misses))
    return Lookup(experts[:hits], experts[hits:])


def a_run(tokens: int = 100, hits: int = 6, stall_s: float = 0.0, **described) -> RunStats:
    """A run of 2 layers with top-8 in which every miss is read on demand."""
    stats = RunStats(2, RECORD, slots=128, total_experts=256, ram_budget_bytes=4_000_000_000, clock=Clock())
    for name, value in described.items():
        setattr(stats, name, value)
    stats.enter("prompt")
    stats.record_prompt(tokens=10, seconds=0.5)
    stats.time_to_first_token_s = 0.5
    stats.enter("answer")
    stats.record_answer(tokens=1, steps=0, seconds=0.0)
    for _ in range(tokens - 1):
        for layer in range(2):
            stats.record(layer, lookup(hits, 8 - hits, layer))
            for _ in range(8 - hits):
                stats.read_started()
                stats.clock.now += 0.002  # type: ignore[attr-defined]
                stats.read_finished(layer, RECORD)
            stats.record_stall(layer, stall_s / 2)
        stats.record_compute(0.01)
        stats.record_answer(tokens=1, steps=1, seconds=0.05)
    stats.finish_reason = "stop"
    return stats


def test_counters_of_a_run_add_up():
    stats = a_run(tokens=101, stall_s=0.02)
    stats.check()
    data = stats.to_dict()
    assert (data["requests"], data["hits"], data["misses"]) == (1600, 1200, 400)
    assert data["hit_rate"] == data["answer_hit_rate"] == 0.75
    assert data["bytes_read"] == 400 * RECORD
    assert data["disk_read_bytes_per_s"] == pytest.approx(RECORD / 0.002)
    assert data["generated_tokens"] == 101
    assert data["tokens_per_second"] == pytest.approx(20), "the first token's time belongs to the prompt"
    assert data["prompt_tokens_per_second"] == 20
    assert data["stall_s"] == pytest.approx(2)
    assert stats.compute_s == pytest.approx(1.0)
    assert (stats.answer.missing, stats.answer.bytes_read) == (400, 400 * RECORD)
    assert [step.missing for step in stats.pace] == [4] * 100
    assert [step.missing_in for step in stats.pace] == [0b11] * 100
    assert sum(step.stall_s for step in stats.pace) == pytest.approx(2)
    assert [layer["hits"] for layer in data["per_layer"]] == [600, 600]


@pytest.mark.parametrize(
    ("counter", "message"),
    [
        ("requests", "requests"),
        ("hits", "requests"),
        ("late", "late > "),
        ("prefetch_hits", "prefetch hits > "),
        ("bytes_read", "bytes_read: "),
        ("demand_reads", "bytes read"),
        ("prefetch_wasted", "guesses ended"),
        ("stall_s", "stall: "),
    ],
)
def test_check_notices_a_counter_that_is_off(counter, message):
    stats = a_run()
    layer = stats.per_layer[1]
    setattr(layer, counter, getattr(layer, counter) + 10_000)
    with pytest.raises(AssertionError, match=message):
        stats.check()
    stats = a_run()
    stats.per_layer[1].late = -1
    with pytest.raises(AssertionError, match="negative"):
        stats.check()
    stats = a_run()
    stats.answer.hits += 1
    with pytest.raises(AssertionError, match="in the phases"):
        stats.check()
    stats = a_run()
    stats.uses[ExpertId(1, 0)] += 1
    with pytest.raises(AssertionError, match="experts were used"):
        stats.check()


def test_reads_side_by_side_count_once_in_the_disks_time():
    clock = Clock()
    stats = RunStats(1, RECORD, clock=clock)
    stats.read_started()
    clock.now += 1
    stats.read_started()
    clock.now += 1
    stats.read_finished(0, RECORD, prefetch=True)
    clock.now += 1
    assert stats.snapshot().read_busy_s == 3, "a snapshot includes the read that is still in flight"
    stats.read_failed()
    clock.now += 10
    assert stats.read_busy_s == 3
    assert stats.read_wait_s == 4, "two of them were in flight for one second"
    assert stats.to_dict()["disk_read_bytes_per_s"] == RECORD / 3
    assert stats.per_layer[0] == LayerStats(prefetch_reads=1, bytes_read=RECORD)
    stats.check()


def test_a_snapshot_keeps_its_numbers_while_recording_goes_on():
    stats = a_run()
    before = stats.snapshot()
    data = before.to_dict()
    stats.record(0, lookup(8, 0))
    stats.record_answer(1, 1, 0.1)
    assert before.to_dict() == data
    assert stats.to_dict() != data


def test_after_an_interruption_at_any_line_of_the_counting_a_saved_run_can_be_read(tmp_path):
    at, happened = 0, True
    while happened:
        stats = a_run(tokens=3, stall_s=0.01)
        with Interruption(("cache.stats", "cache.notes"), at) as interruption, suppress(KeyboardInterrupt):
            for layer in range(2):
                stats.record_stall(layer, 0.25)
                stats.record(layer, lookup(5, 3, layer), late=2, prefetch_hits=1)
            stats.snapshot()
        happened = interruption.happened
        stats.save(tmp_path / "last.json")
        stats.record(0, lookup(5, 3))
        stats.check()
        assert RunStats.load(tmp_path / "last.json").total("requests") in (32, 40, 48), "nothing is lost"
        at += 1
    assert at > 50


def test_snapshots_taken_while_threads_record_are_consistent_and_nothing_is_lost():
    stats = RunStats(4, RECORD)

    def reads(layer: int) -> None:
        for _ in range(300):
            stats.record(layer, lookup(5, 3, layer))
            stats.read_started()
            stats.read_finished(layer, RECORD, prefetch=layer % 2 == 0)

    threads = [threading.Thread(target=reads, args=(layer,)) for layer in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        stats.check()
    for thread in threads:
        thread.join()
    stats.check()
    assert stats.total("requests") == 4 * 300 * 8
    assert stats.total("bytes_read") == 4 * 300 * RECORD


def test_reset_keeps_the_description_and_the_guesses_still_open():
    stats = a_run(model="demo")
    stats.record_prefetch(0, issued=3)
    stats.record_prefetch(0, outcome="late")
    stats.reset()
    assert (stats.model, stats.slots) == ("demo", 128)
    assert stats.total("requests") == stats.answer.tokens == stats.compute_s == 0
    assert stats.finish_reason is None
    stats.record(0, lookup(1, 0))
    stats.record_prefetch(0, outcome="useful", count=2)
    stats.check()
    assert stats.answer.requests == 1, "the phase goes on"


def test_merge_adds_counters_and_keeps_the_latest_description():
    first, second = a_run(tokens=11, peak_rss_bytes=5), a_run(tokens=21, policy="lfu", peak_rss_bytes=3)
    second.finish_reason = "length"
    first.merge(second)
    first.check()
    assert first.answer.tokens == 32
    assert (first.finish_reason, first.policy, first.peak_rss_bytes) == ("length", "lfu", 5)
    with pytest.raises(ValueError, match="different models"):
        first.merge(RunStats(3, RECORD))


def test_saved_statistics_come_back_equal(tmp_path):
    stats = a_run(stall_s=0.01, model="demo", kernels="torch")
    path = tmp_path / "deep" / "last.json"
    stats.save(path)
    stats.save(path)
    assert RunStats.load(path) == stats
    assert RunStats.load(path).to_dict() == stats.to_dict()
    assert json.loads(path.read_text()).items() >= stats.to_dict().items()
    assert [entry.name for entry in path.parent.iterdir()] == ["last.json"], "no partial file stays"


def test_a_failed_save_leaves_the_former_file_as_it_was(tmp_path):
    path = tmp_path / "last.json"
    stats = a_run()
    stats.save(path)
    before = path.read_bytes()
    stats.model = object()  # type: ignore[assignment]  # not serialisable, found halfway through
    with pytest.raises(TypeError):
        stats.save(path)
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", '{"version": 99}', '{"version": 2, "layers": 2}', "broken layer", "broken type"],
)
def test_a_file_of_something_else_is_refused_in_one_sentence_with_its_name(tmp_path, content):
    path = tmp_path / "last.json"
    data = a_run().to_dict()
    if content == "broken layer":
        del data["per_layer"][0]
        content = json.dumps(data)
    elif content == "broken type":
        data["per_layer"][0]["hits"] = "many"
        content = json.dumps(data)
    path.write_text(content)
    with pytest.raises(ValueError, match="does not hold statistics") as caught:
        RunStats.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "damage",
    [
        *({"finished_at": value} for value in ("yesterday", float("nan"), float("inf"), 1e300, -1, 10**400)),
        *({"time_to_first_token_s": value} for value in ("soon", float("nan"), True)),
        *({"slots": value} for value in ("9", 9.5)),
        {"model": 5},
        {"read_busy_s": "1"},
        {"uses": [[-1, 0, 4], [1, 0, 4]]},
        {"residents": [[9, 0]]},
        {"residents": [[0, "0"]]},
        {"pace": [[0.1, float("nan"), 1, 1]]},
        {"history": {"layers": 3, "top_k": 1, "experts": ""}},
    ],
    ids=str,
)
def test_a_field_of_another_kind_or_out_of_range_is_refused(tmp_path, damage):
    path = tmp_path / "last.json"
    a_run().save(path)
    data = json.loads(path.read_text())
    assert damage.keys() <= data.keys()
    path.write_text(json.dumps(data | damage))
    with pytest.raises(ValueError, match="does not hold statistics"):
        RunStats.load(path)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (1, "1 byte"),
        (999, "999 bytes"),
        (1000, "1.0 kB"),
        (2_652_000, "2.7 MB"),
        (812_000_000, "812 MB"),
        (999_600_000, "1.0 GB"),
        (15_720_000_000, "15.7 GB"),
        (-5_000_000, "-5.0 MB"),
    ],
)
def test_bytes_print_in_the_unit_that_fits(count, text):
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("4GB", 4 * 10**9),
        (" 800 mb ", 800 * 10**6),
        ("1.5GiB", 3 * 2**29),
        ("6g", 6 * 10**9),
        ("4096", 4096),
        ("0.1kB", 100),
        (7, 7),
        ("9007199254740993", 2**53 + 1),
    ],
)
def test_amounts_of_bytes_are_read_exactly(text, count):
    assert parse_bytes(text) == count


@pytest.mark.parametrize(
    "amount", ["", "GB", "nan", "inf", "1e9", "4 XB", "0", "0GB", "-1GB", "0.2", -3, 0, True, 1.5, None]
)
def test_what_is_no_amount_of_bytes_is_refused_in_a_sentence_that_names_it(amount):
    with pytest.raises(ValueError, match=r"\.$") as caught:
        parse_bytes(amount)
    assert repr(amount) in str(caught.value)

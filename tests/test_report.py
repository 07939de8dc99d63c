"""The report: its data, its verdict, and the same sections as text and as HTML."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

import pytest
from browser import NAMES, Browser, find_browser
from fakes_run import COSTS, DISK, LAYERS, RECORD, a_run
from pocketmoe.cache.charts import LEVELS
from pocketmoe.cache.device_stats import DeviceLayerStats, DeviceStats
from pocketmoe.cache.expert import ExpertId, Lookup
from pocketmoe.cache.report import report
from pocketmoe.cache.report_html import as_html
from pocketmoe.cache.report_text import as_text
from pocketmoe.cache.sections import Section, sections, summary
from pocketmoe.cache.stats import RunStats

EVIL = "</script><img src=x onerror=alert(1)>\x1b[2J\n\"'&"


def with_prefetch(run: RunStats) -> RunStats:
    for layer in run.per_layer:
        layer.prefetch_issued, layer.prefetch_useful, layer.prefetch_late = 100, 40, 30
        layer.prefetch_wasted, layer.prefetch_cancelled = 20, 10
    return run


def wide_run(layers: int, experts: int) -> RunStats:
    """Every expert of each layer once, the first one ten times."""
    run = RunStats(layers, RECORD, slots=layers, total_experts=layers * experts)
    for layer in range(layers):
        everybody = tuple(ExpertId(layer, i) for i in range(experts))
        run.record(layer, Lookup(everybody, ()))
        for _ in range(9):
            run.record(layer, Lookup(everybody[:1], ()))
    run.residents = [ExpertId(layer, 1) for layer in range(layers)]
    return run


def with_device(run: RunStats) -> RunStats:
    """Half of each layer's hits were in VRAM."""
    run.device = DeviceStats(run.layers, RECORD, slots=5, link=12e9)
    for layer, counters in enumerate(run.per_layer):
        hits = counters.hits // 2

        on_cpu = counters.requests - hits - 3
        run.device.record(layer, DeviceLayerStats(counters.requests, hits, copied=3, on_cpu=on_cpu, admitted=1))
        run.device.record_copy(RECORD / 6e9)
    return run


def shape(data: Any) -> Any:
    """Names and types of nested data; a list is shown by its first element."""
    if isinstance(data, dict):
        return {name: shape(value) for name, value in data.items()}
    if isinstance(data, list):
        return [shape(data[0])] if data else []
    return type(data).__name__


def test_the_data_has_the_shape_of_version_1():
    """Whoever reads the JSON relies on it: a change of meaning needs a new version, new names do not."""
    layer = dict.fromkeys(("requests", "hits", "prefetch_hits", "late", "misses"), "int")
    setting = {"policy": "str", "slots": "int", "ram_budget_bytes": "int", "hit_rate": "float"}
    setting |= {"tokens_per_second": "float", "present": "bool"}
    run = with_prefetch(a_run(1000))
    run.peak_rss_bytes = 10**9
    assert shape(report(run, DISK)) == {
        "format": "str",
        "version": "int",
        "model": "str",
        "store": "NoneType",
        "finished_at": "NoneType",
        "settings": {"codec": "str", "policy": "str", "io": "str", "kernels": "NoneType", "prefetch": "NoneType"},
        "memory": {"budget_bytes": "int", "peak_bytes": "int"},
        "sample": {
            **dict.fromkeys(("prompts", "prompt_tokens", "answer_tokens", "first_reads", "enough_tokens"), "int"),
            "enough": "bool",
        },
        "speed": {
            **dict.fromkeys(("tokens_per_second", "prompt_tokens_per_second", "time_to_first_token_s"), "float"),
            "hit_rate": "float",
            "finish_reason": "str",
        },
        "time_per_token": {"seconds": "float", "parts": [{"name": "str", "seconds": "float", "share": "float"}]},
        "links": [
            {
                **dict.fromkeys(("name", "peak_source"), "str"),
                **dict.fromkeys(("bytes", "on_demand", "ahead"), "int"),
                **dict.fromkeys(("bytes_per_token", "busy_s", "busy_share", "in_flight"), "float"),
                **dict.fromkeys(("bytes_per_s", "peak_bytes_per_s", "use"), "float"),
            }
        ],
        "tiers": [
            {
                "name": "str",
                **dict.fromkeys(("slots", "experts", "record_bytes"), "int"),
                **layer,
                "hit_rate": "float",
                "per_layer": [layer],
            }
        ],
        "device": "NoneType",
        "prefetch": {
            "state": "NoneType",
            **dict.fromkeys(("issued", "useful", "late", "wasted", "cancelled", "wasted_bytes"), "int"),
            **dict.fromkeys(("precision", "recall", "wasted_share"), "float"),
        },
        "experts": {"requests": [["int"]], "resident": [["int"]]},
        "what_if": {
            **dict.fromkeys(("tokens", "warmup_tokens"), "int"),
            **dict.fromkeys(("measured", "predicted"), "float"),
            "policies": [setting],
            "budgets": [setting],
        },
        "bound_by": "str",
        "verdict": "str",
    }
    data = report(run, DISK)
    assert (data["format"], data["version"]) == ("pocketmoe-report", 1)
    assert [part["name"] for part in data["time_per_token"]["parts"]] == [
        "waiting",
        "experts",
        "cache",
        "trunk",
        "text",
    ]
    json.dumps(data, allow_nan=False)


def test_the_parts_of_a_tokens_time_add_up_to_the_wall():
    run = a_run(300)
    split = report(run, replays=False)["time_per_token"]
    assert split["seconds"] == pytest.approx(run.answer.seconds / run.answer.steps)
    assert sum(part["seconds"] for part in split["parts"]) == pytest.approx(split["seconds"])
    assert sum(part["share"] for part in split["parts"]) == pytest.approx(1)
    assert min(part["seconds"] for part in split["parts"]) >= 0


def test_with_a_gpu_each_tier_is_asked_for_what_those_above_it_lack(tmp_path):
    run = with_device(a_run())
    run.check()
    vram, ram = report(run, DISK, replays=False)["tiers"]
    assert (vram["name"], ram["name"]) == ("VRAM", "RAM")
    assert ram["requests"] == vram["misses"] and ram["misses"] == run.total("misses")
    assert vram["hits"] + ram["hits"] == run.total("hits")
    up, down = report(run, DISK, replays=False)["links"]
    assert up["bytes"] == run.layers * 4 * RECORD and up["use"] == pytest.approx(0.5)
    assert down["name"] == "disk to RAM"
    text = " ".join(as_text(sections(report(run, DISK, replays=False))).split())
    assert "Hits in VRAM" in text and "computed by the CPU" in text and "launching its work" in text
    run.save(tmp_path / "run.json")
    assert RunStats.load(tmp_path / "run.json").to_dict() == run.to_dict()


def test_a_links_use_is_its_speed_while_busy_beside_the_measured_peak():
    (link,) = report(a_run(), DISK, replays=False)["links"]
    assert link["bytes_per_s"] == pytest.approx(RECORD / COSTS.read)
    assert link["use"] == pytest.approx(RECORD / COSTS.read / DISK.bytes_per_s)
    (unmeasured,) = report(a_run(), replays=False)["links"]
    assert unmeasured["peak_bytes_per_s"] is unmeasured["use"] is None
    assert "The peak was not measured" in as_text(sections(report(a_run(), replays=False)), width=120)


@pytest.mark.parametrize(
    ("options", "bound_by", "words"),
    [
        ({"tokens": 199}, None, ("Not enough data", "(199 of 200 tokens)")),
        ({}, "disk", ("Compute and the disk share the limit", "1.0 GB/s", "--ram 1060MB (+12 MB)", " instead of ")),
        ({"slots": 64}, "compute", ("Compute is the limit", "3 % of a token's time is waiting", "48 % goes into")),
        ({"skew": 0.3, "policy": "lfu", "slots": 12}, "disk", ("The disk is the limit", "--ram")),
        ({"skew": 2.0, "policy": "fifo"}, "policy", ("fifo hits", "--policy lru")),
    ],
)
def test_the_verdict_names_what_bounds_the_speed_and_what_to_do(options, bound_by, words):
    costs = COSTS._replace(read=0.006) if bound_by == "policy" else COSTS
    found = report(a_run(**options, costs=costs), DISK)
    assert found["bound_by"] == bound_by, found["verdict"]
    for word in words:
        assert word in found["verdict"]
    assert found["verdict"].endswith(".")
    assert "\n" not in found["verdict"]


def test_a_link_far_below_its_peak_is_blamed_for_late_reads():
    found = report(a_run(), DISK._replace(bytes_per_s=4e9))
    assert found["bound_by"] == "latency"
    assert "late reads share the limit" in found["verdict"]
    assert "of the 4.0 GB/s that it can give" in found["verdict"]


def test_slow_kernels_are_blamed_before_the_memory():
    run = a_run(slots=64)
    run.kernels = "torch"
    assert report(run, DISK)["verdict"].endswith("native kernels would, and pocketmoe doctor says why there are none.")


def test_below_200_tokens_nothing_is_replayed_and_the_counts_are_shown_all_the_same():
    text = as_text(sections(report(a_run(100), DISK)))
    assert "Not enough data" in text
    assert "Other budgets" not in text
    assert "Counted: 100 tokens of 1 answer, ended by end; 10 of prompts." in text
    assert "so far 4" in text and "of a token's time is waiting for reads" in " ".join(text.split())


def test_an_empty_run_still_prints():
    for run in (RunStats(3), RunStats(1, slots=0, total_experts=0)):
        found = report(run)
        json.dumps(found, allow_nan=False)
        assert "Not enough data" in as_text(sections(found))
        assert "Not enough data" in as_html(sections(found))


def test_the_text_fits_into_80_columns_and_has_no_escape_codes_unless_colours_are_asked_for():
    for run in (with_prefetch(a_run()), wide_run(60, 256)):
        text = as_text(sections(report(run, DISK)))
        assert max(map(len, text.splitlines())) <= 80
        assert text == as_text(sections(report(run, DISK)), width=40), "no number is cut off"
        assert "\x1b" not in text
        plain = as_text(sections(report(run, DISK)), ascii_only=True)
        assert plain.isascii()
        assert "\x1b[" in as_text(sections(report(run, DISK)), colour=True)


def test_the_text_has_every_block():
    text = as_text(sections(report(with_prefetch(a_run()), DISK)), width=120)
    for title in (
        "fake",
        "Where the time of an answer goes",
        "Links",
        "Hits in RAM, by layer",
        "Prefetch",
        "Use of the experts",
        "Beside other policies",
        "Other budgets",
        "Setup",
    ):
        assert f"\n{title}\n" in "\n" + text
    for fact in (
        "disk to RAM",
        "belady (optimum)",
        "useful: there when it was chosen           160   40 %",
        "Wasted: 160 MB",
        "measured",
        "24 of 64 experts fit (38 %, 48 MB)",
        "after 200 of warm-up",
        "Warm-up included: 64 of 3,192",
    ):
        assert fact in text
    assert "now" in text


def test_other_budgets_say_where_the_disk_was_not_measured():
    for disk, said in ((None, True), (DISK, False)):
        text = " ".join(as_text(sections(report(a_run(), disk))).split())
        assert ("the disk was not measured" in text) == said


def test_the_summary_is_its_head_and_needs_no_replay():
    found = report(a_run(), replays=False)
    assert found["what_if"] is None
    head = as_text(summary(found))
    assert as_text(sections(found)).startswith(head)
    assert a_run().summary() == head
    assert "Other budgets" in a_run().report()


def test_bars_of_layers_are_as_long_as_their_shares():
    lines = as_text(sections(report(a_run(), DISK)), width=120).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("Hits in RAM"))
    bars = [line for line in lines[start:] if "█" in line and line.split()[0].isdigit()]
    assert len(bars) == LAYERS
    for line in bars:
        hit = float(line.split()[1])
        assert line.count("█") == pytest.approx(hit / 100 * 40, abs=1)
        assert sum(map(line.count, "█▓▒░")) == 40


def test_many_layers_share_rows_and_many_experts_share_cells():
    found = sections(report(wide_run(60, 256), replays=False))
    layers = next(s for s in found if s.title.startswith("Hits"))
    assert layers.table is not None
    assert [row[0] for row in layers.table.rows][:2] == ["0-2", "3-5"]
    text = as_text(found)
    assert "a character stands for 4 experts" in text
    row = next(line for line in text.splitlines() if line.strip().startswith("0 @"))
    assert row.split()[1] == "@" + 63 * "-"


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, data: str) -> None:
        self.text += data


def parsed(html: str) -> _Page:
    page = _Page()
    page.feed(html)
    page.close()
    assert page.open == []
    for drawing in re.findall(r"<svg.*?</svg>", html, re.DOTALL):
        ElementTree.fromstring(drawing)
    return page


def test_names_are_text_in_every_form_never_markup_or_controls():
    run = a_run()
    run.model = run.codec = run.io = run.kernels = run.prefetch = EVIL
    html = as_html(sections(report(run, DISK)))
    page = parsed(html)
    assert not {"script", "img"} & set(page.tags)
    assert "</script><img src=x onerror=alert(1)> [2J" in page.text, "it is shown as it is, but for the controls"
    assert "\x1b" not in html
    text = as_text(sections(report(run, DISK)))
    assert "\x1b" not in text
    assert text.splitlines()[0].startswith("</script>")
    assert "[bold]" in as_text([Section("[bold]x[/bold]")])


def test_the_page_asks_for_nothing_from_anywhere_and_forbids_it():
    html = as_html(sections(report(with_prefetch(a_run()), DISK)))
    page = parsed(html)
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes
    assert not {"script", "link", "img", "iframe", "object", "form", "base"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name in ("src", "href") or name.startswith("on")]
    assert "url(" not in html
    assert "http:" not in html
    assert "https:" not in html
    assert page.tags.count("table") == 6


def test_the_map_of_a_large_model_stays_small_and_frames_who_is_resident():
    html = as_html(sections(report(wide_run(48, 128), replays=False)))
    assert len(html) < 150_000
    page = parsed(html)
    drawn = {}
    for path in re.findall(r'<path class="(ram|disk) l(\d)" d="([^"]*)"', html):
        drawn[path[0], int(path[1])] = drawn.get((path[0], int(path[1])), 0) + path[2].count("M")
    assert drawn == {("disk", LEVELS): 48, ("ram", 3): 48, ("disk", 3): 48 * 126}
    assert "layer 3: 128 of 128 experts asked for, 1 in a slot at the end; most often 0 (10), 1 (1), 2 (1)" in page.text


def test_a_curve_marks_the_present_setting_and_says_every_point_without_a_pointer():
    html = as_html(sections(report(a_run(), DISK)))
    assert html.count('class="point now"') == 2
    assert html.count(">now ") == 2
    titles = [line for line in parsed(html).text.split("\n") if " by share of the experts that fit. " in line]
    assert len(titles) == 2 and all("38 % of the experts, --ram 1050MB:" in title for title in titles)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_draws_the_page_within_its_width_and_asks_for_nothing_else(tmp_path, width, scheme):
    program = find_browser()
    if program is None:
        pytest.skip(f"none of {', '.join(NAMES)} is on the PATH")
    page = tmp_path / "report.html"
    page.write_text(as_html(sections(report(with_prefetch(a_run()), DISK))), encoding="utf-8")
    with Browser(program, tmp_path / "profile") as browser:
        browser.open(page.as_uri(), width, scheme)
        assert browser.requests == [page.as_uri()]
        assert browser.evaluate("document.documentElement.scrollWidth") <= width
        dark = browser.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
        assert dark == (scheme == "dark")
        (tmp_path / "report.png").write_bytes(browser.screenshot())
    assert (tmp_path / "report.png").stat().st_size > 50_000, "not an empty page"

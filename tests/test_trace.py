"""Routing traces: what is written comes back, and what is not a trace is refused in one sentence."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import numpy as np
import pytest
from pocketmoe.cache.trace import DECODE, PREFILL, TraceWriter, read_trace

COLLECTION = Path(__file__).resolve().parent.parent.parent / "shared/traces/gpt-oss-20b_decode.npz"


def forward(rng: np.random.Generator, tokens: int, layers: int = 3, experts: int = 8, top_k: int = 2):
    chosen = rng.permuted(np.tile(np.arange(experts), (tokens, layers, 1)), axis=2)[..., :top_k]
    return chosen, rng.random((tokens, layers, top_k))


def test_what_is_written_comes_back(tmp_path):
    rng, path = np.random.default_rng(0), tmp_path / "run.npz"
    writer = TraceWriter(path, layers=3, experts=8, top_k=2, model="tiny")
    prompt, first, second = (forward(rng, tokens) for tokens in (5, 1, 1))
    writer.add(*prompt)
    writer.add(*first, guesses=second[0])
    writer.new_sequence()
    writer.add(*second)
    writer.close()
    trace = read_trace(path)
    assert (trace.tokens, trace.layers, trace.top_k, trace.num_experts, trace.model) == (7, 3, 2, 8, "tiny")
    assert np.array_equal(trace.experts, np.concatenate([prompt[0], first[0], second[0]]))
    assert trace.weights is not None and trace.guesses is not None
    assert np.array_equal(trace.weights, np.concatenate([prompt[1], first[1], second[1]]).astype(np.float16))
    assert np.array_equal(trace.guesses[5], second[0][0])
    assert np.all(np.delete(trace.guesses, 5, axis=0) == trace.none)
    assert trace.seq.tolist() == [0] * 6 + [1]
    assert trace.phase.tolist() == [PREFILL] * 5 + [DECODE] * 2


def test_a_trace_without_guesses_has_no_column_for_them(tmp_path):
    writer = TraceWriter(tmp_path / "run.npz", layers=3, experts=8, top_k=2, model=None)
    writer.add(*forward(np.random.default_rng(0), 4))
    writer.close()
    assert read_trace(tmp_path / "run.npz").guesses is None
    assert sorted(np.load(tmp_path / "run.npz")) == ["experts", "meta", "phase", "seq", "weights"]


@pytest.mark.parametrize(("experts", "dtype"), [(255, np.uint8), (256, np.uint16), (384, np.uint16)])
def test_the_index_type_leaves_a_value_for_none(tmp_path, experts, dtype):
    writer = TraceWriter(tmp_path / "run.npz", layers=1, experts=experts, top_k=1, model=None)
    writer.add(np.full((1, 1, 1), experts - 1), np.ones((1, 1, 1)))
    writer.close()
    trace = read_trace(tmp_path / "run.npz")
    assert trace.experts.dtype == dtype
    assert trace.experts.item() == experts - 1 < trace.none


def test_the_file_appears_only_with_close_and_nothing_else_is_left(tmp_path):
    writer = TraceWriter(tmp_path / "run.npz", layers=3, experts=8, top_k=2, model=None)
    writer.add(*forward(np.random.default_rng(0), 4))
    assert list(tmp_path.iterdir()) == []
    writer.close()
    writer.close()
    assert [path.name for path in tmp_path.iterdir()] == ["run.npz"]
    if os.name == "posix":  # the tokens in it can be read as text
        assert stat.S_IMODE((tmp_path / "run.npz").stat().st_mode) == 0o600


@pytest.mark.parametrize("last", [False, True])
def test_tokens_that_an_interruption_has_written_in_part_are_left_out(tmp_path, last, monkeypatch):
    rng, path = np.random.default_rng(0), tmp_path / "run.npz"
    writer = TraceWriter(path, layers=3, experts=8, top_k=2, model=None)
    whole, torn, after = (forward(rng, tokens) for tokens in (2, 3, 1))
    writer.add(*whole)
    with monkeypatch.context() as patch:
        patch.setattr(writer._columns["guesses"], "put", interrupted)
        with pytest.raises(KeyboardInterrupt):
            writer.add(*torn)
    kept = [whole] if last else [whole, after]
    for forwarded in kept[1:]:
        writer.add(*forwarded)
    writer.close()
    trace = read_trace(path)
    assert np.array_equal(trace.experts, np.concatenate([experts for experts, _ in kept]))
    assert trace.weights is not None
    assert np.array_equal(trace.weights, np.concatenate([weights for _, weights in kept]).astype(np.float16))


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def test_rows_of_another_shape_are_refused(tmp_path):
    writer = TraceWriter(tmp_path / "run.npz", layers=3, experts=8, top_k=2, model=None)
    with pytest.raises(AssertionError, match=r"\(2, 2\), not \(3, 2\)"):
        writer.add(*forward(np.random.default_rng(0), 4, layers=2))


def test_plain_arrays_are_a_trace_and_json_beside_them_says_more(tmp_path):
    chosen = np.array([[[1, 3]], [[3, 0]]], np.uint8)
    np.savez(tmp_path / "plain.npz", experts=chosen, seq=np.array([0, 1]))
    trace = read_trace(tmp_path / "plain.npz")
    assert (trace.num_experts, trace.model, trace.phase.tolist()) == (4, None, [DECODE, DECODE])
    (tmp_path / "plain.json").write_text(json.dumps({"experts": 32, "model": "some"}))
    trace = read_trace(tmp_path / "plain.npz")
    assert (trace.num_experts, trace.model) == (32, "some")


CHOSEN, SEQ = np.zeros((2, 1, 1), np.uint8), np.zeros(2, np.int32)
META = {"format": "pocketmoe-trace", "version": 1, "experts": 8}


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({"seq": SEQ}, "experts"),
        ({"experts": CHOSEN}, "seq"),
        ({"experts": CHOSEN[0], "seq": SEQ}, r"uint8 \[1, 1\], not unsigned"),
        ({"experts": CHOSEN.astype(float), "seq": SEQ}, "float64"),
        ({"experts": CHOSEN, "seq": SEQ[:1]}, r"seq is int32 \[1\]"),
        ({"experts": CHOSEN, "seq": SEQ, "weights": CHOSEN[:, :, :0]}, "weights is"),
        ({"experts": CHOSEN, "seq": np.array([1, 0])}, "not ascending"),
        ({"experts": CHOSEN, "seq": SEQ, "meta": np.array("{")}, "is not a routing trace"),
        ({"experts": CHOSEN, "seq": SEQ, "meta": np.array("[]")}, "is not a routing trace"),
        ({"experts": CHOSEN, "seq": SEQ, "meta": np.array(json.dumps(META | {"version": 9}))}, "version 9 instead"),
        ({"experts": CHOSEN + 8, "seq": SEQ, "meta": np.array(json.dumps(META))}, "expert 8 of 8"),
        ({"experts": np.array([[[None]]]), "seq": SEQ}, "is not a routing trace"),
    ],
)
def test_what_is_not_a_trace_is_refused_with_the_reason(tmp_path, arrays, reason):
    np.savez(tmp_path / "odd.npz", **arrays)
    with pytest.raises(ValueError, match=reason):
        read_trace(tmp_path / "odd.npz")


@pytest.mark.parametrize("content", [b"", b"no zip", b"PK\x03\x04 and then nothing"])
def test_another_kind_of_file_is_refused(tmp_path, content):
    (tmp_path / "odd.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"odd.npz is not a routing trace \(no whole .npz archive"):
        read_trace(tmp_path / "odd.npz")


def test_a_cut_or_changed_file_never_reads_as_another_trace(tmp_path):
    writer = TraceWriter(tmp_path / "run.npz", layers=3, experts=8, top_k=2, model=None)
    writer.add(*forward(np.random.default_rng(0), 40))
    writer.close()
    whole, good = (tmp_path / "run.npz").read_bytes(), read_trace(tmp_path / "run.npz")
    for at in range(0, len(whole), 7):
        changed = bytearray(whole)
        changed[at] ^= 16
        for content in (whole[:at], bytes(changed)):
            (tmp_path / "run.npz").write_bytes(content)
            try:
                trace = read_trace(tmp_path / "run.npz")
            except ValueError:
                continue
            assert np.array_equal(trace.experts, good.experts), at


@pytest.mark.skipif(not COLLECTION.exists(), reason="the collection of published traces is not beside the repository")
def test_a_published_collection_is_read():
    trace = read_trace(COLLECTION)
    assert (trace.tokens, trace.layers, trace.top_k, trace.num_experts) == (23109, 24, 4, 32)
    assert trace.model == "openai/gpt-oss-20b"
    assert trace.seq.max() == 97

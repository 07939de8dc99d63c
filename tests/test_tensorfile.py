"""Reading safetensors files: what is right is read exactly, what is wrong is a DataError and never anything else."""

from __future__ import annotations

import json
import os
import stat
import struct

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pocketmoe.offload.errors import DataError
from pocketmoe.offload.tensorfile import DTYPES, header_bytes, read_header
from safetensors.torch import load_file, save_file


def write(path, header, data=b""):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


def entry(dtype: object = "F32", shape=(2,), begin=0, end=8):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.fixture
def good(tmp_path):
    tensors = {
        "a": torch.arange(24.0).reshape(4, 3, 2),
        "b": torch.arange(10, dtype=torch.int64),
        "c": torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).bfloat16(),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "flags": torch.tensor([True, False, True]),
    }
    save_file(tensors, tmp_path / "good.safetensors", metadata={"format": "pt"})
    return tmp_path / "good.safetensors", tensors


def test_tensors_that_safetensors_wrote_are_read_bit_for_bit(good):
    path, tensors = good
    entries = read_header(path)
    assert set(entries) == set(tensors)
    for name, want in tensors.items():
        got = entries[name].read()
        assert got.dtype == want.dtype and got.shape == want.shape and torch.equal(got, want), name


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_every_dtype_survives_the_round_trip(tmp_path, dtype):
    tensor = torch.arange(1, 7).reshape(2, 3).to(dtype)
    save_file({"t": tensor}, tmp_path / "t.safetensors")
    got = read_header(tmp_path / "t.safetensors")["t"].read()
    assert got.dtype == dtype and torch.equal(got.view(torch.uint8), tensor.view(torch.uint8))


def test_one_index_of_the_first_dimension_is_read_alone(good):
    path, tensors = good
    whole = read_header(path)["a"]
    for i in range(4):
        assert torch.equal(whole.read_index(i), tensors["a"][i : i + 1])
    with open(path, "r+b") as file:  # what lies behind the index is not touched: a shorter file is good enough
        file.truncate(whole.start + 6 * 4)
    assert torch.equal(whole.read_index(0), tensors["a"][:1])
    with pytest.raises(DataError, match=r"tensor a ends \d+ bytes early"):
        whole.read_index(1)


def test_memory_that_was_read_is_the_readers_own(good):
    path, tensors = good
    got = read_header(path)["a"].read()
    os.truncate(path, 10)  # under a memory map this would kill the process
    assert torch.equal(got, tensors["a"])


def test_header_bytes_are_padded_to_the_length_asked_for_and_safetensors_reads_them(tmp_path):
    head = header_bytes({"t": ("U8", (5,), 0, 5)}, 4096, {"format": "x"})
    assert len(head) == 4096
    (tmp_path / "t.safetensors").write_bytes(head + b"12345")
    assert bytes(load_file(tmp_path / "t.safetensors")["t"].tolist()) == b"12345"
    with pytest.raises(AssertionError):
        header_bytes({"t": ("U8", (5,), 0, 5)}, 16, {})


def test_a_file_cut_at_any_byte_is_refused(good):
    path, _ = good
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(DataError, match=r"good\.safetensors"):
            read_header(path)
    path.write_bytes(whole + b"x")
    with pytest.raises(DataError, match="too long"):
        read_header(path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "Git-LFS pointer.*git lfs pull"),
        (b"<!DOCTYPE html>\n<html><body>Not found</body></html>", "web page"),
        (b"\n  <html></html>" + b" " * 50, "web page"),
        (b"PK\x03\x04" + b"\0" * 100, "truncated or not a safetensors file"),
        (struct.pack("<Q", 1 << 62) + b"{}", "truncated or not a safetensors file"),
        (struct.pack("<Q", 5), "truncated or not a safetensors file"),
        (b"{}", "truncated or not a safetensors file"),
    ],
)
def test_what_is_not_a_safetensors_file_is_named_for_what_it_is(tmp_path, content, says):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"(?s)model\.safetensors.*{says}") as caught:
        read_header(path)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_missing_a_directory_or_a_pipe_is_refused_at_once(tmp_path):
    with pytest.raises(DataError, match="No such file"):
        read_header(tmp_path / "none.safetensors")
    with pytest.raises(DataError, match="not a regular file"):
        read_header(tmp_path)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.safetensors")  # opening it would wait for a writer for ever
        assert stat.S_ISFIFO((tmp_path / "pipe.safetensors").stat().st_mode)
        with pytest.raises(DataError, match="not a regular file"):
            read_header(tmp_path / "pipe.safetensors")


DAMAGED = {
    "not json": b"{nonsense}",
    "not utf-8": b'{"\xff": {}}',
    "utf-16": json.dumps({"t": entry()}).encode("utf-16"),
    "list": [],
    "number": 5,
    "null": b"null",
    "deep": b"[" * 200_000,
    "deep object": b'{"a":' * 200_000,
    "entry is a list": {"t": []},
    "entry is null": {"t": None},
    "no shape": {"t": {"dtype": "F32", "data_offsets": [0, 8]}},
    "no dtype": {"t": {"shape": [2], "data_offsets": [0, 8]}},
    "dtype is a number": {"t": entry(dtype=4)},
    "dtype is a list": {"t": entry(dtype=["F32"])},
    "dtype with escapes": {"t": entry(dtype="\x1b[31m")},
    "shape is text": {"t": {**entry(), "shape": "2"}},
    "shape is a number": {"t": {**entry(), "shape": 2}},
    "shape holds text": {"t": entry(shape=["2"])},
    "shape holds a fraction": {"t": entry(shape=[2.5])},
    "shape is infinite": b'{"t":{"dtype":"F32","shape":[1e999],"data_offsets":[0,8]}}',
    "shape is NaN": b'{"t":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}',
    "shape holds true": {"t": entry(shape=[True, 2])},
    "negative size": {"t": entry(shape=[-1, -2])},
    "size overflows": {"t": entry(shape=[1 << 62, 1 << 62])},
    "size beyond 64 bits": {"t": entry(shape=[1 << 70])},
    "endless digits": b'{"t":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,8]}}',
    "empty but enormous": {"t": entry(shape=[0, 1 << 62, 1 << 62], end=0)},
    "thousands of dimensions": {"t": entry(shape=[1] * 5000, end=4)},
    "offsets reversed": {"t": entry(begin=8, end=0)},
    "offsets negative": {"t": entry(begin=-8, end=0)},
    "three offsets": {"t": {**entry(), "data_offsets": [0, 4, 8]}},
    "offsets are text": {"t": {**entry(), "data_offsets": "08"}},
    "offsets beyond the file": {"t": entry(shape=[1 << 40], end=1 << 42)},
    "hole before": {"t": entry(begin=4, end=12)},
    "overlap": {"t": entry(), "u": entry(begin=4, end=12)},
    "same bytes twice": {"t": entry(), "u": entry()},
    "shape too small": {"t": entry(shape=[1])},
    "shape too large": {"t": entry(shape=[3])},
    "name with a line break": {"a\nb": entry()},
    "name with an escape": {"\x1b]52;c;aGk=\x07": entry()},
    "name with a lone surrogate": b'{"\\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
    "name of a megabyte": {"x" * 1_000_000: entry()},
    "no tensors but data": {},
}


@pytest.mark.parametrize("header", DAMAGED.values(), ids=DAMAGED.keys())
def test_a_damaged_header_is_one_printable_sentence_that_names_the_file(tmp_path, header):
    path = write(tmp_path / "model.safetensors", header, b"\0" * 8)
    with pytest.raises(DataError, match=r"model\.safetensors") as caught:
        read_header(path)
    message = str(caught.value)
    assert message.isprintable() and len(message) < 700, message


def test_a_dtype_that_torch_lacks_is_refused_when_its_tensor_is_read(tmp_path):
    path = write(tmp_path / "model.safetensors", {"t": entry(dtype="F4", shape=(16,))}, b"\0" * 8)
    with pytest.raises(DataError, match=r"model\.safetensors: tensor t has dtype F4, which is not supported"):
        read_header(path)["t"].read()


def _read_everything(path):
    message = path.name
    try:
        for found in read_header(path).values():
            tensor = found.read()
            assert tensor.numel() * tensor.element_size() == found.nbytes <= path.stat().st_size
    except DataError as error:
        message = str(error)
    assert path.name in message and message.isprintable(), message


FUZZ = settings(
    max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@FUZZ
@given(
    changes=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=6),
    cut=st.integers(0, 40),
)
@example(changes=[(7, 255)], cut=0)
def test_random_damage_to_a_file_is_never_anything_but_a_data_error(good, tmp_path, changes, cut):
    data = bytearray(good[0].read_bytes())
    header = int.from_bytes(data[:8], "little") + 8
    for position, value in changes:
        data[position % header] = value
    path = tmp_path / "fuzz.safetensors"
    path.write_bytes(data[: len(data) - cut] if cut else data)
    _read_everything(path)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-4, 1 << 65) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
_ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*DTYPES, "F4"]) | _JSON,
        "shape": st.lists(st.integers(0, 4), max_size=3) | st.lists(_JSON, max_size=3) | _JSON,
        "data_offsets": st.tuples(st.integers(0, 16), st.integers(0, 16)) | _JSON,
    }
)


@FUZZ
@given(header=st.dictionaries(st.text(max_size=6), _ENTRY | _JSON, max_size=3) | _JSON, data=st.binary(max_size=16))
def test_a_header_of_any_json_is_read_or_refused(tmp_path, header, data):
    _read_everything(write(tmp_path / "fuzz.safetensors", header, data))

"""GGUF files that are damaged, hostile or of a kind that cannot be used: each is refused in one sentence."""

from __future__ import annotations

import contextlib
import io
import random
import reprlib
import struct
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf_models import write_model
from pocketmoe.offload import gguf_file
from pocketmoe.offload.errors import DataError
from pocketmoe.offload.gguf_config import model_config
from pocketmoe.offload.gguf_file import header_length, read_gguf
from pocketmoe.offload.gguf_source import GgufSource
from pocketmoe.offload.gguf_tokenizer import write_tokenizer
from pocketmoe.offload.loading import convert_checkpoint
from test_gguf import finish, mixed, small_model, split_in_parts, write_tensors


def test_a_file_that_cannot_be_used_is_one_sentence(tmp_path):
    def refused(file: Path, match: str) -> None:
        with pytest.raises(DataError, match=match) as error:
            GgufSource(file)
        assert "\n" not in str(error.value) and str(file.parent) in str(error.value)

    whole = write_model(tmp_path / "m.gguf", "mixtral", small_model("mixtral", tmp_path / "checkpoint"), mixed)
    content = whole.read_bytes()
    for size, match in ((0, "does not begin with GGUF"), (2000, "damaged"), (len(content) - 99, "is truncated")):
        (tmp_path / "cut.gguf").write_bytes(content[:size])
        refused(tmp_path / "cut.gguf", match)
    (tmp_path / "big.gguf").write_bytes(content[:4] + (3).to_bytes(4, "big") + content[8:])
    refused(tmp_path / "big.gguf", "for big-endian machines")
    (tmp_path / "lfs.gguf").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    refused(tmp_path / "lfs.gguf", "is a Git-LFS pointer")
    one = {"token_embd.weight": (np.zeros((8, 32), np.float32), Kind.F32)}
    refused(write_tensors(tmp_path / "bert.gguf", one, "bert"), "of architecture 'bert'; GGUF files of deepseek2, ")
    refused(write_tensors(tmp_path / "dense.gguf", one, "llama"), "is dense: it has no routed experts")
    with pytest.raises(DataError, match=r"holds GGUF files; name one of them, such as .*\.gguf"):
        convert_checkpoint(tmp_path, tmp_path / "store")
    with pytest.raises(DataError, match=r"cannot be read: No such file"):
        convert_checkpoint(tmp_path / "none.gguf", tmp_path / "store")


WRONG = {
    "block_count": ("2", 0, 10**9, [2, "2"], True),
    "embedding_length": ("32", 0, 2**63, 1.5),
    "attention.head_count": (0, "4", []),
    "attention.layer_norm_rms_epsilon": ("1e-6", 0.0, float("nan"), float("inf"), [1e-6]),
    "context_length": (0, -1),
    "expert_count": ("4", -1),
    "expert_used_count": (0, 99),
    "rope.freq_base": ("1", -1.0),
}


def test_metadata_of_a_wrong_kind_are_named_with_their_value(tmp_path):
    file = read_gguf(write_model(tmp_path / "m.gguf", "mixtral", small_model("mixtral", tmp_path / "checkpoint")))
    for key, values in WRONG.items():
        for value in values:
            with pytest.raises(DataError, match=rf"m\.gguf: metadata llama\.{key} is .*, expected ") as error:
                model_config(replace(file, fields=file.fields | {f"llama.{key}": value}))
            assert reprlib.repr(value) in str(error.value)
    other = replace(file, fields=file.fields | {"tokenizer.ggml.bos_token_id": "x", "llama.rope.scaling.type": "none"})
    assert model_config(other)["bos_token_id"] is None
    for key, value in (("tokens", [1]), ("merges", "a b"), ("token_type", ["1"])):
        with pytest.raises(DataError, match=rf"damaged tokenizer: tokenizer\.ggml\.{key} is no list of"):
            write_tokenizer(replace(file, fields=file.fields | {f"tokenizer.ggml.{key}": value}), tmp_path)
    writer = gguf.GGUFWriter(tmp_path / "split.gguf", "llama")
    writer.add_string("split.count", "two")
    finish(writer)
    with pytest.raises(DataError, match=r"split\.gguf: metadata split\.count is 'two', expected a whole number"):
        read_gguf(tmp_path / "split.gguf")


def test_headers_of_all_parts_of_a_model_together_may_not_be_larger_than_one(tmp_path, monkeypatch):
    whole = write_model(tmp_path / "m.gguf", "mixtral", small_model("mixtral", tmp_path / "checkpoint"))
    parts = split_in_parts(whole, 3)
    with parts[0].open("rb") as file:
        first = header_length(parts[0], file, parts[0].stat().st_size)
    monkeypatch.setattr(gguf_file, "_MAX_HEADER", first + 500)
    with pytest.raises(DataError, match=r"-00002-of-00003\.gguf: the GGUF header is damaged \(it goes on after"):
        read_gguf(parts[0])


@pytest.mark.parametrize("lost", ["blk.1.ffn_up_exps.weight", "blk.0.attn_q.weight", "token_embd.weight"])
def test_a_missing_tensor_is_named(lost, tmp_path):
    file = write_model(tmp_path / "m.gguf", "mixtral", small_model("mixtral", tmp_path / "checkpoint"))
    renamed = lost[:-1] + "x"
    file.write_bytes(file.read_bytes().replace(lost.encode(), renamed.encode()))
    with pytest.raises(DataError, match=f"has no tensor {lost}; is a part missing"):
        GgufSource(file)


def test_a_header_with_any_byte_changed_is_read_or_refused(tmp_path):
    file = write_tensors(tmp_path / "x.gguf", {"a.weight": (np.ones((3, 32), np.float32), Kind.F32)})
    content = bytearray(file.read_bytes())
    generator = random.Random(0)
    for position in range(4, len(content) - 3 * 128):
        for value in (0, 255, generator.randrange(256)):
            changed = content[:position] + bytes([value]) + content[position + 1 :]
            file.write_bytes(changed)
            with contextlib.suppress(DataError):  # anything else fails the test
                read_gguf(file)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (struct.pack("<IQ", 8, 20 << 30), "a value takes 21,474,836,480 bytes"),  # a string
        (struct.pack("<IIQ", 9, 8, 1 << 30), "a value takes 8,589,934,592 bytes"),  # a list of strings
        (struct.pack("<IIQ", 9, 0, 1 << 30), "a value takes 1,073,741,824 bytes"),  # a list of bytes
        (struct.pack("<IIQ", 9, 8, 9) + struct.pack("<Q400x", 400) * 9, "goes on after 3,000 bytes"),  # only in all
    ],
)
def test_a_header_that_promises_gigabytes_is_refused_before_they_are_read(value, words, monkeypatch):
    monkeypatch.setattr(gguf_file, "_MAX_HEADER", 3000)
    header = b"GGUF" + struct.pack("<IQQQ1s", 3, 0, 1, 1, b"k") + value
    size = 30 << 30
    with pytest.raises(DataError, match=rf"the GGUF header is damaged \(.*{words}"):
        header_length(Path("x.gguf"), io.BufferedReader(io.BytesIO(header)), size)  # type: ignore[arg-type]

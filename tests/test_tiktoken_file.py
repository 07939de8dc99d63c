"""Tokenizers that ship as ranked tokens and code: read without running it."""

from __future__ import annotations

import base64
import json

import pytest
import tiny
from pocketmoe.offload.checkpoint import CheckpointSource
from pocketmoe.offload.errors import DataError
from pocketmoe.offload.tiktoken_file import load_tiktoken
from pocketmoe.offload.tokenizer import load_tokenizer

TOKENS = [bytes([byte]) for byte in range(256)] + [b"lo", b"llo", b"ll", b"hello", " 中".encode(), "中文".encode()]
BASE = len(TOKENS) + 4  # numbers without a token lie between
SPECIAL = {"[BOS]": BASE, "[EOS]": BASE + 1, "<|im_end|>": BASE + 2, "<think>": BASE + 5}
HARD = "naïve 中文English混合 12345 👨‍👩‍👧 e\u0301\r\n\t<|im_end|> don't \u200d﷽"


def write(path, **changes):
    path.mkdir(exist_ok=True)
    lines = [base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(TOKENS)]
    (path / "tiktoken.model").write_bytes(b"".join(lines))
    added = {str(i): {"content": token, "special": token != "<think>"} for token, i in SPECIAL.items()}
    config = {
        "tokenizer_class": "TikTokenTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]},
        "added_tokens_decoder": added,
        "bos_token": "[BOS]",
        "eos_token": "[EOS]",
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config | changes), encoding="utf-8")
    (path / "chat_template.jinja").write_text("{{ messages[0].content }}", encoding="utf-8")
    return path


def test_tokens_have_their_ranks_as_numbers_and_special_ones_those_of_the_config(tmp_path):
    tokenizer = load_tiktoken(write(tmp_path))
    ids = tokenizer("hello llo<|im_end|><think>")["input_ids"]
    assert ids == [259, 32, 257, SPECIAL["<|im_end|>"], SPECIAL["<think>"]]
    assert tokenizer.eos_token_id == SPECIAL["[EOS]"] and tokenizer.bos_token_id == SPECIAL["[BOS]"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hello llo<think>"
    assert tokenizer.decode(tokenizer(HARD)["input_ids"]) == HARD
    assert tokenizer.chat_template == "{{ messages[0].content }}"


def test_pairs_merge_by_the_rank_of_what_they_become(tmp_path):
    """ "llol": "lo" comes before "ll", and "llo" out of l and "lo"."""
    assert load_tiktoken(write(tmp_path))("llol")["input_ids"] == [257, ord("l")]


def test_chinese_is_cut_from_latin_as_kimi_does(tmp_path):
    cut = load_tiktoken(write(tmp_path)).backend_tokenizer.pre_tokenizer.pre_tokenize_str("中文English混合 12345")
    assert [end - begin for _, (begin, end) in cut] == [2, 7, 2, 1, 3, 2]


def test_a_checkpoint_gives_its_store_the_form_that_is_read_fast(tmp_path):
    tiny.make_checkpoint(tmp_path / "checkpoint", "mixtral")
    write(tmp_path / "checkpoint")
    (tmp_path / "store").mkdir()
    CheckpointSource(tmp_path / "checkpoint").copy_files(tmp_path / "store")
    assert (tmp_path / "store" / "tokenizer.json").is_file()
    own, copied = load_tokenizer(tmp_path / "checkpoint"), load_tokenizer(tmp_path / "store")
    assert copied(HARD)["input_ids"] == own(HARD)["input_ids"]
    assert copied.eos_token == "[EOS]" and copied.chat_template == own.chat_template


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"tokenizer_class": "OtherTokenizer"}, "in tiktoken.model is of class 'OtherTokenizer', whose code"),
     ({"added_tokens_decoder": {"x": {}}}, "the tokenizer is damaged")],
)  # fmt: skip
def test_what_is_not_known_or_damaged_is_said(changes, message, tmp_path):
    with pytest.raises(DataError, match=message):
        load_tokenizer(write(tmp_path, **changes))


def test_what_is_not_known_is_said_before_anything_is_converted(tmp_path):
    tiny.make_checkpoint(tmp_path / "checkpoint", "mixtral")
    with pytest.raises(DataError, match="is of class None"):
        CheckpointSource(write(tmp_path / "checkpoint", tokenizer_class=None))


def test_code_of_a_tokenizer_is_never_run(tmp_path):
    write(tmp_path)
    (tmp_path / "tiktoken.model").unlink()
    with pytest.raises(DataError, match="needs code that ships with it, which is never run"):
        load_tokenizer(tmp_path)

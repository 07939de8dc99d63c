"""Chat templates: what the library renders, within limits that a hostile one cannot leave."""

from __future__ import annotations

import os
from typing import Any

import psutil
import pytest
from pocketmoe.offload import templates
from pocketmoe.offload.errors import DataError, PocketMoEError, UsageError
from pocketmoe.offload.templates import ChatTemplate
from transformers.utils.chat_template_utils import render_jinja_template

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "ünï <b>\n日本 {{ no }}"}
THOUGHT = {"thinking": "2 and 2", "role": "assistant", "content": "4", "reasoning_content": "2 and 2"}
SPECIAL: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>"}
# What real ones are made of, feature by feature.
GOOD = {
    "roles": "{% for m in messages %}<|{{ m['role'] }}|>{{ m.content }}{% if not loop.last %}\n{% endif %}{% endfor %}",
    "prompt": "{{ bos_token }}{{ messages[0].content | trim }}{% if add_generation_prompt %}<|assistant|>{% endif %}",
    "blocks": "{% for m in messages %}\n    {% if m.role == 'user' %}\n{{ m.content }}\n    {% endif %}\n{% endfor %}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "json": "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}",
    "macros": "{% macro show(m) -%} [{{ m.role }}] {%- endmacro %}{% for m in messages %}{{ show(m) }}{% endfor %}",
    "loops": "{% for m in messages %}{% if m.role == 'user' %}{% continue %}{% endif %}{{ m }}{% break %}{% endfor %}",
    "thoughts": "{% for m in messages[::-1] %}{{ m.reasoning_content or m.content.split('</think>')[-1] }}{% endfor %}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}\n{% endfor %}",
    "date": "{{ strftime_now('%Y') }}{{ dict(a=1).items() | list }}",
    "tools": "{% if tools %}tools{% elif tools is none %}none{% endif %}{{ documents is defined }}",
}
HOSTILE = {
    "time": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "power": "{{ (messages | length + 8) ** 999999999 }}",
    "a string": "{{ 'a' * 2000000000 }}",
    "doubling": "{% set n = namespace(s='abcdefgh') %}{% for i in range(40) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    "padding": "{{ 'a' | center(2000000000) }}",
    "a format": "{{ '%2000000000d' % 1 }}",
    "output": "{% for a in range(99999) %}{{ 'a' * 99999 }}{% endfor %}",
}


@pytest.fixture
def template():
    """Makes templates whose processes end with the test."""
    made = []

    def make(text, **options) -> ChatTemplate:
        made.append(ChatTemplate(text, SPECIAL, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize("messages", [[USER], [SYSTEM, USER, THOUGHT, USER]], ids=["one", "four"])
def test_a_template_makes_the_same_text_as_in_the_library(template, name, messages):
    [want], _ = render_jinja_template([messages], chat_template=GOOD[name], add_generation_prompt=True, **SPECIAL)
    assert template(GOOD[name]).render(messages) == want


@pytest.mark.parametrize("name", HOSTILE)
def test_a_template_that_would_not_end_or_fit_is_stopped_and_the_next_one_works(template, monkeypatch, name):
    monkeypatch.setattr(templates, "CPU_S", 0.3)
    hostile = template("{% if messages[0].content == 'go' %}" + HOSTILE[name] + "{% endif %}fine")
    before = os.times()
    with pytest.raises(DataError, match=r"takes too much (time|memory) and was stopped; .* use --raw"):
        hostile.render([{"role": "user", "content": "go"}])
    after = os.times()
    assert after.user - before.user < 1  # nothing of it happens in this process
    assert after.children_user - before.children_user < 2
    assert hostile.render([USER]) == "fine"


def test_what_a_template_may_take_is_little():
    assert templates.CPU_S < 2 and templates.template_worker.MEMORY <= 300 << 20 and templates.RESIDENT <= 300 << 20


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for %}", "refuses this conversation: "),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% set n = namespace() %}{% set n.__class__ = 1 %}", "may not hold"),
        ("{{ messages[0].content.no.such }}", "no attribute 'no'"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
    ],
)
def test_a_template_that_refuses_says_why(template, text, words):
    with pytest.raises(UsageError, match="the model's chat template refuses this conversation: ") as caught:
        template(text).render([USER])
    assert words in str(caught.value)


def test_a_system_prompt_that_a_template_refuses_goes_before_the_first_message(template):
    notices = []
    refusal = "{{ raise_exception('no') if messages[0].role == 'system' }}"
    text = refusal + "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    one = template(text, on_notice=notices.append)
    assert one.render([USER]) == f"[{USER['content']}]"
    assert not notices
    for _ in range(2):
        assert one.render([SYSTEM, USER]) == f"[Be brief.\n\n{USER['content']}]"
    assert notices == ["the model's chat template takes no system prompt; it is put before the first message"]


def test_one_process_serves_all_and_ends_when_it_is_closed(template):
    one = template("{{ messages[0].content }}")
    before = set(psutil.Process().children())
    one.render([USER])
    [worker] = set(psutil.Process().children()) - before
    one.render([USER])
    assert set(psutil.Process().children()) - before == {worker}
    one.close()
    assert not worker.is_running()


def test_a_process_that_is_gone_is_replaced(template):
    one = template("{{ messages[0].content }}")
    before = set(psutil.Process().children())
    one.render([USER])
    [worker] = set(psutil.Process().children()) - before
    worker.kill()
    with pytest.raises(PocketMoEError, match="ended the process that renders it"):
        one.render([USER])
    assert one.render([USER]) == USER["content"]

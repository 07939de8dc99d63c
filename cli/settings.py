"""What `/set` changes during a chat: sampling parameters, the system prompt, statistics and thoughts on or off."""

from __future__ import annotations

import difflib
import shlex
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..offload.errors import UsageError
from .options import RULES, check_sampling

if TYPE_CHECKING:
    from ..offload.chat import Conversation
    from ..offload.model import Model

SAMPLING_NAMES = (*RULES, "stop")
NAMES = (*SAMPLING_NAMES, "system", "stats", "thinking")


@dataclass
class ChatSettings:
    """`sampling` holds only what differs from the model's own values."""

    sampling: dict[str, Any] = field(default_factory=dict)
    show_stats: bool = False
    hide_thinking: bool = False

    def set(self, name: str, text: str, conversation: Conversation) -> None:
        """Set `name` to what `text` says; `default` gives a sampling parameter back to the model.

        Raises:
            UsageError: unknown name or a value that it can not have; nothing is changed then.
        """
        name = name.lower().replace("-", "_")
        if name not in NAMES:
            near = difflib.get_close_matches(name, NAMES, n=2)
            hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(NAMES)}."
            raise UsageError(f"There is no setting {name}; {hint}")
        if name == "system":
            conversation.system = _unquoted(text) or None
        elif name == "stats":
            self.show_stats = _switch(name, text)
        elif name == "thinking":
            self.hide_thinking = not _switch(name, text)
        elif not text:
            raise UsageError(f"Give a value: /set {name} VALUE, or /set {name} default.")
        elif text == "default":
            self.sampling.pop(name, None)
        elif name == "stop":
            self.sampling[name] = _stop_strings(text)
        else:
            self.sampling[name] = _number(name, text)

    def lines(self, model: Model, conversation: Conversation) -> list[str]:
        """All settings with their values, for the user."""
        shown = []
        for name in SAMPLING_NAMES:
            value = self.sampling.get(name, getattr(model.sampling, name, None))
            if name == "stop":
                value = " ".join(map(repr, value or ())) or "none"
            origin = "" if name in self.sampling else "  (model's own)"
            shown.append(f"{name:20}{'none' if value is None else value}{origin}")
        shown.append(f"{'system':20}{conversation.system or 'none'}")
        shown.append(f"{'stats':20}{'on' if self.show_stats else 'off'}")
        shown.append(f"{'thinking':20}{'off' if self.hide_thinking else 'on'}")
        return shown


def _number(name: str, text: str) -> float:
    rule = RULES[name]
    try:
        value = rule.kind(text)
    except ValueError:
        raise UsageError(f"{name} must be {rule.words}, not {text}.") from None
    check_sampling(name, value, name)
    return value


def _switch(name: str, text: str) -> bool:
    if text not in ("on", "off"):
        raise UsageError(f"{name} must be on or off.")
    return text == "on"


def _stop_strings(text: str) -> tuple[str, ...]:
    lexer = shlex.shlex(text, posix=True)
    lexer.whitespace_split, lexer.commenters, lexer.escape = True, "", ""
    try:
        words = list(lexer)
    except ValueError:
        raise UsageError("A quotation mark in the stop strings is not closed.") from None
    # A typed line holds no newline: \n and \t stand for it and for a tab.
    strings = tuple(word.replace("\\n", "\n").replace("\\t", "\t") for word in words)
    if not all(strings):
        raise UsageError("A stop string must not be empty; /set stop default takes them back.")
    return strings


def _unquoted(text: str) -> str:
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] == '"' else text

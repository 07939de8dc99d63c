"""Amounts of bytes as people write and read them. Decimal units: GB = 1e9 bytes; GiB = 2**30 is understood on input."""

from __future__ import annotations

import re
from fractions import Fraction

_FACTORS = {
    "": 1,
    "b": 1,
    "k": 10**3,
    "kb": 10**3,
    "m": 10**6,
    "mb": 10**6,
    "g": 10**9,
    "gb": 10**9,
    "t": 10**12,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}
_AMOUNT = re.compile(r"([+-]?(?:\d{1,18}(?:\.\d{0,18})?|\.\d{1,18}))\s*([a-z]*)", re.ASCII)
_EXAMPLES = "write for example 6GB, 800MB or 1.5GiB"


def format_bytes(count: int | float) -> str:
    """`count` bytes for the user: `812 MB`, `2.7 MB`, and one decimal from GB on (`15.7 GB`)."""
    sign, size = ("-", -count) if count < 0 else ("", count)
    for factor, unit in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        # 999.96 MB would print as "1000 MB": hand over to the next unit where rounding would reach it.
        if size >= factor * 0.9995:
            value = size / factor
            whole = factor < 10**9 and value >= 9.95
            return f"{sign}{value:.0f} {unit}" if whole else f"{sign}{value:.1f} {unit}"
    return f"{sign}{size:.0f} bytes" if size != 1 else f"{sign}1 byte"


def parse_bytes(amount: str | int) -> int:
    """Bytes in `amount`: an int is bytes already; text is a number and a unit ("4GB", "800 MB", "1.5GiB", "4096").

    Raises ValueError with one sentence that says what is wrong and what to write instead: no number, an unknown unit,
    zero, a negative or a fraction of a byte. Units are not case-sensitive.
    """
    if isinstance(amount, bool) or not isinstance(amount, (str, int)):
        raise ValueError(f"{amount!r} is not an amount of memory: {_EXAMPLES}.")
    if isinstance(amount, int):
        size = amount
    else:
        match = _AMOUNT.fullmatch(amount.strip().replace("_", "").lower())
        if match is None:
            raise ValueError(f"{amount!r} is not an amount of memory: {_EXAMPLES}.")
        number, unit = match.groups()
        if unit not in _FACTORS:
            raise ValueError(f"{amount!r} has an unknown unit {unit!r}: use B, kB, MB, GB, TB or KiB, MiB, GiB, TiB.")
        exact = Fraction(number) * _FACTORS[unit]
        size = int(exact) if exact >= 0 else -1
    if size < 0:
        raise ValueError(f"{amount!r} is negative, but an amount of memory is at least one byte: {_EXAMPLES}.")
    if size == 0:
        raise ValueError(f"{amount!r} is less than one byte: {_EXAMPLES}.")
    return size


def as_option(count: int) -> str:
    """`count` bytes as the value of an option, rounded up so that they suffice: `870MB`, `6.5GB`."""
    if count < 2 * 10**9:
        return f"{-(-count // 10**7) * 10}MB"
    return f"{-(-count // 10**8) / 10:g}GB"

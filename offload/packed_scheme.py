"""How the Linears of a GPTQ or AWQ checkpoint are packed, out of its `quantization_config`. Needs no torch."""

from __future__ import annotations

from typing import Any, NamedTuple

GPTQ, AWQ = "gptq", "awq"
_GROUPS = (32, 64, 128)


class Scheme(NamedTuple):
    """What `quantization_config` says of all of a checkpoint's packed Linears."""

    method: str
    group: int
    symmetric: bool
    zeros_less_one: bool = False

    @property
    def codec(self) -> str:
        """The record format that keeps the codes."""
        return f"int4-g{self.group}" + ("" if self.symmetric else "-asym")


def read_scheme(how: dict[str, Any]) -> Scheme:
    """The scheme of a `quantization_config`.

    Raises:
        ValueError: it is one that is not supported; the message says what of it.
    """
    method, bits, group = how.get("quant_method"), how.get("bits"), how.get("group_size")
    if method not in (GPTQ, AWQ) or bits != 4:
        raise ValueError(f"{bits} bits")
    if group not in _GROUPS:
        raise ValueError(f"groups of {group}")
    if method == AWQ:
        version = str(how.get("version", "gemm")).lower()
        if version != "gemm" or how.get("zero_point", True) is not True:
            raise ValueError(f"version {version}{'' if how.get('zero_point', True) else ' without zero points'}")
        return Scheme(AWQ, group, symmetric=False)
    if how.get("desc_act"):
        raise ValueError("columns ordered by activation, desc_act")
    form = str(how.get("checkpoint_format", GPTQ)).lower()
    if form not in (GPTQ, "gptq_v2"):
        raise ValueError(f"checkpoint_format {form}")
    return Scheme(GPTQ, group, symmetric=how.get("sym") is True, zeros_less_one=form == GPTQ)

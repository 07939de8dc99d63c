"""What a user may choose, in one frozen object."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..cache.units import parse_bytes
from ..cache.whole_file import require_writable
from .errors import UsageError, require_known
from .packed_scheme import AWQ, GPTQ, read_scheme

IO_MODES = ("direct", "mmap", "buffered")
KEEP = "keep"
"""Trunk format: as it ships."""
DEFAULT_TRUNK = "int8-g32"
DEFAULT_CODEC = "int4-g32-zp"
MXFP4 = "mxfp4"
"""A codec, and what the config of a checkpoint calls experts of its values."""
_LOSSLESS_CODECS = ("bf16", "f16", "f32")
KERNELS = ("auto", "native", "torch")
KV_DTYPES = ("auto", "f16", "model")
_TEXTS = ("device", "policy")
_SWITCHES = ("deterministic", "prefetch", "warm_start", "trace_tokens", "verify")


@dataclass(frozen=True)
class OffloadConfig:
    """Options of `load`. None means "choose for me"; the choice is made once, by the plan, and shown.

    Build it with `OffloadConfig.of(**options)`, which parses sizes and names the nearest option on a typing mistake.
    """

    ram: int | None = None
    """Hard limit in bytes on the peak resident memory of the whole process."""
    device: str = "auto"
    """What computes: cpu, a GPU as torch calls it (cuda, cuda:1, xpu), or auto: a GPU where torch can use one."""
    vram: int | None = None
    """Hard limit in bytes on what the process takes of a GPU's memory."""
    deterministic: bool = False
    """With a GPU: compute every expert there, so that answers do not depend, to the bit, on what lies where."""
    context: int | None = None
    """Tokens that the KV cache has room for."""
    kv: str = "auto"
    """What keys and values are cached in: f16, model (the dtype that the model computes in), or auto: f16 where the
    trunk is packed and single tokens take the fast path."""
    policy: str = "analog"
    """Eviction policy of the expert cache."""
    prefetch: bool = True
    """Read ahead what the next layer's router will probably choose."""
    warm_start: bool = True
    """Fill free slots with the experts that past runs of this store asked for most, and keep count of this run's."""
    io: str = "direct"
    """How records are read: direct (past the page cache), buffered, or mmap."""
    kernels: str = "auto"
    """What computes experts: native (compiled), torch, or auto (native where it can be had)."""
    threads: int | None = None
    """Compute threads."""
    readers: int = 4
    """Threads that read records; the queue depth of the disk."""
    prefill_chunk: int = 256
    """Prompt tokens per forward pass. It decides the shapes of matrix products, and so an answer's last bits."""
    slots: int | None = None
    """Exactly this many expert slots instead of what the budget leaves (for tests and benchmarks)."""
    vram_slots: int | None = None
    """The same for the slots of a GPU."""
    trace: str | None = None
    """Record which experts every token chooses in this file, for `pocketmoe replay`."""
    trace_tokens: bool = False
    """Record the token ids as well: whoever has the file can read what was said."""
    verify: bool = True
    """Check each record's checksum on its first read."""

    @classmethod
    def of(cls, **options: Any) -> OffloadConfig:
        """A checked config. Raises UsageError for unknown options and values out of range."""
        require_known(options, [field.name for field in fields(cls)], "option")
        for name in ("ram", "vram"):
            if options.get(name) is not None:
                try:
                    options[name] = parse_bytes(options[name])
                except ValueError as error:
                    raise UsageError(f"{name}: {error}") from None
        config = cls(**options)
        for names, kind, what in ((_TEXTS, str, "a text"), (_SWITCHES, bool, "True or False")):
            for name in names:
                if not isinstance(value := getattr(config, name), kind):
                    raise UsageError(f"{name} must be {what}, not {value!r}")
        for name, allowed in (("io", IO_MODES), ("kernels", KERNELS), ("kv", KV_DTYPES)):
            if getattr(config, name) not in allowed:
                raise UsageError(f"{name} must be one of {', '.join(allowed)}, not {getattr(config, name)!r}")
        for name in ("context", "threads", "readers", "prefill_chunk", "slots", "vram_slots"):
            value = getattr(config, name)
            if value is not None and (type(value) is not int or value < 1):
                raise UsageError(f"{name} must be a positive whole number, not {value!r}")
        processors = os.cpu_count()
        if config.threads and processors and config.threads > processors:  # more only wait for each other
            raise UsageError(f"threads must be at most {processors}, as this machine has, not {config.threads}")
        config._check_trace()
        return config

    def _check_trace(self) -> None:
        """Raises UsageError, before any download or conversion, for what would be one after it."""
        if self.trace is None:
            if self.trace_tokens:
                raise UsageError("trace_tokens needs a trace: name its file, as --trace FILE")
            return
        try:
            require_writable(Path(self.trace))
        except OSError as error:
            raise UsageError(f"trace: {self.trace} cannot be written: {error.strerror or error}") from None
        except TypeError:
            raise UsageError(f"trace must be a file's name, not {self.trace!r}") from None


def kept_codec(quantization: Any) -> str | None:
    """The codec that keeps the values of a packed checkpoint.

    Args:
        quantization: the `quantization_config` of config.json.

    Returns:
        None when the checkpoint is not packed, or in a way that no codec keeps.
    """
    try:
        if quantization["quant_method"] == MXFP4:
            return MXFP4
        if quantization["quant_method"] in (GPTQ, AWQ):
            return read_scheme(quantization).codec
        if (quantization["quant_method"], quantization["format"]) != ("compressed-tensors", "pack-quantized"):
            return None
        kinds = {
            tuple(group["weights"][name] for name in ("num_bits", "type", "symmetric", "strategy", "group_size"))
            for group in quantization["config_groups"].values()
        }
    except (TypeError, KeyError, AttributeError, ValueError):
        return None
    return next((f"int4-g{size}" for size in (32, 64, 128) if kinds == {(4, "int", True, "group", size)}), None)


def default_trunk(codec: str) -> str:
    """The trunk format that goes with a codec: lossless experts keep a lossless trunk."""
    return KEEP if codec in _LOSSLESS_CODECS else DEFAULT_TRUNK

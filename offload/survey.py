"""`survey`: a model on this machine, or on one that is described, with what was measured and what was assumed."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..cache.hit_curve import RECORDED, HitCurve
from ..quant.native_library import load_native, why_missing
from . import gguf_hub, hub, memory, probe
from .apart import run_apart
from .checkpoint_files import CONFIG
from .disk_speed import direct_read_rate
from .errors import MemoryBudgetError, UsageError
from .estimate import Rates
from .gguf_file import GgufFile, is_gguf, read_gguf
from .naming import locate
from .outline import Outline
from .outline_cache import Known, OutlineCache
from .outlook import Change, Fit, Machine, changes, fit
from .placement import CUDA_CONTEXT, LEAVE_FREE

DISK_RATE, RAM_RATE, VRAM_RATE = 3.5e9, 40e9, 300e9
"""Assumed where nothing can be measured: an NVMe disk of PCIe 3, two channels of DDR4, a small graphics card."""
LOADED_LATER = 8 << 20
"""What libraries take with a first forward pass, and the threads that read."""
_PROBE_S = 0.4
GIVEN, MEASURED, ASSUMED = "given", "measured", "assumed"


class Origins(NamedTuple):
    """Where each rate comes from: GIVEN, MEASURED or ASSUMED."""

    ram: str
    disk: str
    vram: str


@dataclass(frozen=True)
class Survey:
    """What `pocketmoe plan` prints."""

    outline: Outline
    machine: Machine
    origins: Origins
    fit: Fit | None
    refusal: str
    """Why it does not fit; empty when it does."""
    lacking: str
    """Why compiled kernels, which keep the trunk packed, are missing on this machine; empty when they are there."""
    changes: list[Change]
    """What would help, the best first."""
    curve: HitCurve = RECORDED


def survey(
    model: str | Path,
    *,
    ram: int | None = None,
    vram: int | None = None,
    rates: Rates | None = None,
    context: int | None = None,
    codec: str | None = None,
    trunk: str | None = None,
    revision: str | None = None,
) -> Survey:
    """Plan for a store, a checkpoint, a config.json, a GGUF file or a model on the hub; reads no weights.

    Args:
        model: a path, or the name of a model on the hub, of which the config or GGUF header alone is downloaded.
        ram: budget of the process in bytes; by default what is free here, less a rest.
        vram: budget on a GPU in bytes; by default what this machine's GPU has free, if torch can use one.
        rates: bytes per second; those that are 0 are measured here or else assumed.
        context: tokens; by default the largest usual number that fits.
        revision: branch, tag or commit of a model on the hub, as of `load`.

    Raises:
        UsageError, DataError: the model or an option cannot be used.
    """
    native, keep = load_native() is not None, _is_fresh()
    with _located(str(model), revision) as (path, more):
        more |= {"codec": codec, "trunk": trunk, "native": native, "gpu_kernels": _gpu_kernels()}
        outline, program = _outline(path, keep, **more)
    if context and context > outline.longest:
        raise UsageError(
            f"context {context:,} is more than the {outline.longest:,} tokens that this model was made for"
        )
    if vram is None:
        vram = _free_vram()
    rates, origins = _rates(path, outline, rates or Rates(0, 0), vram is not None)
    machine = Machine(rates, program, ram, vram)
    fitted, refusal = None, ""
    try:
        fitted = fit(outline, machine, context)
    except MemoryBudgetError as error:
        refusal = str(error) if native else f"{error}. Without compiled kernels the trunk takes more: {why_missing()}"

    better = changes(outline, machine, context, fitted)
    return Survey(outline, machine, origins, fitted, refusal, why_missing(), better)


@contextmanager
def _located(model: str, revision: str | None) -> Iterator[tuple[Path, dict[str, Any]]]:
    """What `read_outline` is to read, and how: of a model on the hub its config, or the header of its GGUF file."""
    path, named = locate(model, revision)
    if named is None:
        yield path, {}
        return
    name, wanted = named
    is_settled = hub.is_settled(revision)

    def find_gguf() -> hub.HubModel | None:
        return gguf_hub.find_cached(name, revision, wanted) if is_settled else None

    if not wanted:
        cached = hub.find_cached(name, revision) if is_settled else None
        config = cached and str(Path(cached.folder, CONFIG))
        if cached is None and find_gguf() is None:
            request = {"name": name, "revision": revision}
            config = run_apart(f"{hub.__name__}:fetch_config", request, what="the lookup")
        if config is not None:
            yield Path(config).parent, {"name": name}
            return
    if (gguf := find_gguf()) is not None:
        yield gguf.first_file, {"name": f"{name}/{gguf.first_file.name}"}
        return
    with tempfile.TemporaryDirectory(prefix="pocketmoe-") as folder:
        request = {"name": name, "revision": revision, "wanted": wanted, "folder": folder}
        found = run_apart(f"{gguf_hub.__name__}:fetch_headers", request, what="the lookup")
        path = Path(found["path"])
        yield path, {"name": f"{name}/{path.name}", "sizes": {Path(p).name: n for p, n in found["sizes"].items()}}


def _is_fresh() -> bool:
    """Whether this process takes no more than one that was started for a model: others may hold models already."""
    return "torch" not in sys.modules


def _outline(path: Path, keep: bool, sizes: Mapping[str, int] | None = None, **options: Any) -> Known:
    """A model's outline, and what the process takes that has it loaded: from the last time, or else found, and then to
    be kept or not."""
    cache = OutlineCache(path, **options)
    known = None if sizes else cache.read()  # a header alone lies in a folder that will be gone
    if known is None:
        from .outline_reader import read_outline

        gguf = read_gguf(path, sizes) if is_gguf(path) and path.exists() else None
        outline = read_outline(path, gguf=gguf, **options)
        known = Known(outline, _program_bytes(path, gguf))
        if keep and not sizes:
            cache.write(known)
    return known


def _program_bytes(path: Path, gguf: GgufFile | None) -> int:
    """What Python, torch, the skeleton and the tokenizer take, and what libraries load with the first tokens."""
    from .gguf_tokenizer import write_tokenizer
    from .tokenizer import load_tokenizer

    tokenizer = load_tokenizer(path) if path.is_dir() else None
    if gguf is not None:
        with tempfile.TemporaryDirectory(prefix="pocketmoe-") as folder:
            write_tokenizer(gguf, Path(folder))
            tokenizer = load_tokenizer(Path(folder))
    memory.return_freed_memory()
    resident = memory.resident_bytes() + LOADED_LATER
    del tokenizer
    return resident


def _gpu_kernels() -> bool:
    """Whether they can run on this machine's GPU; of one that is not here they are taken to."""
    if not probe.may_have_gpu():
        return True
    from ..quant.triton_kernels import load_triton
    from .device import default_device, kernel_obstacle, require_device

    name = default_device()
    return name == "cpu" or (kernel_obstacle(require_device(name)) is None and load_triton() is not None)


def _free_vram() -> int | None:
    if not probe.may_have_gpu():
        return None
    import torch

    if not torch.cuda.is_available():
        return None
    free, _ = torch.cuda.mem_get_info()
    return int(free * (1 - LEAVE_FREE)) + CUDA_CONTEXT  # what is free is beside the context that asks


def _rates(path: Path, outline: Outline, given: Rates, gpu: bool) -> tuple[Rates, Origins]:
    """The rates to use, and where each comes from."""

    def rate(given: float, measure: Callable[[], float] | None, otherwise: float) -> tuple[float, str]:
        if given:
            return given, GIVEN
        try:
            return (measure(), MEASURED) if measure else (otherwise, ASSUMED)
        except (OSError, ValueError, RuntimeError):
            return otherwise, ASSUMED

    file = probe.largest_file(path)
    record = outline.record_bytes
    ram, of_ram = rate(given.ram, probe.ram_rate, RAM_RATE)
    read = (lambda: direct_read_rate(file, record, _PROBE_S)) if file else None
    disk, of_disk = rate(given.disk, read, DISK_RATE)
    vram, of_vram = rate(given.vram, probe.vram_rate if _free_vram() else None, VRAM_RATE) if gpu else (0.0, ASSUMED)
    return Rates(ram, disk, vram), Origins(of_ram, of_disk, of_vram)

"""What of this machine stands in the way, and the command that mends it.

Facts are gathered first; what they mean is said by plain functions of them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

from ..cache.units import format_bytes
from . import memory, probe
from .disk_speed import direct_read_rate
from .probe import FileSystem, Gpu, TorchFacts

OK, WARN, FAIL = "ok", "warn", "fail"
"""As it should be; works, and could be better; something that is there cannot be used."""
PYTHON = (3, 10)
_WHEELS = "https://download.pytorch.org/whl"
_LEAST_DRIVER = {13: 580, 12: 525, 11: 450}
"""The oldest driver that a CUDA generation runs on (NVIDIA, CUDA Compatibility)."""
_BUILDS = ((580, "cu130"), (570, "cu128"), (525, "cu126"))
"""Builds of torch, and the drivers from which on they are the best choice."""
_OLD_GPU, _FOR_OLD_GPUS = (7, 5), "cu126"
"""Builds for later CUDA leave out GPUs below this compute capability (PyTorch 2.8 release notes)."""
_FILE_SYSTEMS = {
    "btrfs": ("checksums and compression make direct reads slower", "move the store to ext4 or xfs"),
    "tmpfs": ("the store itself takes RAM that experts could have", "move the store to a disk"),
    "ramfs": ("the store itself takes RAM that experts could have", "move the store to a disk"),
    "overlay": ("a container's layer, slower than a volume", "mount a volume and put the store there"),
    "9p": ("files of Windows seen from WSL, many times slower", "move the store into the file system of WSL"),
    "drvfs": ("files of Windows seen from WSL, many times slower", "move the store into the file system of WSL"),
}
_NETWORK = ("nfs", "cifs", "smb", "fuse.sshfs", "afs", "ceph", "gluster")
_SLOW_DISK = 0.8e9
_LITTLE_RAM = 3e9
_T = TypeVar("_T")


class Row(NamedTuple):
    """One finding."""

    name: str
    status: str
    text: str
    remedy: str = ""
    """A command, or what to do; empty when there is nothing."""


class Unknown(NamedTuple):
    """A fact that could not be had."""

    why: str


class Copies(NamedTuple):
    """Bytes per second from RAM to the GPU."""

    pinned: float
    pageable: float


class StoreFacts(NamedTuple):
    """A store or any other folder with large files."""

    path: Path
    what: str
    """For the user."""
    file_system: FileSystem | Unknown
    rate: float | Unknown
    """Direct reads, bytes per second."""


class CpuFacts(NamedTuple):
    name: str
    cores: int
    isas: tuple[str, ...]
    """That the compiled kernels can use here, best first; empty when there are none."""
    why_no_kernels: str
    """Why there are none, and how to get them; empty when there are some."""


@dataclass(frozen=True)
class Facts:
    """All that `diagnose` goes by."""

    python: tuple[int, ...]
    torch: TorchFacts | Unknown
    gpus: list[Gpu] | Unknown
    copies: Copies | Unknown | None
    """None = there is nothing to copy to."""
    ram: tuple[int, int] | Unknown
    """Total and available bytes."""
    pin_limit: int | Unknown | None
    cpu: CpuFacts | Unknown
    triton: str | Unknown
    """Its version."""
    store: StoreFacts | Unknown | None
    """None = none was named."""


def gather(store: Path | None = None) -> Facts:
    """Ask the machine; a few seconds. Never raises: what goes wrong is a fact."""
    torch = _attempt(probe.torch_facts)
    usable = isinstance(torch, TorchFacts) and torch.usable
    return Facts(
        python=tuple(sys.version_info[:3]),
        torch=torch,
        gpus=_attempt(probe.gpus),
        copies=_attempt(lambda: Copies(probe.copy_rate(True), probe.copy_rate(False))) if usable else None,
        ram=_attempt(_ram),
        pin_limit=_attempt(probe.pin_limit),
        cpu=_attempt(_cpu),
        triton=_attempt(_triton),
        store=None if store is None else _attempt(lambda: _store(store)),
    )


def _attempt(probe: Callable[[], _T]) -> _T | Unknown:
    try:
        return probe()
    except Exception as error:  # whatever it is: the other findings are worth having
        return Unknown(" ".join(str(error).split()) or type(error).__name__)


def _ram() -> tuple[int, int]:
    import psutil

    return psutil.virtual_memory().total, memory.available_bytes()


def _cpu() -> CpuFacts:
    from ..quant.native_library import load_native, why_missing

    library = load_native()
    return CpuFacts(probe.processor(), os.cpu_count() or 1, library.isas if library else (), why_missing())


def _triton() -> str:
    import triton

    return triton.__version__


def _store(path: Path) -> StoreFacts:
    from .manifest import Manifest, is_store

    if not path.is_dir():
        raise OSError(f"{path} is no directory")
    what, record = "no store", 2 << 20
    if is_store(path):
        manifest = Manifest.read(path)
        what, record = (
            f"{manifest.num_experts:,} experts of {format_bytes(manifest.record_bytes)}",
            manifest.record_bytes,
        )
    file = probe.largest_file(path)
    rate: float | Unknown = Unknown("no file of weights is large enough")
    if file is not None:
        rate = _attempt(lambda: direct_read_rate(file, record, 0.5))
    return StoreFacts(path, what, _attempt(lambda: probe.file_system(path)), rate)


def diagnose(facts: Facts) -> list[Row]:
    """The findings, in the order in which they are best mended."""
    gpus = facts.gpus if isinstance(facts.gpus, list) else []
    gpu = gpus[0] if gpus else None
    rows = [
        python_row(facts.python),
        torch_row(facts.torch, gpu),
        _known("GPU", facts.gpus, lambda found: gpu_row(found, facts.torch)),
    ]
    if gpu is not None:
        rows += [driver_row(gpu, facts.torch), link_row(gpu)]
    if facts.copies is not None:
        rows.append(_known("copies", facts.copies, lambda copies: copies_row(copies, gpu)))
    rows += [
        _known("RAM", facts.ram, lambda ram: ram_row(*ram)),
        _known("pin limit", facts.pin_limit, lambda limit: pin_row(limit, facts.copies)),
        _known("CPU", facts.cpu, cpu_row),
        _known("kernels", facts.cpu, kernels_row),
        triton_row(facts.triton, gpu),
    ]
    if facts.store is None:
        rows.append(Row("store", OK, "none was named; `pocketmoe doctor STORE` also measures its disk"))
    elif isinstance(facts.store, Unknown):
        rows.append(Row("store", FAIL, facts.store.why))
    else:
        rows.append(Row("store", OK, f"{facts.store.path}: {facts.store.what}"))
        rows.append(_known("disk", facts.store.rate, disk_row))
        rows.append(_known("file system", facts.store.file_system, file_system_row))
    return rows


def _known(name: str, fact: _T | Unknown, row: Callable[[_T], Row]) -> Row:
    return unknown_row(name, fact) if isinstance(fact, Unknown) else row(fact)


def unknown_row(name: str, fact: Unknown) -> Row:
    return Row(name, WARN, f"could not be measured: {fact.why}")


def python_row(version: tuple[int, ...]) -> Row:
    text = ".".join(map(str, version))
    if version < PYTHON:
        return Row("Python", FAIL, f"{text} is too old", f"install Python {'.'.join(map(str, PYTHON))} or newer")
    return Row("Python", OK, text)


def torch_row(torch: TorchFacts | Unknown, gpu: Gpu | None) -> Row:
    if isinstance(torch, Unknown):
        return Row("torch", FAIL, f"cannot be imported: {torch.why}", f"{_pip()} torch")
    if gpu is None:
        return Row("torch", OK, f"{torch.version}, {_build(torch)}")
    if torch.cuda is None and torch.hip is None:
        text = f"{torch.version} is built for the CPU alone, so {gpu.name} is not used"
        return Row("torch", FAIL, text, install_torch(gpu) or _newer_driver(_LEAST_DRIVER[12]))
    if not torch.usable:
        reason = f": {torch.why_not}" if torch.why_not else ""
        remedy = "" if _is_too_old(gpu, torch) else (install_torch(gpu) or "")
        return Row("torch", FAIL, f"{torch.version}, {_build(torch)}, cannot use {gpu.name}{reason}", remedy)
    return Row("torch", OK, f"{torch.version}, {_build(torch)}")


def _build(torch: TorchFacts) -> str:
    return f"CUDA {torch.cuda}" if torch.cuda else f"ROCm {torch.hip}" if torch.hip else "for the CPU"


def _pip() -> str:
    return f"{Path(sys.executable).name} -m pip install"


def install_torch(gpu: Gpu) -> str | None:
    """The command that installs a torch for a GPU and its driver; None when the driver is too old for any."""
    driver = _major(gpu.driver)
    build = next((name for least, name in _BUILDS if driver is None or driver >= least), None)
    if build is not None and gpu.capability is not None and gpu.capability < _OLD_GPU:
        build = _FOR_OLD_GPUS
    # pip takes the CPU's build for the same version: without force it would do nothing.
    return build and f"{_pip()} --force-reinstall torch --index-url {_WHEELS}/{build}"


def _major(driver: str) -> int | None:
    head = driver.partition(".")[0]
    return int(head) if head.isdigit() else None


def _is_too_old(gpu: Gpu, torch: TorchFacts | Unknown) -> bool:
    driver = _major(gpu.driver)
    return driver is not None and driver < _least_driver(torch)


def _least_driver(torch: TorchFacts | Unknown) -> int:
    cuda = torch.cuda if isinstance(torch, TorchFacts) else None
    return _LEAST_DRIVER.get(int(cuda.partition(".")[0]) if cuda else 12, max(_LEAST_DRIVER.values()))


def _newer_driver(least: int) -> str:
    return f"install NVIDIA's driver {least} or newer: https://www.nvidia.com/drivers"


def gpu_row(gpus: list[Gpu], torch: TorchFacts | Unknown) -> Row:
    if not gpus:
        if isinstance(torch, TorchFacts) and torch.usable:
            return Row("GPU", OK, "torch can use one, whose driver tells nothing more")
        return Row("GPU", OK, "no NVIDIA GPU found: everything is computed by the CPU")
    texts = []
    for gpu in gpus:
        sizes = f", {format_bytes(gpu.free)} of {format_bytes(gpu.total)} free" if gpu.free and gpu.total else ""
        texts.append(gpu.name + sizes)
    first = gpus[0]
    if first.free is not None and first.total and first.free < first.total / 2:
        return Row("GPU", WARN, "; ".join(texts), "nvidia-smi lists the programs that use it; close some")
    return Row("GPU", OK, "; ".join(texts))


def driver_row(gpu: Gpu, torch: TorchFacts | Unknown) -> Row:
    if _is_too_old(gpu, torch):
        least = _least_driver(torch)
        what = f"CUDA {torch.cuda}" if isinstance(torch, TorchFacts) and torch.cuda else "any current torch"
        return Row("driver", FAIL, f"{gpu.driver} is too old for {what}", _newer_driver(least))
    return Row("driver", OK, gpu.driver)


def link_row(gpu: Gpu) -> Row:
    link = gpu.link
    if link is None:
        return unknown_row("link", Unknown("the driver does not tell it"))
    text = f"PCIe {link.most_generation} x{link.width}, at most {link.rate / 1e9:.0f} GB/s"
    if link.width < link.most_width:
        return Row(
            "link",
            WARN,
            f"{text}; the card could use {link.most_width} lanes",
            "move it to the slot nearest to the CPU",
        )
    return Row("link", OK, text)


def copies_row(copies: Copies, gpu: Gpu | None) -> Row:
    text = f"RAM to GPU: {format_bytes(copies.pinned)}/s pinned, {format_bytes(copies.pageable)}/s pageable"
    if gpu is not None and gpu.link is not None and copies.pinned < gpu.link.rate / 2:
        return Row("copies", WARN, f"{text}; the link should carry {gpu.link.rate / 1e9:.0f} GB/s", "run it again idle")
    return Row("copies", OK, text)


def ram_row(total: int, available: int) -> Row:
    text = f"{format_bytes(available)} of {format_bytes(total)} can be used"
    if available < _LITTLE_RAM:
        return Row("RAM", WARN, text, "close other programs, or lift the container's limit")
    return Row("RAM", OK, text)


def pin_row(limit: int | None, copies: Copies | Unknown | None) -> Row:
    text = "no limit" if limit is None else f"{format_bytes(limit)} (RLIMIT_MEMLOCK)"
    if copies is None:
        return Row("pin limit", OK, f"{text}; nothing is pinned without a GPU")
    if limit is not None and isinstance(copies, Unknown):
        return Row("pin limit", WARN, f"{text}; pinned copies failed", "ulimit -l unlimited")
    return Row("pin limit", OK, text if limit is None else f"{text}, which CUDA's driver is not bound by")


def cpu_row(cpu: CpuFacts) -> Row:
    isas = ", ".join(cpu.isas)
    text = f"{cpu.name}, {cpu.cores} threads" + (f", {isas}" if isas else "")
    if cpu.isas == ("portable",):
        return Row("CPU", WARN, f"{text}: none of the instruction sets that the kernels are made for")
    return Row("CPU", OK, text)


def kernels_row(cpu: CpuFacts) -> Row:
    if cpu.why_no_kernels:
        return Row(
            "kernels", WARN, cpu.why_no_kernels, f"{Path(sys.executable).name} -m pocketmoe.quant.native --build"
        )
    return Row("kernels", OK, "compiled")


def triton_row(triton: str | Unknown, gpu: Gpu | None, platform: str = sys.platform) -> Row:
    if gpu is None:
        return Row("triton", OK, "not needed without a GPU")
    if isinstance(triton, Unknown):
        package = "triton-windows" if platform == "win32" else "triton"
        text = f"missing ({triton.why}): the GPU computes with slower kernels"
        return Row("triton", WARN, text, f"{_pip()} {package}")
    return Row("triton", OK, triton)


def disk_row(rate: float) -> Row:
    text = f"direct reads {format_bytes(rate)}/s"
    if rate < _SLOW_DISK:
        return Row("disk", WARN, f"{text}, which is slow", "put the store on an NVMe disk, or give it more --ram")
    return Row("disk", OK, text)


def file_system_row(found: FileSystem) -> Row:
    text = f"{found.kind} at {found.mount}, {format_bytes(found.free)} free"
    if found.kind in _FILE_SYSTEMS:
        reason, remedy = _FILE_SYSTEMS[found.kind]
        return Row("file system", WARN, f"{text}: {reason}", remedy)
    if found.kind.startswith(_NETWORK):
        return Row("file system", WARN, f"{text}: every miss crosses the network", "move the store to a local disk")
    return Row("file system", OK, text)


def examine(store: Path | None = None) -> list[Row]:
    """`diagnose` of what `gather` finds."""
    return diagnose(gather(store))

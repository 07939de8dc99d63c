"""What this machine has and how fast it is. Every probe may raise, and none changes anything; `doctor` and `plan` ask.

Nothing here is cached, and torch is imported where it is the subject only: a broken torch is one of the findings.
"""

from __future__ import annotations

import csv
import platform
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

from .pages import huge_pages

_SMI_FIELDS = (
    "name,driver_version,memory.total,memory.free,compute_cap,"
    "pcie.link.gen.current,pcie.link.width.current,pcie.link.gen.max,pcie.link.width.max"
)
_DRIVER_FILES = Path("/proc/driver/nvidia")
_GPU_FILES = ("nvidia*", "kfd", "dxg", "nvhost*", "nvmap", "dri/renderD*")
_MIB = 1 << 20
_LARGE_FILE = 64 << 20


class Link(NamedTuple):
    """A PCIe link: generation and number of lanes, now and at most. An idle GPU may have slowed its link down."""

    generation: int
    width: int
    most_generation: int
    most_width: int

    @property
    def rate(self) -> float:
        """Bytes per second that it could carry: a lane of generation 3 carries 0.985 GB/s, each later one twice that
        of the one before, each earlier one half or less."""
        return 0.985e9 * 2.0 ** (self.most_generation - 3) * self.width


class Gpu(NamedTuple):
    """An NVIDIA GPU as its driver describes it; None is unknown."""

    name: str
    driver: str
    total: int | None = None
    free: int | None = None
    capability: tuple[int, int] | None = None
    link: Link | None = None


class TorchFacts(NamedTuple):
    """The installed torch."""

    version: str
    cuda: str | None
    """The CUDA that it was built with; None = CPU only."""
    hip: str | None
    usable: bool
    """It sees a GPU and can use it."""
    why_not: str = ""


class FileSystem(NamedTuple):
    """What a path lies on."""

    kind: str
    mount: str
    free: int


def gpus() -> list[Gpu]:
    """The NVIDIA GPUs; none where there is no driver. Raises OSError or ValueError when a driver gives no answer."""
    command = ["nvidia-smi", f"--query-gpu={_SMI_FIELDS}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, timeout=3)
    except FileNotFoundError:
        return _gpus_of_driver_files(_DRIVER_FILES)
    except subprocess.TimeoutExpired:
        raise OSError("nvidia-smi gave no answer within 3 s") from None
    if done.returncode:
        raise OSError(" ".join((done.stdout + done.stderr).split()) or f"nvidia-smi ended with {done.returncode}")
    return parse_smi(done.stdout)


def parse_smi(text: str) -> list[Gpu]:
    """What `nvidia-smi --query-gpu` prints of the fields above; what it does not know is `[N/A]` or the like."""

    def number(cell: str) -> int | None:
        return int(cell) if cell.isdigit() else None

    found = []
    for name, driver, total, free, capability, *lanes in csv.reader(text.splitlines(), skipinitialspace=True):
        major, _, minor = capability.partition(".")
        known = [number(cell) for cell in lanes]
        found.append(
            Gpu(
                name,
                driver,
                None if (mib := number(total)) is None else mib * _MIB,
                None if (mib := number(free)) is None else mib * _MIB,
                (int(major), int(minor)) if major.isdigit() and minor.isdigit() else None,
                Link(*known) if len(known) == 4 and None not in known else None,  # type: ignore[arg-type]
            )
        )
    return found


def _gpus_of_driver_files(folder: Path) -> list[Gpu]:
    """The same from the files of the Linux driver, for containers without nvidia-smi."""
    version = folder / "version"
    if not version.exists():
        return []
    words = version.read_text().split()  # "NVRM version: NVIDIA UNIX x86_64 Kernel Module  560.35.03  Fri Aug ..."
    driver = next((word for word in words if word[0].isdigit() and word.replace(".", "").isdigit()), "unknown")
    found = []
    for file in sorted(folder.glob("gpus/*/information")):
        models = [line.partition(":")[2] for line in file.read_text().splitlines() if line.startswith("Model:")]
        found.append(Gpu(models[0].strip() if models else "NVIDIA GPU", driver))
    return found


def may_have_gpu(devices: Path = Path("/dev"), driver: Path = _DRIVER_FILES) -> bool:
    """False where torch need not be asked: no driver has made a device of a kind that it could use, nor is NVIDIA's
    loaded, which may make them when they are first wanted."""
    if sys.platform == "darwin":
        return False
    found = (path for pattern in _GPU_FILES for path in devices.glob(pattern))
    return sys.platform != "linux" or driver.exists() or next(found, None) is not None


def torch_facts() -> TorchFacts:
    """Raises ImportError or OSError when torch cannot be imported."""
    import torch

    why_not = ""
    usable = torch.cuda.is_available()
    if not usable and torch.version.cuda:
        try:
            torch.cuda.init()
        except Exception as error:  # what is wrong is in the text
            why_not = " ".join(str(error).split())
    return TorchFacts(torch.__version__, torch.version.cuda, torch.version.hip, usable, why_not)


def copy_rate(pinned: bool, nbytes: int = 64 << 20, rounds: int = 3) -> float:
    """Bytes per second from RAM to the GPU, the best of a few copies. Raises RuntimeError where there is no GPU."""
    import torch

    source = torch.ones(nbytes, dtype=torch.uint8, pin_memory=pinned)
    target = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
    best = 0.0
    for _ in range(rounds + 1):  # the first one wakes the link up
        torch.cuda.synchronize()
        begin = time.perf_counter()
        target.copy_(source, non_blocking=pinned)
        torch.cuda.synchronize()
        best = max(best, nbytes / (time.perf_counter() - begin))
    return best


def vram_rate(nbytes: int = 256 << 20, rounds: int = 3) -> float:
    """Bytes per second that the GPU reads of its own memory. Raises RuntimeError where there is no GPU."""
    import torch

    data = torch.ones(nbytes // 4, dtype=torch.float32, device="cuda")
    best = 0.0
    for _ in range(rounds + 1):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        data.sum()
        torch.cuda.synchronize()
        best = max(best, nbytes / (time.perf_counter() - begin))
    return best


def ram_rate(nbytes: int = 128 << 20, seconds: float = 0.15) -> float:
    """Bytes per second that all cores read of RAM together, by the native kernels or, without them, by numpy."""
    import numpy as np

    from ..quant.native_library import load_native, streaming

    area, start = huge_pages(nbytes)
    data = np.frombuffer(area, np.uint64, nbytes // 8, start)
    data.fill(1)
    library = load_native()
    reading = nullcontext(data.max) if library is None else streaming(library, data.ctypes.data, nbytes)
    best, end = 0.0, time.perf_counter() + seconds
    with reading as read:
        while time.perf_counter() < end:
            begin = time.perf_counter()
            read()
            best = max(best, nbytes / (time.perf_counter() - begin))
    return best


def largest_file(path: Path) -> Path | None:
    """The largest weight file of a store or checkpoint, where it is large enough to measure the disk with."""
    candidates = path.glob("*.safetensors") if path.is_dir() else [path]
    files = [(file.stat().st_size, file) for file in candidates if file.is_file()]
    size, file = max(files, default=(0, None))
    return file if size >= _LARGE_FILE else None


def file_system(path: Path, mounts: Path = Path("/proc/self/mountinfo")) -> FileSystem:
    """The file system that holds `path`. Raises OSError where the system does not say."""
    import psutil

    real, free = path.resolve(), psutil.disk_usage(str(path)).free
    if mounts.exists():
        pairs = []
        for line in mounts.read_text().splitlines():
            before, _, after = line.partition(" - ")
            pairs.append((before.split()[4].encode().decode("unicode_escape"), after.split()[0]))
    else:
        pairs = [(part.mountpoint, part.fstype) for part in psutil.disk_partitions(all=True)]
    holding = [(mount, kind) for mount, kind in pairs if real == Path(mount) or Path(mount) in real.parents]
    if not holding:
        raise OSError(f"no mount point holds {real}")
    # Of two that are mounted at one place, the later hides the other.
    mount, kind = max(reversed(holding), key=lambda pair: len(pair[0]))
    return FileSystem(kind.lower(), mount, free)


def pin_limit() -> int | None:
    """Bytes that this process may lock in RAM; None = no limit, or none of that kind on this system."""
    try:
        import resource
    except ImportError:
        return None
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if soft == resource.RLIM_INFINITY else soft


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()

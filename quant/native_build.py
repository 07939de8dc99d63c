"""Compiles the CPU kernels in `csrc/` into one shared library with whatever C++17 compiler there is.

Used at install by `setup.py` (which loads this file by its path: it must import nothing but the standard library) and
later by `python -m pocketmoe.quant.native --build`. It does not know how the library is called.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

SOURCES = Path(__file__).resolve().parent / "csrc"
STEM = "_pocketmoe_cpu"

_X86, _ARM = ("x86_64", "amd64"), ("aarch64", "arm64")


class _Isa(NamedTuple):
    machines: tuple[str, ...]
    unix_flags: str
    msvc_flags: str = ""


# Each instruction set has its own file and flags, so that one library serves every processor; `usable()` in the file's
# table keeps the code from running where it must not.
_AVX2 = "-mavx2 -mfma -mf16c"
_AVX512 = f"{_AVX2} -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni -mprefer-vector-width=512"
_ISAS = {
    "isa_avx512": _Isa(_X86, _AVX512, "/arch:AVX512"),
    "isa_avxvnni": _Isa(_X86, f"{_AVX2} -mavxvnni", "/arch:AVX2"),
    "isa_avx2": _Isa(_X86, _AVX2, "/arch:AVX2"),
    "isa_neon": _Isa(_ARM, "-march=armv8.2-a+dotprod"),
}
# Contracted multiply-adds would make a result depend on which loop the compiler chose them in.
_UNIX_FLAGS = "-std=c++17 -O3 -fPIC -fvisibility=hidden -ffp-contract=off -fno-math-errno -Wno-psabi -pthread"
_MSVC_FLAGS = "/nologo /std:c++17 /O2 /EHsc /fp:precise /MD"


class BuildError(Exception):
    """The kernels could not be compiled; the message says why, in one or two lines."""


def library_suffix() -> str:
    return {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")


def source_hash() -> str:
    """Twelve hex digits that name the sources and flags a library was compiled from; '' if the sources are absent."""
    digest = hashlib.sha256(repr((_ISAS, _UNIX_FLAGS, _MSVC_FLAGS)).encode())
    files = sorted([*SOURCES.glob("*.h"), *SOURCES.glob("*.cpp")])
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes().replace(b"\r\n", b"\n") + b"\0")
    return digest.hexdigest()[:12] if files else ""


def find_compiler() -> list[str]:
    """The command of a C++ compiler: $CXX, the one Python was built with, or a usual name on the path.

    Raises:
        BuildError: there is none.
    """
    configured = [os.environ.get("CXX", ""), sysconfig.get_config_var("CXX") or ""]
    for command in [*map(shlex.split, configured), ["c++"], ["g++"], ["clang++"], ["cl"]]:
        if command and shutil.which(command[0]):
            return command
    raise BuildError("no C++ compiler found (looked for $CXX, c++, g++, clang++ and cl)")


def build_library(dest: Path) -> list[str]:
    """Compile the kernels into the shared library `dest`, in some ten seconds; it appears there whole or not at all.

    Returns:
        Notes for the user: the instruction sets that this compiler is too old for.

    Raises:
        BuildError: no compiler, or it failed.
    """
    sources = sorted(SOURCES.glob("*.cpp"))
    if not sources:
        raise BuildError(f"the kernels' sources are missing from {SOURCES}")
    compiler = find_compiler()
    msvc = Path(compiler[0]).stem.lower() == "cl"
    machine = platform.machine().lower()
    isa_files = [s for s in sources if s.stem in _ISAS and machine in _ISAS[s.stem].machines]
    common_files = [s for s in sources if s.stem not in _ISAS]
    dest.parent.mkdir(parents=True, exist_ok=True)
    arch = ["-arch", platform.machine()] if sys.platform == "darwin" else []
    always = [*compiler, *_MSVC_FLAGS.split()] if msvc else [*compiler, *arch, *_UNIX_FLAGS.split()]
    with tempfile.TemporaryDirectory(prefix="pocketmoe-build-") as scratch:

        def compile_one(source: Path, defines: list[str]) -> tuple[Path, str]:
            """The object file and, if it failed, what the compiler said."""
            target = Path(scratch) / f"{source.stem}.{'obj' if msvc else 'o'}"
            isa = _ISAS.get(source.stem, _Isa((), ""))
            flags = (isa.msvc_flags if msvc else isa.unix_flags).split()
            output = [f"/Fo{target}", "/c"] if msvc else ["-o", str(target), "-c"]
            return target, _run([*always, *flags, *defines, *output, str(source)])

        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            isa_results = list(pool.map(lambda s: compile_one(s, []), isa_files))
            too_old = [s.stem for s, (_, error) in zip(isa_files, isa_results, strict=True) if error]
            defines = [f"-DPM_WITHOUT_{stem.upper()}" for stem in too_old]
            defines.append(f'-DPM_SOURCE_HASH="{source_hash()}"')
            results = list(pool.map(lambda s: compile_one(s, defines), common_files))
        if errors := [error for _, error in results if error]:
            raise BuildError(f"{shlex.join(compiler)} failed: {_first_error(errors[0])}")
        objects = [str(target) for target, error in isa_results + results if not error]
        built = Path(scratch) / f"{STEM}{library_suffix()}"
        link = ["/nologo", "/LD", f"/Fe{built}"] if msvc else [*arch, "-shared", "-pthread", "-o", str(built)]
        error = _run([*compiler, *link, *objects])
        if error:
            raise BuildError(f"{shlex.join(compiler)} failed to link: {_first_error(error)}")
        staged = dest.with_name(f"{dest.name}.{os.getpid()}.tmp")
        shutil.copyfile(built, staged)
        os.replace(staged, dest)
    errors_of = dict(zip((s.stem for s in isa_files), (error for _, error in isa_results), strict=True))
    return [f"left out {stem}: {_first_error(errors_of[stem])}" for stem in too_old]


def _run(command: list[str]) -> str:
    """Run a command; '' if it succeeded, else what it printed."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:
        return str(error)
    return "" if done.returncode == 0 else (done.stderr + done.stdout) or f"exit status {done.returncode}"


def _first_error(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line.lower()), lines[0] if lines else "no message")

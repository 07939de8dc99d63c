"""Finding and loading the native library: where the install or the user's own build left it.

The library lies beside this file when the install found a compiler, and in the user's cache directory after
`python -m pocketmoe.quant.native --build`. A library of other sources than those in `csrc/` is not used.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from . import native_build

ABI_VERSION = 7


class NativeError(RuntimeError):
    """A call that the library refused, or memory that it could not get."""


def check(status: int, what: str) -> None:
    """Raises NativeError for a status that is not PM_OK."""
    if status:
        raise NativeError(f"{what}: " + {1: "out of memory", 2: "bad argument"}.get(status, f"status {status}"))


_POINTER, _SIZE, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
_FUNCTIONS = {
    "pm_abi_version": ((), _INT),
    "pm_source_hash": ((), ctypes.c_char_p),
    "pm_isa_name": ((_INT,), ctypes.c_char_p),
    "pm_isa_usable": ((_INT,), _INT),
    "pm_create": ((_INT, ctypes.c_char_p), _POINTER),
    "pm_destroy": ((_POINTER,), None),
    "pm_context_isa": ((_POINTER,), ctypes.c_char_p),
    "pm_set_threads": ((_POINTER, _INT), _INT),
    "pm_set_isa": ((_POINTER, ctypes.c_char_p), _INT),
    "pm_experts": (
        (_POINTER, _POINTER, _POINTER, _SIZE, _POINTER, _SIZE, _POINTER, _SIZE, _POINTER),
        _INT,
    ),
    "pm_linear": ((_POINTER, _POINTER, _POINTER, _SIZE, _POINTER), _INT),
    "pm_attention": ((_POINTER, _POINTER, _POINTER), _INT),
    "pm_latent_attention": ((_POINTER, _POINTER, _POINTER), _INT),
    "pm_layers": ((_POINTER, _POINTER, _POINTER, _SIZE, _SIZE, _INT, _POINTER, _POINTER, _POINTER), _INT),
    "pm_embed": ((_POINTER, _SIZE, _POINTER), _INT),
    "pm_head": ((_POINTER, _POINTER, _POINTER, ctypes.c_float, _POINTER, _POINTER, _POINTER), _INT),
    "pm_mlp": ((_POINTER, _POINTER, _POINTER, _INT, _POINTER), _INT),
    "pm_combine": ((_POINTER, _POINTER, _POINTER, _POINTER, _SIZE, _SIZE, _SIZE, _POINTER), _INT),
    "pm_replay": ((_POINTER, ctypes.c_char_p, _SIZE, _POINTER), _INT),
    "pm_lru_depths": ((_POINTER, _POINTER), _INT),
    "pm_cache_create": ((ctypes.c_char_p, _POINTER), _POINTER),
    "pm_cache_destroy": ((_POINTER,), None),
    "pm_cache_count": ((_POINTER,), _SIZE),
    "pm_cache_lookup": ((_POINTER, _INT, _POINTER, _SIZE, _INT, _POINTER), _INT),
    "pm_cache_use": ((_POINTER, _INT, _POINTER, _POINTER, _POINTER), _INT),
    "pm_cache_admit": ((_POINTER, _INT, _POINTER, _SIZE, _INT, _POINTER, _POINTER), _INT),
    "pm_cache_victim": ((_POINTER, _INT), _INT),
    "pm_cache_release": ((_POINTER, _INT), _INT),
    "pm_cache_is_transient": ((_POINTER, _INT), _INT),
    "pm_cache_demote": ((_POINTER, _INT), _INT),
    "pm_cache_promote": ((_POINTER, _INT), _INT),
    "pm_cache_tick": ((_POINTER,), _INT),
    "pm_cache_resize": ((_POINTER, _SIZE), _INT),
    "pm_cache_order": ((_POINTER, _POINTER), _INT),
    "pm_stream": ((_POINTER, _POINTER, _POINTER, _SIZE), ctypes.c_uint64),
}


class NativeLibrary:
    """The loaded library.

    Raises:
        OSError: it cannot be loaded on this machine.
        NativeError: it was built from other sources.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.c = ctypes.CDLL(str(path))
        self.short = ctypes.PyDLL(str(path))
        """The same for calls of microseconds, during which no other thread takes over and keeps the caller waiting."""
        try:
            for name, (arguments, result) in _FUNCTIONS.items():
                for library in (self.c, self.short):
                    function = getattr(library, name)
                    function.argtypes, function.restype = arguments, result
        except AttributeError:
            raise NativeError(f"{path} is of another version") from None
        if self.c.pm_abi_version() != ABI_VERSION:
            raise NativeError(f"{path} is of another version")
        expected = native_build.source_hash()
        if expected and self.c.pm_source_hash().decode() != expected:
            raise NativeError(f"{path} was built from other sources")

    @property
    def isas(self) -> tuple[str, ...]:
        """The instruction sets that are built in and that this processor has, best first."""
        names, index = [], 0
        while (name := self.c.pm_isa_name(index)) is not None:
            if self.c.pm_isa_usable(index):
                names.append(name.decode())
            index += 1
        return tuple(names)


def _cache_path() -> Path:
    import platformdirs

    name = f"{native_build.STEM}-{ABI_VERSION}-{native_build.source_hash()}{native_build.library_suffix()}"
    return Path(platformdirs.user_cache_dir("pocketmoe")) / "native" / name


@lru_cache(maxsize=1)
def _load() -> tuple[NativeLibrary | None, str]:
    problems = []
    installed = Path(__file__).resolve().parent / f"{native_build.STEM}{native_build.library_suffix()}"
    for path in (installed, _cache_path()):
        if not path.exists():
            continue
        try:
            return NativeLibrary(path), ""
        except (OSError, NativeError) as error:
            problems.append(str(error))
    reason = "; ".join(problems) or "they were not built at install, most likely for want of a C++ compiler"
    command = f"{Path(sys.executable).name} -m pocketmoe.quant.native --build"
    try:
        native_build.find_compiler()
        remedy = f"run `{command}`"
    except native_build.BuildError:
        remedy = f"install a C++ compiler (g++ or clang++; none was found), then run `{command}`"
    return None, f"The native CPU kernels are missing: {reason}. To get them, {remedy}."


def load_native() -> NativeLibrary | None:
    """The library of native kernels, or None; the search is done once per process."""
    return _load()[0]


def default_threads() -> int:
    """The physical cores that this process may use."""
    import psutil

    logical = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(logical, psutil.cpu_count(logical=False) or logical))


@contextmanager
def streaming(library: NativeLibrary, address: int, nbytes: int) -> Iterator[Callable[[], int]]:
    """A function that reads every byte of some memory once with all threads: no kernel can be faster."""
    pool = library.c.pm_create(default_threads(), None)
    if not pool:
        raise NativeError("no memory, or no threads, for the kernels")
    pointers, sizes = (ctypes.c_void_p * 1)(address), (ctypes.c_int64 * 1)(nbytes)
    try:
        yield lambda: library.c.pm_stream(pool, pointers, sizes, 1)
    finally:
        library.c.pm_destroy(pool)


def why_missing() -> str:
    """Why `load_native()` gave None and what to do about it, for the user; '' if it did not."""
    return _load()[1]


def build(dest: Path | None = None) -> Path:
    """Compile the kernels, into the user's cache directory unless told otherwise.

    Returns:
        The library. `load_native()` of this process will look for it again.

    Raises:
        native_build.BuildError: no compiler, or it failed.
    """
    path = dest or _cache_path()
    for note in native_build.build_library(path):
        print(note, file=sys.stderr)
    _load.cache_clear()
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m pocketmoe.quant.native", description="pocketmoe's native CPU kernels"
    )
    parser.add_argument("--build", action="store_true", help="compile them into the user's cache directory")
    if parser.parse_args(arguments).build:
        try:
            print(build())
        except (native_build.BuildError, OSError) as error:
            print(f"The native CPU kernels could not be built: {error}", file=sys.stderr)
            return 1
    library = load_native()
    print(why_missing() if library is None else f"{library.path}: {', '.join(library.isas)}")
    return 0 if library else 1

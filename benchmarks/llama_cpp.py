"""llama.cpp for the comparison: built once from the source that `llama-cpp-python`'s sdist holds, and kept.

Everything is in the user's cache folder (`pocketmoe-bench`); remove that folder to start again.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import platformdirs

PACKAGE = "llama-cpp-python==0.3.36"
CMAKE_FLAGS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=ON",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_SERVER=OFF",
    "-DLLAMA_BUILD_APP=OFF",
)
_FEATURES = {
    "GGML_SSE42": "sse4_2",
    "GGML_AVX": "avx",
    "GGML_AVX2": "avx2",
    "GGML_BMI2": "bmi2",
    "GGML_FMA": "fma",
    "GGML_F16C": "f16c",
    "GGML_AVX_VNNI": "avx_vnni",
    "GGML_AVX512": "avx512f",
    "GGML_AVX512_VBMI": "avx512_vbmi2",
    "GGML_AVX512_VNNI": "avx512_vnni",
    "GGML_AVX512_BF16": "avx512_bf16",
}
"""llama.cpp's build options by the processor's flags. AMX is left out: no consumer processor has it, and on a virtual
machine that showed the flag llama.cpp's AMX kernels died of an illegal instruction."""
DRIVER = Path(__file__).with_name("llama_driver.cpp")


class BuildError(Exception):
    """llama.cpp cannot be built here; the message says why."""


def cache_folder() -> Path:
    return platformdirs.user_cache_path("pocketmoe-bench")


def driver_path(jobs: int | None = None) -> Path:
    """The driver program, linked with a native Release build of llama.cpp; built on the first call (about 8 minutes on
    two cores).

    Raises:
        BuildError: no compiler, no cmake, no sdist.
    """
    root = cache_folder()
    root.mkdir(parents=True, exist_ok=True)
    source = _source(root)
    build = source / "build"
    jobs = jobs or os.cpu_count() or 1
    library = build / "bin" / "libllama.so"
    vendor = source / "vendor" / "llama.cpp"
    if not library.exists():
        print(f"building llama.cpp in {build}, once", file=sys.stderr)
        ninja = ["-G", "Ninja"] if shutil.which("ninja") else []
        _run(["cmake", "-S", str(vendor), "-B", str(build), *ninja, *CMAKE_FLAGS, *_processor_flags()])
        _run(["cmake", "--build", str(build), f"-j{jobs}", "--target", "llama"])
    driver = build / "llama_driver"
    if not driver.exists() or driver.stat().st_mtime < DRIVER.stat().st_mtime:
        include = [f"-I{vendor / 'include'}", f"-I{vendor / 'ggml' / 'include'}"]
        where = library.parent
        link = [f"-L{where}", "-lllama", "-lggml", "-lggml-base", f"-Wl,-rpath,{where}"]
        _run([os.environ.get("CXX", "c++"), "-O2", "-std=c++17", str(DRIVER), *include, *link, "-o", str(driver)])
    return driver


def _processor_flags() -> list[str]:
    """Everything the processor has except AMX; `native` where it cannot be told."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    if "amx_tile" not in flags:
        return ["-DGGML_NATIVE=ON"]
    return [
        "-DGGML_NATIVE=OFF",
        *(f"-D{option}={'ON' if flag in flags else 'OFF'}" for option, flag in _FEATURES.items()),
    ]


def _source(root: Path) -> Path:
    name = PACKAGE.replace("-", "_").replace("==", "-")
    folder = root / name
    if not (folder / "vendor" / "llama.cpp").is_dir():
        _run(
            [
                sys.executable,
                "-m",
                "pip",
                "download",
                "-q",
                "--no-deps",
                "--no-binary",
                ":all:",
                "-d",
                str(root),
                PACKAGE,
            ]
        )
        with tarfile.open(root / f"{name}.tar.gz") as archive:
            archive.extractall(root, filter="data")
    return folder


def _run(command: list[str]) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise BuildError(f"{command[0]} is not installed; it is needed to build llama.cpp") from None
    except subprocess.CalledProcessError as error:
        tail = "\n".join((error.stdout + error.stderr).splitlines()[-5:])
        raise BuildError(f"`{' '.join(command)}` failed:\n{tail}") from None

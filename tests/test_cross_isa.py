"""Every kernel agrees with the plain C++ one, on this processor's instruction sets and, in an emulator, on ARM's."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from pocketmoe.quant import native_build

DRIVER = Path(__file__).with_name("isa_agreement.cpp")


def agreement(compiler: list[str], machine: str, folder: Path, emulator: list[str]) -> str:
    """What the driver prints, built by `compiler` with the kernels for `machine`."""
    flags = [*native_build._UNIX_FLAGS.split(), f"-I{native_build.SOURCES}", '-DPM_SOURCE_HASH="test"']
    objects = []
    for source in [*native_build.SOURCES.glob("*.cpp"), DRIVER]:
        isa = native_build._ISAS.get(source.stem)
        if isa is not None and machine not in isa.machines:
            continue
        objects.append(folder / f"{source.stem}.o")
        own = isa.unix_flags.split() if isa else []
        subprocess.run([*compiler, *flags, *own, "-c", source, "-o", objects[-1]], check=True)
    program = folder / "agreement"
    subprocess.run([*compiler, "-static", "-pthread", *objects, "-o", program], check=True)
    done = subprocess.run([*emulator, program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_this_processors_kernels_agree(tmp_path: Path):
    machine = native_build.platform.machine().lower()
    try:
        compiler = native_build.find_compiler()
    except native_build.BuildError as error:
        pytest.skip(str(error))
    assert "0 failures" in agreement(compiler, machine, tmp_path, [])


@pytest.mark.slow
def test_neon_kernels_agree_in_an_emulator(tmp_path: Path):
    compiler, emulator = (shutil.which(name) for name in ("aarch64-linux-gnu-g++", "qemu-aarch64"))
    if compiler is None or emulator is None:
        pytest.skip("needs aarch64-linux-gnu-g++ and qemu-aarch64")
    assert "neon: " in agreement([compiler], "aarch64", tmp_path, [emulator])

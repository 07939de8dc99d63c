"""Compiles the CPU kernels at install. Everything else about the package is in pyproject.toml.

The kernels are a plain shared library that Python loads with ctypes, not an extension module, so one wheel serves all
Python versions of a platform. Without a compiler the package still installs, and says what is missing.
"""

import importlib.util
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
SPEC = importlib.util.spec_from_file_location("native_build", ROOT / "quant" / "native_build.py")
assert SPEC is not None and SPEC.loader is not None
native_build = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(native_build)

LIBRARY = f"pocketmoe.quant.{native_build.STEM}"


class BuildLibrary(build_ext):
    def get_ext_filename(self, fullname):
        if fullname.rpartition(".")[2] == native_build.STEM:
            return str(Path(*fullname.split("."))) + native_build.library_suffix()
        return super().get_ext_filename(fullname)

    def build_extension(self, ext):
        try:
            notes = native_build.build_library(Path(self.get_ext_fullpath(ext.name)))
        except (native_build.BuildError, OSError) as error:
            notes = [
                f"the CPU kernels were not built: {error}. pocketmoe will run on slower torch operations; "
                "install a C++ compiler and run `python -m pocketmoe.quant.native --build`"
            ]
        for note in notes:
            print(f"warning: {note}", file=sys.stderr)


class AnyPythonWheel(bdist_wheel):
    def get_tag(self):
        return ("py3", "none", super().get_tag()[2])


setup(
    ext_modules=[Extension(LIBRARY, sources=[], optional=True)],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": AnyPythonWheel},
)

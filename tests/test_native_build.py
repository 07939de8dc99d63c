"""Building the native kernels and finding them, with compilers that are shell scripts."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from pocketmoe.quant import native, native_build, native_library


def fake_compiler(path: Path, script: str) -> str:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_no_compiler_is_said_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(native_build.sysconfig, "get_config_var", lambda name: None)
    with pytest.raises(native_build.BuildError, match=r"no C\+\+ compiler found"):
        native_build.build_library(tmp_path / "library.so")


@pytest.mark.skipif(os.name != "posix", reason="the fake compilers are shell scripts")
def test_a_failing_compiler_leaves_no_library_and_its_error_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    compiler = fake_compiler(tmp_path / "c++", "echo 'x.cpp:1: error: out of luck' >&2; exit 1")
    monkeypatch.setenv("CXX", compiler)
    with pytest.raises(native_build.BuildError, match="error: out of luck"):
        native_build.build_library(tmp_path / "library.so")
    assert not (tmp_path / "library.so").exists()


@pytest.mark.skipif(os.name != "posix", reason="the fake compilers are shell scripts")
def test_an_old_compiler_leaves_out_only_the_instruction_sets_it_does_not_know(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    log = tmp_path / "log"
    script = f"""echo "$@" >> {log}
    case "$*" in *-mavxvnni*) echo 'error: unrecognized option -mavxvnni' >&2; exit 1;; esac
    while [ $# -gt 1 ]; do [ "$1" = -o ] && : > "$2"; shift; done"""
    monkeypatch.setenv("CXX", fake_compiler(tmp_path / "c++", script))
    monkeypatch.setattr(native_build.platform, "machine", lambda: "x86_64")
    notes = native_build.build_library(tmp_path / "library.so")
    assert notes == ["left out isa_avxvnni: error: unrecognized option -mavxvnni"]
    assert (tmp_path / "library.so").exists()
    commands = log.read_text().splitlines()
    assert all("-DPM_WITHOUT_ISA_AVXVNNI" in c for c in commands if "api.cpp" in c)
    assert not any("isa_avxvnni.o" in c for c in commands if "-shared" in c)


def test_why_missing_names_reason_and_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(native_library, "__file__", str(tmp_path / "native.py"))
    monkeypatch.setattr(native_library, "_cache_path", lambda: tmp_path / "absent.so")
    native_library._load.cache_clear()
    try:
        assert native.load_native() is None
        assert "not built at install" in native.why_missing()
        assert "-m pocketmoe.quant.native --build" in native.why_missing()
    finally:
        native_library._load.cache_clear()


def test_a_pool_that_cannot_be_had_is_an_error_before_the_library_reads_with_it():
    class Library:
        c = SimpleNamespace(pm_create=lambda threads, isa: None)

    with (
        pytest.raises(native_library.NativeError, match="no memory, or no threads"),
        native_library.streaming(Library(), 0, 0),  # type: ignore[arg-type]
    ):
        pass

"""`pocketmoe doctor`: every state of a machine as made-up facts, and the real one as it is."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest
from pocketmoe.cli import doctor as doctor_command
from pocketmoe.cli.main import app
from pocketmoe.offload import doctor, probe
from pocketmoe.offload.doctor import FAIL, OK, WARN, Copies, CpuFacts, Facts, Row, StoreFacts, Unknown, diagnose
from pocketmoe.offload.probe import FileSystem, Gpu, Link, TorchFacts, parse_smi
from typer.testing import CliRunner

GB = 10**9
GPU = Gpu("NVIDIA GeForce RTX 4060", "560.35.03", 8 * GB, 7 * GB, (8, 9), Link(1, 8, 4, 8))
CUDA = TorchFacts("2.13.0+cu126", "12.6", None, True)
CPU_ONLY = TorchFacts("2.13.0+cpu", None, None, False)
KERNELS = CpuFacts("Some CPU", 8, ("avx2", "portable"), "")
SOUND = Facts(
    python=(3, 12, 1),
    torch=CUDA,
    gpus=[GPU],
    copies=Copies(12e9, 5e9),
    ram=(32 * GB, 20 * GB),
    pin_limit=None,
    cpu=KERNELS,
    triton="3.4.0",
    store=None,
)


def with_store(tmp_path, kind="ext4", rate: float | Unknown = 3e9):
    return replace(SOUND, store=StoreFacts(tmp_path, "64 experts", FileSystem(kind, "/", 100 * GB), rate))


def row(facts, name) -> Row:
    [found] = [row for row in diagnose(facts) if row.name == name]
    return found


def test_a_sound_machine_is_ok_in_every_row(tmp_path):
    for facts in (SOUND, with_store(tmp_path), replace(SOUND, gpus=[], torch=CPU_ONLY, copies=None)):
        assert {found.status for found in diagnose(facts)} == {OK}
        assert {found.remedy for found in diagnose(facts)} == {""}


@pytest.mark.parametrize(
    ("driver", "capability", "build"),
    [
        ("580.65.06", (8, 9), "cu130"),
        ("572.16", (8, 9), "cu128"),
        ("560.35.03", (8, 9), "cu126"),
        ("535.183.01", (8, 9), "cu126"),
        ("580.65.06", (6, 1), "cu126"),  # later builds leave Pascal out
        ("580.65.06", None, "cu130"),
    ],
)
def test_a_gpu_with_a_torch_for_the_cpu_is_named_with_the_command_for_its_driver(driver, capability, build):
    gpu = GPU._replace(driver=driver, capability=capability)
    found = row(replace(SOUND, torch=CPU_ONLY, gpus=[gpu], copies=None), "torch")
    assert found.status == FAIL
    assert "RTX 4060 is not used" in found.text
    assert found.remedy.endswith(
        f" -m pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/{build}"
    )


def test_a_driver_that_is_too_old_for_any_torch_comes_first():
    gpu = GPU._replace(driver="470.82.01")
    facts = replace(SOUND, torch=CPU_ONLY, gpus=[gpu], copies=None)
    assert "driver 525 or newer" in row(facts, "torch").remedy
    assert row(facts, "driver").status == FAIL


@pytest.mark.parametrize(
    ("driver", "cuda", "status", "least"),
    [("560.35", "13.0", FAIL, 580), ("470.1", "12.6", FAIL, 525), ("530.1", "12.6", OK, 0), ("580.1", "13.0", OK, 0)],
)
def test_a_driver_that_is_too_old_for_the_installed_torch_is_named(driver, cuda, status, least):
    torch = TorchFacts("2.13.0", cuda, None, status == OK, "" if status == OK else "driver too old")
    found = row(replace(SOUND, torch=torch, gpus=[GPU._replace(driver=driver)], copies=None), "driver")
    assert found.status == status
    assert (f"driver {least} or newer" in found.remedy) == (status == FAIL)


def test_a_torch_that_cannot_use_the_gpu_says_why():
    torch = TorchFacts("2.13.0+cu126", "12.6", None, False, "no kernel image is available")
    found = row(replace(SOUND, torch=torch, copies=None), "torch")
    assert found.status == FAIL
    assert "no kernel image is available" in found.text
    assert "whl/cu126" in found.remedy


def test_a_torch_that_cannot_be_imported_fails_alone():
    facts = replace(SOUND, torch=Unknown("libcudart.so.12: cannot open"), gpus=[], copies=None)
    assert [found.name for found in diagnose(facts) if found.status == FAIL] == ["torch"]


def test_an_old_python_fails():
    assert row(replace(SOUND, python=(3, 9, 2)), "Python").status == FAIL


def test_a_gpu_that_other_programs_fill_is_a_warning():
    assert row(replace(SOUND, gpus=[GPU._replace(free=2 * GB)]), "GPU").status == WARN


@pytest.mark.parametrize(
    ("link", "status"), [(Link(1, 8, 4, 8), OK), (Link(4, 4, 4, 16), WARN), (None, WARN)], ids=["asleep", "narrow", "?"]
)
def test_a_link_is_judged_by_its_lanes_and_not_by_how_it_sleeps(link, status):
    assert row(replace(SOUND, gpus=[GPU._replace(link=link)]), "link").status == status


def test_slow_copies_are_judged_by_the_link():
    assert Link(4, 8, 4, 8).rate == pytest.approx(15.75e9, rel=0.01)
    assert row(replace(SOUND, copies=Copies(3e9, 2e9)), "copies").status == WARN


@pytest.mark.parametrize(
    ("limit", "copies", "status"),
    [
        (None, Copies(12e9, 5e9), OK),
        (8 << 20, Copies(12e9, 5e9), OK),
        (8 << 20, None, OK),
        (8 << 20, Unknown("out of memory"), WARN),
    ],
)
def test_a_pin_limit_matters_where_pinning_fails(limit, copies, status):
    found = row(replace(SOUND, pin_limit=limit, copies=copies), "pin limit")
    assert found.status == status
    assert (found.remedy == "ulimit -l unlimited") == (status == WARN)


def test_little_ram_is_a_warning():
    assert row(replace(SOUND, ram=(8 * GB, GB)), "RAM").status == WARN


def test_missing_kernels_bring_the_reason_and_the_command():
    cpu = CpuFacts("Some CPU", 8, (), "The native CPU kernels are missing: no C++ compiler found.")
    found = row(replace(SOUND, cpu=cpu), "kernels")
    assert (found.status, "no C++ compiler" in found.text) == (WARN, True)
    assert found.remedy.endswith(" -m pocketmoe.quant.native --build")


def test_triton_is_asked_for_only_beside_a_gpu():
    missing = Unknown("No module named 'triton'")
    assert row(replace(SOUND, triton=missing), "triton").status == WARN
    assert row(replace(SOUND, triton=missing, gpus=[], copies=None), "triton").status == OK
    assert doctor.triton_row(missing, GPU, "win32").remedy.endswith(" triton-windows")


@pytest.mark.parametrize("kind", ["btrfs", "tmpfs", "overlay", "9p", "nfs4", "cifs", "fuse.sshfs"])
def test_file_systems_that_cost_speed_are_named(kind, tmp_path):
    found = row(with_store(tmp_path, kind), "file system")
    assert (found.status, bool(found.remedy)) == (WARN, True)


@pytest.mark.parametrize("kind", ["ext4", "xfs", "ntfs", "apfs", "zfs"])
def test_other_file_systems_are_fine(kind, tmp_path):
    assert row(with_store(tmp_path, kind), "file system").status == OK


def test_a_slow_disk_and_one_that_cannot_be_measured_are_warnings(tmp_path):
    assert row(with_store(tmp_path, rate=0.5e9), "disk").status == WARN
    unknown = row(with_store(tmp_path, rate=Unknown("Invalid argument")), "disk")
    assert (unknown.status, unknown.text) == (WARN, "could not be measured: Invalid argument")


def test_a_probe_that_raises_becomes_a_row(monkeypatch):
    def broken(*_):
        raise RuntimeError("the driver has\nlost its mind")

    for name in ("torch_facts", "gpus", "pin_limit", "processor"):
        monkeypatch.setattr(probe, name, broken)
    monkeypatch.setattr(doctor, "_ram", broken)
    rows = {found.name: found for found in diagnose(doctor.gather())}
    for name in ("GPU", "pin limit", "CPU", "kernels", "RAM"):
        assert rows[name].text == "could not be measured: the driver has lost its mind"
    assert rows["torch"].status == FAIL


def test_no_store_where_one_was_named_is_a_failure(tmp_path):
    assert row(replace(SOUND, store=doctor.gather(tmp_path / "absent").store), "store").status == FAIL


def test_this_machine_is_examined_and_nothing_is_left_out(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(bytes(65 << 20))
    rows = diagnose(doctor.gather(tmp_path))
    names = [found.name for found in rows]
    assert names[:3] == ["Python", "torch", "GPU"]
    assert {"RAM", "pin limit", "CPU", "kernels", "triton", "store", "disk", "file system"} <= set(names)
    assert all(found.text for found in rows)


def test_nvidia_smi_is_read_with_what_it_does_not_know():
    [known, unknown] = parse_smi(
        "NVIDIA GeForce RTX 4060 Laptop GPU, 560.35.03, 8188, 7900, 8.9, 1, 8, 4, 16\n"
        "Tesla K80, 470.82.01, [N/A], [N/A], [N/A], [N/A], [N/A], [N/A], [N/A]\n"
    )
    assert known == Gpu(
        "NVIDIA GeForce RTX 4060 Laptop GPU", "560.35.03", 8188 << 20, 7900 << 20, (8, 9), Link(1, 8, 4, 16)
    )
    assert unknown == Gpu("Tesla K80", "470.82.01")


def test_a_driver_without_nvidia_smi_is_found_by_its_files(tmp_path, monkeypatch):
    (tmp_path / "gpus/0000:01:00.0").mkdir(parents=True)
    (tmp_path / "gpus/0000:01:00.0/information").write_text("Model: \t\t NVIDIA H100\nIRQ:   89\n")
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12\n")
    monkeypatch.setattr(probe, "_DRIVER_FILES", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert probe.gpus() == [Gpu("NVIDIA H100", "535.183.01")]
    monkeypatch.setattr(probe, "_DRIVER_FILES", tmp_path / "absent")
    assert probe.gpus() == []


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere torch is asked")
def test_torch_is_asked_where_a_driver_has_made_devices_or_may_yet_make_them(tmp_path):
    assert not probe.may_have_gpu(tmp_path, tmp_path / "driver")
    assert probe.may_have_gpu(tmp_path, tmp_path)
    (tmp_path / "kfd").touch()
    assert probe.may_have_gpu(tmp_path, tmp_path / "driver")


def test_the_file_system_is_that_of_the_innermost_mount(tmp_path):
    mounts = tmp_path / "mountinfo"
    mounts.write_text(
        "1 0 8:1 / / rw - ext4 /dev/a rw\n"
        f"2 1 8:2 / {tmp_path} rw shared:1 - xfs /dev/b rw\n"
        f"3 1 0:5 / {tmp_path} rw - tmpfs tmpfs rw\n"
    )
    assert probe.file_system(tmp_path, mounts)[:2] == ("tmpfs", str(tmp_path))
    assert probe.file_system(tmp_path.parent, mounts)[:2] == ("ext4", "/")


def test_the_command_prints_a_table_and_ends_with_1_when_a_row_failed(monkeypatch):
    facts = replace(SOUND, torch=CPU_ONLY, copies=None)
    monkeypatch.setattr(doctor_command, "examine", lambda store: diagnose(facts))
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1
    lines = result.stdout.splitlines()
    assert max(len(line) for line in lines if "to mend it" not in line) <= 80
    assert any(line.startswith("fail  torch") for line in lines)
    assert any("--force-reinstall torch --index-url" in line for line in lines)
    assert lines[-1].endswith("1 fail")


def test_json_has_a_version_and_every_row(monkeypatch):
    monkeypatch.setattr(doctor_command, "examine", lambda store: diagnose(SOUND))
    result = CliRunner().invoke(app, ["doctor", "--json"])
    data = json.loads(result.stdout)
    assert (result.exit_code, data["version"], data["failed"]) == (0, 1, 0)
    assert data["rows"][0] == {"name": "Python", "status": "ok", "text": "3.12.1", "remedy": ""}

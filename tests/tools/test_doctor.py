"""The doctor: runs anywhere, says what is wrong and what to do, never breaks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import doctor_checks
import pytest
from doctor_checks import CHECKS, FAIL, GIB, NOTE, OK, WARN, Finding, examine

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def report() -> list[dict]:
    """What the tool finds on this machine."""
    done = subprocess.run([sys.executable, "tools/doctor.py", "--json"], cwd=ROOT,
                          capture_output=True, text=True, timeout=300, check=False)
    findings = json.loads(done.stdout)
    assert done.returncode == int(any(f["status"] == FAIL for f in findings))
    assert done.stderr == ""
    return findings


def findings_of(name: str, monkeypatch) -> list[Finding]:
    monkeypatch.setattr(doctor_checks, "CHECKS", {name: CHECKS[name]})
    return list(examine())


@pytest.mark.slow
def test_every_check_reports(report):
    assert list(dict.fromkeys(f["check"] for f in report)) == list(CHECKS)
    assert all(f["status"] in (OK, NOTE, WARN, FAIL) and f["fact"] for f in report)


@pytest.mark.slow
def test_no_check_breaks_here(report):
    assert [f for f in report if "the check broke" in f["fact"]] == []


@pytest.mark.slow
def test_a_remedy_is_given_where_something_is_wrong_and_nowhere_else(report):
    assert all(bool(f["remedy"]) == (f["status"] in (WARN, FAIL)) for f in report)


@pytest.mark.slow
def test_two_processes_reduce(report):
    assert [f["fact"] for f in report if f["check"] == "gloo" and f["status"] == OK] == [
        "all-reduce between two processes of this host"]


@pytest.mark.slow
def test_every_pinned_package_is_named(report):
    named = {f["fact"].split()[0] for f in report if f["check"] == "packages"}
    pinned = [line.split("==")[0] for line in (ROOT / "requirements.txt").read_text().splitlines()
              if "==" in line]
    assert named == set(pinned) and "torch" in named


@pytest.mark.parametrize("python, release",
                         [((3, 11), "0.16."), ((3, 12), "0.19."), ((3, 13), "0.19.")])
def test_the_engine_is_of_this_python(monkeypatch, python, release):
    monkeypatch.setattr(doctor_checks.sys, "version_info", (*python, 0))
    pinned = doctor_checks.pinned_requirements()
    assert pinned["megatron-core"].startswith(release) and pinned["torch"] == "2.13.0"


@pytest.mark.slow
def test_it_starts_where_nothing_is_installed(tmp_path):
    venv.create(tmp_path / "bare", symlinks=True)
    done = subprocess.run([tmp_path / "bare" / "bin" / "python", "tools/doctor.py"], cwd=ROOT,
                          capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1 and done.stderr == ""
    assert "FAIL packages: torch is not installed, 2." in done.stdout
    assert "FAIL packages: deepspeed is not installed" in done.stdout
    assert "-> pip install -r requirements.txt" in done.stdout
    assert "ModuleNotFoundError: No module named 'torch'" in done.stdout
    assert "disk: " in done.stdout and "Traceback" not in done.stdout


@pytest.mark.slow
def test_closed_pipe_ends_quietly():
    done = subprocess.run(f"'{sys.executable}' tools/doctor.py | head -1", shell=True, cwd=ROOT,
                          capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout.startswith(("ok   python: ", "warn python: ")) and done.stderr == ""


def test_missing_package_fails(monkeypatch):
    installed = doctor_checks.installed_version
    monkeypatch.setattr(doctor_checks, "installed_version",
                        lambda name: None if name == "deepspeed" else installed(name))
    faults = [f for f in findings_of("packages", monkeypatch) if f.status == FAIL]
    wanted = doctor_checks.pinned_requirements()["deepspeed"]
    assert [f.fact for f in faults] == [f"deepspeed is not installed, {wanted} is wanted"]
    assert faults[0].remedy == "pip install -r requirements.txt"


@pytest.mark.parametrize("found, status",
                         [("{}", OK), ("{}+cu130", OK), ("0.1", WARN), ("{}.1", WARN)])
def test_other_version_warns(monkeypatch, found, status):
    wanted = doctor_checks.pinned_requirements()["torch"]
    monkeypatch.setattr(doctor_checks, "installed_version",
                        lambda name: found.format(doctor_checks.pinned_requirements()[name]))
    finding = findings_of("packages", monkeypatch)[0]
    assert finding.status == status and found.format(wanted) in finding.fact
    assert finding.remedy == ("" if status == OK else "pip install -r requirements.txt")


@pytest.mark.parametrize("version, status",
                         [((3, 10), FAIL), ((3, 11), OK), ((3, 12), OK), ((3, 13), WARN)])
def test_python_version(monkeypatch, version, status):
    monkeypatch.setattr(doctor_checks.sys, "version_info", (*version, 0, "final", 0))
    (finding,) = findings_of("python", monkeypatch)
    assert finding.status == status and bool(finding.remedy) == (status != OK)


@pytest.mark.parametrize("check, probe, value, part", [
    ("disk", "free_bytes", 3 * GIB, "3.0 GiB free"),
    ("shared memory", "total_bytes", GIB // 16, "0.1 GiB"),
    ("open files", "open_file_limits", (256, 4096), "limit 256")])
def test_too_little_warns_with_a_remedy(monkeypatch, check, probe, value, part):
    monkeypatch.setattr(doctor_checks, probe, lambda *_: value)
    (finding,) = findings_of(check, monkeypatch)
    assert finding.status == WARN and part in finding.fact and finding.remedy


@pytest.mark.parametrize("check, probe, value", [
    ("disk", "free_bytes", 20 * GIB), ("shared memory", "total_bytes", 2 * GIB),
    ("open files", "open_file_limits", (1024, 4096)), ("open files", "open_file_limits", (-1, -1))])
def test_enough_is_ok(monkeypatch, check, probe, value):
    monkeypatch.setattr(doctor_checks, probe, lambda *_: value)
    assert [f.status for f in findings_of(check, monkeypatch)] == [OK]


def test_shared_memory_remedy_is_for_docker(monkeypatch):
    monkeypatch.setattr(doctor_checks, "total_bytes", lambda *_: 64 * 2**20)
    assert "--shm-size" in findings_of("shared memory", monkeypatch)[0].remedy


def test_host_name_that_does_not_resolve_fails(monkeypatch):
    monkeypatch.setattr(doctor_checks.socket, "gethostname", lambda: "no-such-host.invalid")
    (finding,) = findings_of("host name", monkeypatch)
    assert finding.status == FAIL and "no-such-host.invalid does not resolve" in finding.fact
    assert "/etc/hosts" in finding.remedy


@pytest.mark.slow
def test_failed_all_reduce_names_the_error_and_the_variable(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no_such_if")
    (finding,) = findings_of("gloo", monkeypatch)
    assert finding.status == FAIL and "no_such_if" in finding.fact
    assert "GLOO_SOCKET_IFNAME" in finding.remedy


def test_all_reduce_that_hangs_times_out(monkeypatch):
    monkeypatch.setattr(doctor_checks, "ALL_REDUCE", "import time; time.sleep(60)")
    assert doctor_checks.all_reduce("gloo", 2, seconds=1) == "no answer within 1 s"


def test_first_failed_process_is_not_hidden_by_one_that_waits(monkeypatch):
    monkeypatch.setattr(doctor_checks, "ALL_REDUCE",
                        "import sys, time\nif sys.argv[3] == '0': time.sleep(60)\n1 / 0")
    assert doctor_checks.all_reduce("gloo", 2, seconds=30) == "ZeroDivisionError: division by zero"


@pytest.mark.parametrize("error",
                         [RuntimeError("driver\nis odd"), OSError("libcudart.so.13"),
                          ImportError("x")])
def test_check_that_breaks_is_a_failure_and_the_others_run(monkeypatch, error):
    def broken():
        yield OK, "half of it"
        raise error
    monkeypatch.setattr(doctor_checks, "CHECKS", {"device": broken, "disk": CHECKS["disk"]})
    half, broke, disk = examine()
    assert (half.status, broke.status, disk.check) == (OK, FAIL, "disk")
    assert (
        type(error).__name__ in broke.fact
        and str(error).split("\n")[-1] in broke.fact
        and broke.remedy
    )
    assert "\n" not in broke.fact


@pytest.fixture
def apex(tmp_path, monkeypatch):
    """Makes a package `apex` with the given subpackages importable."""
    def make(*parts: str) -> None:
        for part in ("", *parts):
            (tmp_path / "apex" / part).mkdir(parents=True)
            (tmp_path / "apex" / part
             / "__init__.py").write_text("raise ImportError('must not be imported')")
        monkeypatch.syspath_prepend(str(tmp_path))
    return make


def test_unrelated_apex_of_pypi_warns(apex, monkeypatch):
    apex("models")
    found = findings_of("accelerators", monkeypatch)[1]
    assert (
        found.status == WARN
        and "apex.normalization" in found.fact
        and found.remedy == "pip uninstall apex"
    )


def test_nvidias_apex_is_found(apex, monkeypatch):
    apex("normalization")
    assert findings_of("accelerators", monkeypatch)[1].status == OK


@pytest.mark.parametrize("commands, status", [((), NOTE), (("srun", "sbatch"), WARN),
                                              (("srun", "sbatch", "scontrol"), OK)])
def test_slurm(tmp_path, monkeypatch, commands, status):
    for command in commands:
        (tmp_path / command).touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    (finding,) = findings_of("Slurm", monkeypatch)
    assert finding.status == status and bool(finding.remedy) == (status == WARN)


@pytest.mark.parametrize("there, status", [(True, OK), (False, NOTE)])
def test_java(tmp_path, monkeypatch, there, status):
    if there:
        (tmp_path / "java").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert [f.status for f in findings_of("Java", monkeypatch)] == [status]


def test_compiler_of_another_cuda_is_a_note_only(tmp_path, monkeypatch):
    import torch

    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 11.8, V11.8.89'\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("PATH", os.pathsep.join([str(tmp_path), os.environ["PATH"]]))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    (finding,) = findings_of("compiler", monkeypatch)
    assert finding.status == NOTE and "CUDA 11.8" in finding.fact and "13.0" in finding.fact


@pytest.mark.parametrize("built_for, status, part",
                         [(None, WARN, "CPU build"), ("13.0", FAIL, "cannot use the GPU")])
def test_driver_that_torch_cannot_use_is_told(tmp_path, monkeypatch, built_for, status, part):
    import torch

    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 470.57\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", os.pathsep.join([str(tmp_path), os.environ["PATH"]]))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", built_for)
    (finding,) = findings_of("device", monkeypatch)
    assert (
        finding.status == status
        and part in finding.fact
        and "470.57" in finding.fact
        and finding.remedy
    )


def test_gpus_are_described(monkeypatch):
    import torch

    gpu = type("Properties", (),
               {"name": "NVIDIA H200", "total_memory": 139 * GIB, "major": 9, "minor": 0})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: gpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported",
                        lambda including_emulation=True: including_emulation)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 29, 3))
    found = findings_of("device", monkeypatch)
    facts = [f.fact for f in found]
    assert "NCCL 2.29.3" in facts
    assert [f for f in facts if f.startswith("GPU")] == [
        f"GPU {n}: NVIDIA H200, 139 GiB, compute capability 9.0" for n in (0, 1)]
    assert found[-1].status == WARN and "train.precision=fp32" in found[-1].remedy


@pytest.mark.parametrize("fault, status", [(None, OK), ("RuntimeError: NCCL error", FAIL)])
def test_nccl_is_tried_with_two_gpus(monkeypatch, fault, status):
    import torch

    tried = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(doctor_checks, "all_reduce", lambda *a: tried.append(a) or fault)
    (finding,) = findings_of("NCCL", monkeypatch)
    assert tried == [("nccl", 4)] and finding.status == status
    assert ("NCCL_DEBUG=INFO" in finding.remedy) == (status == FAIL)


def test_report_for_people_has_status_fact_and_remedy():
    assert str(Finding(WARN, "disk", "1.0 GiB free",
                       "free some")) == "warn disk: 1.0 GiB free\n     -> free some"
    assert str(Finding(OK, "Java", "found")) == "ok   Java: found"


def test_optional_parts_say_what_they_are_for_and_how_to_install_them(monkeypatch):
    monkeypatch.setattr(doctor_checks, "find_package", lambda name: None)
    pins = doctor_checks.optional_requirements()
    assert set(doctor_checks.OPTIONAL) == set(pins)
    for finding, (name, version) in zip(findings_of("optional", monkeypatch), pins.values(),
                                        strict=True):
        assert finding.status == NOTE and f"pip install {name}=={version}" in finding.fact
    monkeypatch.setattr(doctor_checks, "installed_version", lambda name: None)
    facts = "\n".join(finding.fact for finding in findings_of("accelerators", monkeypatch))
    for part in ("Transformer Engine", "NVIDIA Apex", "Triton"):
        assert f"{part} is not installed" in facts


def test_an_optional_part_of_another_version_is_told(monkeypatch):
    monkeypatch.setattr(doctor_checks, "find_package", lambda name: ROOT)
    monkeypatch.setattr(doctor_checks, "installed_version", lambda name: "0.0.1")
    assert all("0.0.1" in finding.fact and "tested with" in finding.fact
               for finding in findings_of("optional", monkeypatch))


def test_a_directory_of_the_name_is_no_package(tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert doctor_checks.find_package("wandb") is None

"""What setup.py decides to build, what is checked before the extension is loaded, and `info`."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sdkernels
from sdkernels import info
from sdkernels.backends import extension, ops

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(sdkernels.__file__).resolve().parent


def import_setup():
    spec = importlib.util.spec_from_file_location("sdkernels_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


build = import_setup()


def run(*arguments, cwd=ROOT, **environ):
    """Run this Python in `cwd`, with `environ` on top of the environment."""
    command = [sys.executable, *arguments]
    env = {**os.environ, **environ}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)


TOOLKIT = build.Toolkit("/cuda", has_nvcc=True, has_cuda_runtime_h=True, version="13.0")
NO_NVCC = dataclasses.replace(TOOLKIT, has_nvcc=False, version=None)
NO_HEADERS = dataclasses.replace(TOOLKIT, has_cuda_runtime_h=False)
BROKEN_NVCC = dataclasses.replace(TOOLKIT, version=None)
OTHER_MINOR = dataclasses.replace(TOOLKIT, version="13.2")
OTHER_MAJOR = dataclasses.replace(TOOLKIT, version="12.8")


def environment(requested="auto", **changes):
    """Everything that a CUDA build needs, but for `changes`."""
    complete = build.Environment(requested, "77.0.3", "2.13.0", "13.0", TOOLKIT, has_kernels=True)
    return dataclasses.replace(complete, **changes)


def no_torch(requested):
    return environment(requested, torch=None, torch_cuda=None, toolkit=None)


OBSTACLES = {
    "no-kernels": (environment(has_kernels=False), "no CUDA kernels"),
    "cpu-torch": (environment(torch_cuda=None), "torch 2.13.0 was built without CUDA"),
    "no-toolkit": (environment(toolkit=None), "set CUDA_HOME"),
    "no-nvcc": (environment(toolkit=NO_NVCC), "/cuda/bin/nvcc is missing"),
    "no-headers": (environment(toolkit=NO_HEADERS), "/cuda/include/cuda_runtime.h is missing"),
    "broken-nvcc": (environment(toolkit=BROKEN_NVCC), "/cuda/bin/nvcc --version"),
    "other-major": (environment(toolkit=OTHER_MAJOR), "CUDA 13.0, but /cuda is CUDA 12.8"),
}

OUTCOMES = {
    "complete": (environment(), "cuda", "CUDA 13.0"),
    "complete-cuda": (environment("cuda"), "cuda", "CUDA 13.0"),
    "complete-cpu": (environment("cpu"), "cpu", "SDKERNELS_BUILD=cpu"),
    "other-minor": (environment(toolkit=OTHER_MINOR), "cuda", "CUDA 13"),
    "old-setuptools": (environment(setuptools="65.5.0"), "stop", "65.5.0 is too old, install 77"),
    "invalid-mode": (environment("gpu"), "stop", "auto, cpu, cuda; got 'gpu'"),
}
for mode in build.MODES:
    OUTCOMES[f"no-torch-{mode}"] = (no_torch(mode), "stop", "--no-build-isolation")
for name, (case, reason) in OBSTACLES.items():
    OUTCOMES[name] = (case, "cpu", reason)
    OUTCOMES[f"{name}-cuda"] = (dataclasses.replace(case, requested="cuda"), "stop", reason)
    OUTCOMES[f"{name}-cpu"] = (dataclasses.replace(case, requested="cpu"), "cpu", "=cpu")


@pytest.mark.parametrize(("case", "target", "reason"), OUTCOMES.values(), ids=OUTCOMES.keys())
def test_decision(case, target, reason):
    decision = build.decide(case)
    assert decision.target == target
    assert reason in decision.reason
    assert "\n" not in decision.reason


def make_toolkit(root, nvcc_script=None, with_header=False):
    (root / "bin").mkdir(parents=True)
    (root / "include").mkdir()
    if nvcc_script is not None:
        nvcc = root / "bin/nvcc"
        nvcc.write_text(f"#!/bin/sh\n{nvcc_script}\n")
        nvcc.chmod(0o755)
    if with_header:
        (root / "include/cuda_runtime.h").touch()
    return root


def test_inspect_toolkit(tmp_path):
    version = "echo 'Cuda compilation tools, release 12.8, V12.8.93'"
    complete = make_toolkit(tmp_path / "complete", version, with_header=True)
    assert build.inspect_toolkit(complete) == build.Toolkit(str(complete), True, True, "12.8")
    wrapper = make_toolkit(tmp_path / "wrapper", version)
    assert build.inspect_toolkit(wrapper) == build.Toolkit(str(wrapper), True, False, "12.8")
    failing = make_toolkit(tmp_path / "failing", "exit 1", with_header=True)
    assert build.inspect_toolkit(failing) == build.Toolkit(str(failing), True, True, None)
    empty = make_toolkit(tmp_path / "empty")
    assert build.inspect_toolkit(empty) == build.Toolkit(str(empty), False, False, None)


def test_nvcc_that_cannot_be_executed(tmp_path):
    toolkit = make_toolkit(tmp_path / "toolkit", "exit 0", with_header=True)
    (toolkit / "bin/nvcc").chmod(0o644)
    assert build.inspect_toolkit(toolkit).version is None


def test_inspect_environment():
    here = build.inspect_environment({"SDKERNELS_BUILD": "cpu"})
    assert (here.requested, here.torch, here.torch_cuda) == (
        "cpu",
        torch.__version__,
        torch.version.cuda,
    )
    assert build.inspect_environment({}).requested == "auto"


def test_inspect_environment_without_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)  # makes `import torch` fail
    assert build.inspect_environment({}).torch is None


def test_invalid_mode_stops_setup():
    result = run("setup.py", "--version", SDKERNELS_BUILD="gpu")
    assert result.returncode == 1
    message = "sdkernels: SDKERNELS_BUILD should be auto, cpu, cuda; got 'gpu'"
    assert result.stderr.strip() == message


ARCH = "TORCH_CUDA_ARCH_LIST"


@pytest.mark.parametrize(
    ("environ", "toolkit_version", "capabilities", "expected"),
    [
        ({}, "12.6", [], "8.0;8.6;8.9;9.0+PTX"),
        ({}, "12.8", [], "8.0;8.6;8.9;9.0+PTX;10.0;12.0+PTX"),
        ({}, "13.0", [], "8.0;8.6;8.9;9.0+PTX;10.0;12.0+PTX"),
        ({}, "13.0", [(9, 0), (8, 0), (9, 0)], "8.0;9.0"),
        ({ARCH: "9.0a"}, "13.0", [(8, 0)], "9.0a"),
    ],
    ids=["cuda-12.6", "cuda-12.8", "cuda-13.0", "gpus", "chosen"],
)
def test_cuda_arch_list(environ, toolkit_version, capabilities, expected):
    assert build.cuda_arch_list(environ, toolkit_version, capabilities) == expected


def test_flags_reach_the_compiler():
    config = extension.load().build_config()
    assert config["cxx_flags"] == " ".join(build.cxx_flags(sys.platform))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="OpenMP is used on Linux only")
def test_openmp_library_is_torchs():
    library = Path(extension.load().__file__).read_bytes()
    assert b"GOMP_parallel" in library or b"__kmpc_fork_call" in library
    assert b"libgomp" not in library
    assert b"libomp" not in library


@pytest.mark.parametrize(
    ("arch_list", "capability", "expected"),
    [
        ("8.0;9.0", (9, 0), True),
        ("8.0;9.0", (8, 6), True),  # the code of an older minor version runs
        ("8.6", (8, 0), False),
        ("8.0;9.0", (10, 0), False),
        ("8.0;9.0+PTX", (12, 0), True),  # compiled for it when it is loaded
        ("9.0+PTX", (8, 0), False),
        ("9.0a", (9, 0), True),
        ("10.0a", (10, 3), False),
        ("10.0f", (10, 3), True),
        ("9.0a+PTX", (10, 0), False),
        ("8.0 9.0", (9, 0), True),
        ("Hopper", (9, 0), None),
        ("", (9, 0), False),
    ],
)
def test_covered(arch_list, capability, expected):
    assert info.is_covered(arch_list, capability) is expected


def test_info_of_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device}")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9 + device, 0))
    first, second = info.devices("8.0;9.0")
    assert (first["device"], first["name"], first["capability"]) == ("cuda:0", "GPU 0", "9.0")
    assert first["covered"] == "yes"
    command = "set TORCH_CUDA_ARCH_LIST=10.0 and rebuild with: pip install --no-build-isolation"
    assert second["covered"].startswith(f"no, built for 8.0;9.0; {command}")
    (row,) = [line for line in info.format_text(collected([first])).splitlines() if "GPU 0" in line]
    assert row.split() == ["cuda:0", "GPU", "0", "9.0", "yes"]
    assert [device["covered"] for device in info.devices("")] == ["no, built without CUDA"] * 2


def collected(devices):
    return dataclasses.replace(info.collect(), devices=devices)


def test_info_json():
    result = run("-m", "sdkernels.info", "--json", SDKERNELS_BUILD="cpu")
    assert (result.returncode, result.stderr) == (0, "")
    printed = json.loads(result.stdout)
    assert printed["error"] is None
    assert printed["versions"]["torch"] == torch.__version__
    assert printed["build"] == extension.load().build_config()
    assert printed["environment"]["SDKERNELS_BUILD"] == "cpu"
    assert printed["backends"] == [dataclasses.asdict(choice) for choice in ops.backend_table()]


def test_info_text():
    result = run("-m", "sdkernels.info")
    assert (result.returncode, result.stderr) == (0, "")
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["torch", torch.__version__] in lines
    for choice in ops.backend_table():
        row = [choice.op, choice.device, choice.backend, *choice.reason.split()]
        assert row in lines

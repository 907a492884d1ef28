"""What is decided to be built, what is checked before the extension is loaded, and `info`."""

import dataclasses
import importlib.machinery
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import processes
import pytest
import torch
from installing import ROOT

from build_tools import decision as build
from build_tools import metadata
from build_tools.extension import cuda_arch_list, cxx_flags
from sdkernels import info
from sdkernels.backends import extension, ops


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
    complete = build.Environment(
        requested, "77.0.3", "2.13.0", "13.0", TOOLKIT, "c++", has_kernels=True
    )
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
    "invalid-mode": (environment("gpu"), "stop", "auto, none, cpu, cuda; got 'gpu'"),
    "none": (environment("none"), "none", "SDKERNELS_BUILD=none"),
}
NO_EXTENSION = {
    "no-torch": (no_torch("auto"), "--no-build-isolation"),
    "old-torch": (environment(torch="2.9.1+cpu"), "torch 2.9.1+cpu is older than 2.10"),
    "no-compiler": (environment(compiler=None), "no C++ compiler was found"),
    "failed": (environment(failure="g++ says no"), "g++ says no"),
}
for name, (case, reason) in NO_EXTENSION.items():
    OUTCOMES[name] = (case, "none", reason)
    for mode in ("cpu", "cuda"):
        asked = dataclasses.replace(case, requested=mode)
        message = f"SDKERNELS_BUILD={mode} is impossible: "
        OUTCOMES[f"{name}-{mode}"] = (asked, "stop", message)
        assert reason in build.decide(asked).reason
    OUTCOMES[f"{name}-none"] = (
        dataclasses.replace(case, requested="none"),
        "none",
        "SDKERNELS_BUILD=none",
    )
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


def test_wrapper_of_nvcc(tmp_path):
    """torch takes the folder around the nvcc on PATH for the toolkit; a wrapper has none."""
    real = make_toolkit(tmp_path / "cuda-13.0", "exit 0", with_header=True)
    says_where = f"echo '#$ _SPACE_= ' >&2; echo '#$ TOP={real}/bin/..' >&2"
    wrapper = make_toolkit(tmp_path / "local", says_where)
    environ = {"PATH": f"{wrapper}/bin"}
    build.point_to_toolkit(environ)
    assert environ["CUDA_HOME"] == str(real)
    for unchanged in (
        {"PATH": f"{wrapper}/bin", "CUDA_HOME": "/mine"},
        {"PATH": f"{wrapper}/bin", "CUDA_PATH": "/mine"},
        {"PATH": f"{real}/bin"},
        {"PATH": str(tmp_path)},
    ):
        environ = dict(unchanged)
        build.point_to_toolkit(environ)
        assert environ == unchanged


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
    here = build.inspect_environment({})
    assert (here.torch, here.failure) == (None, None)


def test_inspect_environment_with_a_broken_torch(tmp_path):
    (tmp_path / "torch.py").write_text("raise OSError('libcudart.so.13: cannot open')")
    code = "import os; from build_tools.decision import *; print(decide(inspect_environment({})))"
    result = run("-c", code, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert "target='none'" in result.stdout
    assert "torch cannot be imported (OSError: libcudart.so.13: cannot open)" in result.stdout


def test_torch_is_not_imported_where_it_is_not_needed(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert build.decide(build.inspect_environment({"SDKERNELS_BUILD": "none"})).target == "none"


def test_find_compiler(tmp_path):
    compiler = tmp_path / "my c++"
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    path = {"PATH": str(tmp_path)}
    assert build.find_compiler(path) is None
    assert build.find_compiler({**path, "CXX": "'my c++' -v"}) == "'my c++' -v"
    assert build.find_compiler({**path, "CXX": "clang++"}) is None


def test_invalid_mode_stops_setup():
    result = run("setup.py", "--version", SDKERNELS_BUILD="gpu")
    assert result.returncode == 1
    message = "sdkernels: SDKERNELS_BUILD should be auto, none, cpu, cuda; got 'gpu'"
    assert result.stderr.strip().splitlines()[-1] == message  # torch may speak before


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
    assert cuda_arch_list(environ, toolkit_version, capabilities) == expected


def test_flags_reach_the_compiler():
    config = extension.load().build_config()
    assert config["cxx_flags"] == " ".join(cxx_flags())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="OpenMP is used on Linux only")
def test_openmp_library_is_torchs():
    library = Path(extension.load().__file__).read_bytes()
    assert b"GOMP_parallel" in library
    # What clang makes of a pragma; a library with a pool of threads of its own.
    for other in (b"__kmpc_fork_call", b"libgomp", b"libomp", b"libiomp"):
        assert other not in library


BINARY = environment(torch="2.13.0+cu130")


@pytest.mark.parametrize(
    ("case", "target", "command", "version", "requirement"),
    [
        (BINARY, "cuda", "bdist_wheel", "0.1.0+torch2.13.cu130", "torch==2.13.0"),
        (BINARY, "cpu", "bdist_wheel", "0.1.0+torch2.13.cpu", "torch==2.13.0"),
        (environment("none"), "none", "bdist_wheel", "0.1.0", "torch>=2.10"),
        (BINARY, "cpu", "editable_wheel", "0.1.0", "torch>=2.10"),
        (BINARY, "cpu", "sdist", "0.1.0", "torch>=2.10"),
    ],
)
def test_metadata(case, target, command, version, requirement):
    made = metadata.metadata(case, build.Decision(target, ""), command, {})
    assert made["version"] == version.replace("0.1.0", metadata.VERSION)
    assert made["install_requires"] == [requirement]
    assert made["project_urls"] == {}


def test_a_wheel_from_an_sdist_has_its_version(monkeypatch, tmp_path):
    (tmp_path / "PKG-INFO").touch()
    monkeypatch.setattr(metadata, "ROOT", tmp_path)
    assert metadata.local_version(BINARY, build.Decision("cpu", "")) == ""


def test_links_of_the_readme():
    text = "[a](docs/b.md#c) ![d](e/f.png) [g](https://h.org/i) [j](#k) [l](mailto:m@n.org)"
    assert metadata.with_absolute_links(text, "") == text
    base = f"https://example.org/o/r/{{}}/v{metadata.VERSION}"
    assert metadata.with_absolute_links(text, "https://example.org/o/r") == (
        f"[a]({base.format('blob')}/docs/b.md#c) ![d]({base.format('raw')}/e/f.png) "
        "[g](https://h.org/i) [j](#k) [l](mailto:m@n.org)"
    )


def test_every_link_of_the_readme_becomes_absolute():
    environ = {"SDKERNELS_REPOSITORY": "https://example.org/o/r/"}
    made = metadata.metadata(environment(), build.Decision("none", ""), "sdist", environ)
    links = re.findall(r"\]\(([^)]*)\)", made["long_description"])
    assert len(links) > 5
    assert all(link.startswith(("https://", "#")) for link in links)
    assert made["project_urls"]["Issues"] == "https://example.org/o/r/issues"


def test_links_of_the_readme_lead_somewhere():
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", (ROOT / "README.md").read_text()):
        assert link.startswith("https://") or (ROOT / link).exists(), link


def test_the_changelog_knows_the_version():
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert "Unreleased" in headings or any(metadata.VERSION in line for line in headings)


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
    environ = os.environ | {"SDKERNELS_BUILD": "cpu"}
    result = processes.run("-m", "sdkernels.info", "--json", cwd=ROOT, env=environ)
    assert (result.returncode, result.stderr) == (0, "")
    printed = json.loads(result.stdout)
    assert printed["error"] is None
    assert printed["versions"]["torch"] == torch.__version__
    assert printed["build"] == extension.load().build_config()
    assert printed["environment"]["SDKERNELS_BUILD"] == "cpu"
    assert printed["backends"] == [dataclasses.asdict(choice) for choice in ops.backend_table()]


def test_info_text():
    result = processes.run("-m", "sdkernels.info", cwd=ROOT, env=os.environ)
    assert (result.returncode, result.stderr) == (0, "")
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["torch", torch.__version__] in lines
    table = ops.backend_table()
    for device in {choice.device for choice in table}:
        choices = [choice for choice in table if choice.device == device]
        first = choices[0]
        assert {(each.backend, each.reason) for each in choices} == {(first.backend, first.reason)}
        assert [device, first.backend, "all", str(len(choices)), *first.reason.split()] in lines
    assert len(lines) < 30


def test_info_names_ops_that_are_served_otherwise():
    shared = {"device": "cpu", "reason": "r"}
    choices = [
        {"op": "a", "backend": "cpp", **shared},
        {"op": "b", "backend": "traceable", **shared},
        {"op": "c", "backend": "cpp", **shared},
    ]
    grouped = info._grouped(choices)
    assert [(each["backend"], each["ops"]) for each in grouped] == [
        ("cpp", "a, c"),
        ("traceable", "b"),
    ]


def test_info_text_tells_the_build_from_the_processor():
    found = info.Info(
        versions={}, environment={"A": None, "B": "x"}, build={"cpu_capability": "avx2", "c": "d"}
    )
    assert info.format_text(found).split("\n\n") == [
        "processor\n  instruction set of the kernels  avx2",
        "build\n  c  d",
        "environment\n  B  x",
    ]


def test_info_through_head():
    command = [sys.executable, "-m", "sdkernels.info"]
    reading, writing = os.pipe()
    os.close(reading)
    result = subprocess.run(command, cwd=ROOT, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (result.returncode, result.stderr) == (0, "")


def test_info_names_the_installation_that_a_source_tree_hides(monkeypatch, tmp_path):
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    for folder in ("tree", "site"):
        (tmp_path / folder / "sdkernels").mkdir(parents=True)
    tree, site = tmp_path / "tree/sdkernels", tmp_path / "site/sdkernels"
    monkeypatch.setattr(sys, "path", [str(tree.parent), str(site.parent)])
    assert info._hidden_installation(tree) is None
    (site / f"_C{suffix}").touch()
    assert info._hidden_installation(tree) == site
    assert info._hidden_installation(site) is None

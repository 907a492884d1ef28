"""Loading the extension: what is checked before, and what serves where it cannot be used."""

import importlib.machinery
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import sys
from pathlib import Path

import processes
import pytest
import torch
from backends import native

import sdkernels
from sdkernels.backends import contract, extension
from sdkernels.backends.extension import (
    ExtensionError,
    ExtensionMismatchError,
    ExtensionMissingError,
    TorchBuild,
)

PACKAGE = Path(sdkernels.__file__).resolve().parent
CPU = TorchBuild("2.13.0+cpu", None)
CUDA = TorchBuild("2.13.0+cu130", "13.0")


def write_record(path, built):
    path.write_text(json.dumps({"torch": built.version, "cuda": built.cuda}))
    return path


@pytest.mark.parametrize(
    ("built", "running"),
    [
        (CPU, CPU),
        (CPU, CUDA),
        (CUDA, CUDA),
        (CUDA, TorchBuild("2.13.0+cu132", "13.2")),
    ],
    ids=str,
)
def test_extension_fits(built, running, tmp_path):
    extension.check(write_record(tmp_path / "_build.json", built), running)


@pytest.mark.parametrize(
    ("built", "running"),
    [
        (CPU, TorchBuild("2.13.1+cpu", None)),
        (CPU, TorchBuild("2.14.0.dev20261101+cpu", None)),
        (CUDA, CPU),
        (CUDA, TorchBuild("2.13.0+cu128", "12.8")),
        (CUDA, TorchBuild("2.12.0+cu130", "13.0")),
    ],
    ids=str,
)
def test_extension_mismatch(built, running, tmp_path):
    message = f"built for {built}, this is {running}; rebuild with: "
    with pytest.raises(ExtensionMismatchError, match=re.escape(message)):
        extension.check(write_record(tmp_path / "_build.json", built), running)


@native
def test_load_looks_at_the_running_torch(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.10.0")
    with pytest.raises(ExtensionMismatchError, match=r"this is torch 2\.10\.0"):
        extension.load()


def test_extension_never_built(tmp_path):
    with pytest.raises(ExtensionMissingError, match="build it with: "):
        extension.check(tmp_path / "_build.json", CPU)


def test_build_that_was_stopped(tmp_path):
    """The record is written last."""
    with pytest.raises(ExtensionError, match=r"built halfway: .*_build\.json is missing; rebuild"):
        extension.check(tmp_path / "_build.json", CPU, file=tmp_path / "_C.so")


def test_a_package_that_was_built_without_an_extension(tmp_path):
    """It says so in its record, which is no damage and no warning."""
    record = tmp_path / "_build.json"
    record.write_text(json.dumps({"torch": None, "cuda": None, "reason": "no compiler"}))
    with pytest.raises(ExtensionMissingError, match="built without it: no compiler"):
        extension.check(record, CPU)


@native
def test_extension_built_for_another_python(monkeypatch):
    monkeypatch.setattr(importlib.machinery.PathFinder, "find_spec", lambda name, path: None)
    with pytest.raises(ExtensionMissingError, match=r"not built for Python 3\.\d+; build it with"):
        extension.load()


@native
def test_schemas_are_those_of_the_extension():
    for schema in contract.SCHEMAS:
        parsed = torch._C.parse_schema(f"sdkernels::{schema}")
        assert str(parsed) == str(getattr(torch.ops.sdkernels, parsed.name[11:]).default._schema)


# ---- the command that rebuilds -------------------------------------------------------------------

AGAIN = "pip install --no-build-isolation --force-reinstall --no-deps --no-cache-dir"


def test_rebuild_of_a_source_tree(tmp_path, monkeypatch):
    (tmp_path / "with space").mkdir()
    (tmp_path / "with space/setup.py").touch()
    monkeypatch.setattr(extension, "_PACKAGE", tmp_path / "with space/sdkernels")
    assert extension.build_command() == f"{AGAIN} -e '{tmp_path}/with space'"


ORIGINS = {
    "git": (
        {
            "url": "https://example.org/x/y.git",
            "vcs_info": {"vcs": "git", "commit_id": "4f0c2d", "requested_revision": "main"},
        },
        "git+https://example.org/x/y.git@4f0c2d",
    ),
    "folder": ({"url": "file:///home/me/my%20tree", "dir_info": {}}, "'/home/me/my tree'"),
    "sdist": (
        {"url": "https://example.org/s.tar.gz", "archive_info": {}},
        "https://example.org/s.tar.gz",
    ),
    "wheel": ({"url": "file:///w/sdkernels-1-py3-none-any.whl", "archive_info": {}}, None),
    "index": (None, None),
    "damaged": ("{", None),
}


@pytest.mark.parametrize(("record", "origin"), ORIGINS.values(), ids=ORIGINS.keys())
def test_rebuild_of_an_installed_package(record, origin, tmp_path, monkeypatch):
    """Never by name: whoever registers it on an index would own those who follow the command."""
    info = tmp_path / "sdkernels-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sdkernels\nVersion: 0\n")
    if record is not None:
        text = record if isinstance(record, str) else json.dumps(record)
        (info / "direct_url.json").write_text(text)
    found = importlib.metadata.PathDistribution(info)
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: found)
    monkeypatch.setattr(extension, "_PACKAGE", tmp_path / "sdkernels")
    expected = "the command you installed it with, plus --force-reinstall --no-cache-dir"
    assert extension.build_command() == (f"{AGAIN} {origin}" if origin else expected)


def test_rebuild_of_a_copy_that_is_not_the_installed_one(tmp_path, monkeypatch):
    monkeypatch.setattr(extension, "_PACKAGE", tmp_path / "sdkernels")
    assert extension.build_command().startswith("the command you installed it with")


# ---- what serves where it cannot be used ---------------------------------------------------------

# The warnings of the import, a result, who serves the CPU, and what `info` says.
PROGRAM = """
import json, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import sdkernels
import torch
from sdkernels import info
rows = sdkernels.KeptRows.from_index(torch.tensor([0, 2]), 3, scale=2.0)
y = sdkernels.fused_stochastic_depth(torch.ones(3, 1), lambda kept: 3 * kept, 0.5, rows=rows)
report = info.collect()
print(json.dumps({
    "warnings": [str(w.message) for w in caught if "sdkernels" in str(w.message)],
    "y": y.flatten().tolist(),
    "cpu": sorted({b["backend"] for b in report.backends if b["device"] == "cpu"}),
    "reasons": sorted({b["reason"] for b in report.backends if b["device"] == "cpu"}),
    "extension": report.build.get("extension"),
    "error": report.error,
}))
"""


def run(program, cwd, **environ):
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SDKERNELS_")}
    env = clean | {"PYTHONPATH": str(cwd)} | environ
    return processes.run("-c", program, cwd=cwd, env=env)


@pytest.fixture
def copy(tmp_path):
    """A copy of the package, with its extension, in a folder of its own."""
    package = tmp_path / "sdkernels"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    return package


def extension_file(package):
    (file,) = package.glob("_C.*.so")
    return file


def older_torch(package):
    write_record(package / "_build.json", TorchBuild("2.0.0", None))


def no_record(package):
    (package / "_build.json").unlink()


def damaged_record(package):
    (package / "_build.json").write_text('{"torch": ')


def other_record(package):
    (package / "_build.json").write_text('["2.13.0"]')


def cut_off(package):
    file = extension_file(package)
    os.truncate(file, file.stat().st_size * 2 // 3)


def empty_file(package):
    extension_file(package).write_bytes(b"")


def no_library(package):
    extension_file(package).write_bytes(b"no library\n" * 100)


def undefined_symbol(package):
    file = extension_file(package)
    code = file.read_bytes()
    name = b"_ZN3c106detail14torchCheckFail"
    assert name in code
    file.write_bytes(code.replace(name, name[:-1] + b"X"))


def never_built(package):
    extension_file(package).unlink()
    no_record(package)


HALFWAY = r"sdkernels was built halfway: .*_build\.json is missing; rebuild with: "
DAMAGES = {
    older_torch: r"sdkernels was built for torch 2\.0\.0, this is torch 2\.\d+.*; rebuild with: ",
    no_record: HALFWAY,
    damaged_record: r".*_build\.json cannot be read \(JSONDecodeError: .*\); rebuild with: ",
    other_record: r".*_build\.json cannot be read \(TypeError: .*\); rebuild with: ",
    cut_off: r".*_C\..*\.so is cut off; rebuild with: ",
    empty_file: r".*_C\..*\.so is cut off; rebuild with: ",
    no_library: r".*_C\..*\.so does not load \(ImportError: .*\); rebuild with: ",
    undefined_symbol: r".*_C\..*\.so does not load \(ImportError: .*undefined symbol.*\); rebuild",
}


@native
@pytest.mark.skipif(sys.platform != "linux", reason="the files are damaged as Linux knows them")
@pytest.mark.parametrize("damage", [*DAMAGES, never_built])
def test_the_next_backend_serves(damage, copy):
    """Importing never fails, and nothing crashes; one warning where something was built."""
    damage(copy)
    result = run(PROGRAM, copy.parent)
    assert result.returncode == 0, (result.returncode, result.stderr)
    report = json.loads(result.stdout)
    assert report["y"] == [7.0, 1.0, 7.0]
    assert report["cpu"] == ["traceable"]
    assert report["error"] is None
    assert report["extension"].startswith("not used; ")
    reason = report["extension"].removeprefix("not used; ")
    if damage is never_built:
        assert report["warnings"] == []
        assert reason.startswith("sdkernels was not built: ")
    else:
        (warning,) = report["warnings"]
        assert warning == f"{reason} (until then it runs without its extension)"
        assert re.match(DAMAGES[damage], reason), reason
        assert "\n" not in warning
    (short,) = report["reasons"]
    assert short == {
        older_torch: "the extension was built for another torch",
        never_built: "the extension was not built",
    }.get(damage, "the extension does not load")


@native
def test_asked_for_by_name_and_missing(copy):
    """The op raises, not the import: `info` must be able to say why."""
    older_torch(copy)
    program = "import sdkernels, torch; sdkernels.KeptRows.from_mask(torch.tensor([True]))"
    result = run(program, copy.parent, SDKERNELS_BACKEND="cpp")
    assert result.returncode == 1
    assert re.match(
        r"RuntimeError: sdkernels::compact_mask: SDKERNELS_BACKEND=cpp, but the extension was "
        r"built for another torch \(sdkernels was built for torch 2\.0\.0, this is torch .*; rebui",
        result.stderr.splitlines()[-1],
    )


def test_switched_off():
    result = run(PROGRAM, PACKAGE.parent, SDKERNELS_EXTENSION="off")
    report = json.loads(result.stdout)
    assert (report["cpu"], report["warnings"]) == (["traceable"], [])
    assert report["reasons"] == ["SDKERNELS_EXTENSION=off"]
    result = run("import sdkernels", PACKAGE.parent, SDKERNELS_EXTENSION="no")
    assert result.stderr.splitlines()[-1] == (
        "ValueError: SDKERNELS_EXTENSION: expected auto or off, got 'no'"
    )


# A device that only torch sees: Triton, where it is installed, finds no driver.
CHOICES = """
import sys, torch
torch.cuda.device_count = lambda: 1
from sdkernels.backends import ops
print(*{f"{c.backend}: {c.reason}" for c in ops.backend_table()
        if c.device == "cuda" and c.op == "compact_rows"})
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton finds the driver")
def test_triton_serves_cuda_tensors_where_it_works():
    off = {"SDKERNELS_EXTENSION": "off"}
    result = run("import sys; sys.modules['triton'] = None" + CHOICES, PACKAGE.parent, **off)
    assert result.stdout.strip() == (
        "traceable: SDKERNELS_EXTENSION=off, and Triton is not installed"
    )
    if importlib.util.find_spec("triton") is None:
        return
    result = run(CHOICES, PACKAGE.parent, **off)
    assert result.stdout.startswith(
        "traceable: SDKERNELS_EXTENSION=off, but Triton cannot launch kernels: "
    )
    result = run(CHOICES, PACKAGE.parent, TRITON_INTERPRET="1", **off)
    assert result.stdout.strip() == "triton: SDKERNELS_EXTENSION=off"

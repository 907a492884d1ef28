"""What pip makes of the package: with torch and without, with every kind of compiler."""

import os
import sys
import tarfile

import pytest
import torch
from installing import (
    COMPILER,
    ROOT,
    Wheel,
    copy_tree,
    make_environment,
    pip_install,
    pip_wheel,
    script,
    succeed,
)

MAJOR, MINOR = torch.__version__.split(".")[:2]
BINARY_VERSION = f"+torch{MAJOR}.{MINOR}.cpu"


# Answers torch's question for its version, and fails afterwards.
FAILING = """\
#!/bin/sh
case "$*" in *-c*) echo "no such header" >&2; exit 1;; esac
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the checkout, in a folder whose name has a space."""
    return copy_tree(tmp_path_factory.mktemp("a checkout") / "sdkernels")


@pytest.fixture
def no_torch(tmp_path):
    """A folder for PYTHONPATH that hides torch, as an isolated build does."""
    error = "ModuleNotFoundError(\"No module named 'torch'\", name='torch')"
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden/torch.py").write_text(f"raise {error}\n")
    return tmp_path / "hidden"


@pytest.fixture
def compiler(tmp_path):
    """Environment variables for a compiler that takes everything and does nothing."""
    path = script(tmp_path / "compiler", COMPILER.format(log=tmp_path / "compiled"))
    return {"CC": path, "CXX": path, "SDKERNELS_BUILD": "cpu"}


def assert_pure(wheel):
    assert wheel.tag == "py3-none-any"
    assert not wheel.has_extension
    assert "+" not in wheel.version
    assert wheel.torch == "torch>=2.10"
    assert {"sdkernels/py.typed", "sdkernels/_C.pyi", "sdkernels/info.py"} < wheel.files.keys()
    outside = ("sdkernels/", f"sdkernels-{wheel.version}.dist-info/")
    assert all(name.startswith(outside) for name in wheel.files)


def test_without_torch(tree, no_torch, tmp_path):
    result = pip_wheel(tree, tmp_path, PYTHONPATH=no_torch)
    (line,) = (line for line in result.stdout.splitlines() if "pure Python build" in line)
    assert "torch is not installed where sdkernels is being built" in line
    wheel = Wheel(tmp_path)
    assert_pure(wheel)
    assert wheel.record["torch"] is None
    assert "torch is not installed" in wheel.record["reason"]


def test_without_a_compiler(tree, tmp_path):
    result = pip_wheel(tree, tmp_path, CXX=tmp_path / "none")
    assert "pure Python build (no C++ compiler was found" in result.stdout
    assert_pure(Wheel(tmp_path))


@pytest.fixture
def no_ninja(tmp_path):
    """A PATH on which ninja does not work."""
    (tmp_path / "no ninja").mkdir()
    script(tmp_path / "no ninja/ninja", "#!/bin/sh\nexit 1\n")
    return f"{tmp_path / 'no ninja'}{os.pathsep}{os.environ['PATH']}"


@pytest.mark.parametrize(
    "with_ninja", [True, pytest.param(False, marks=pytest.mark.install)], ids=["ninja", "no-ninja"]
)
def test_a_compiler_that_fails(tree, tmp_path, no_ninja, with_ninja):
    path = script(tmp_path / "failing", FAILING)
    environ = {"CC": path, "CXX": path, "PATH": os.environ["PATH"] if with_ninja else no_ninja}
    result = pip_wheel(tree, tmp_path, **environ)
    assert result.returncode == 0, result.stdout
    assert "no such header" in result.stdout
    assert "compiling the extension failed" in result.stdout
    wheel = Wheel(tmp_path)
    assert_pure(wheel)
    assert "compiling the extension failed" in wheel.record["reason"]
    result = pip_wheel(tree, tmp_path / "asked", SDKERNELS_BUILD="cpu", **environ)
    assert result.returncode != 0
    assert "no such header" in result.stdout
    assert "SDKERNELS_BUILD=cpu failed, see above" in result.stdout


@pytest.mark.install
def test_asked_for_and_impossible(tree, tmp_path):
    result = pip_wheel(tree, tmp_path, CXX=tmp_path / "none", SDKERNELS_BUILD="cpu")
    assert result.returncode != 0
    assert "SDKERNELS_BUILD=cpu is impossible: no C++ compiler was found" in result.stdout


def test_a_binary_wheel(tree, compiler, tmp_path):
    result = pip_wheel(tree, tmp_path, **compiler)
    assert result.returncode == 0, result.stdout
    wheel = Wheel(tmp_path)
    assert wheel.has_extension
    assert wheel.tag.startswith("cp3")
    assert wheel.version.endswith(BINARY_VERSION)
    assert wheel.metadata["Version"] == wheel.version
    assert wheel.torch == "torch==" + torch.__version__.partition("+")[0]
    assert wheel.record["torch"] == torch.__version__
    assert (tmp_path / "compiled").read_text().count("row_ops_cpu.cpp") == 1


@pytest.mark.install
def test_a_module_that_was_deleted_is_not_packed_again(tree, tmp_path):
    extra = tree / "sdkernels/gone.py"
    extra.touch()
    assert pip_wheel(tree, tmp_path / "with", SDKERNELS_BUILD="none").returncode == 0
    extra.unlink()
    assert pip_wheel(tree, tmp_path / "without", SDKERNELS_BUILD="none").returncode == 0
    assert "sdkernels/gone.py" in Wheel(tmp_path / "with").files
    assert "sdkernels/gone.py" not in Wheel(tmp_path / "without").files


def test_another_torch_or_compiler_compiles_again(tree, compiler, no_ninja, tmp_path):
    """In place and without ninja, what lies beside the sources is newer than they are."""

    def compiled(**changes):
        log = tmp_path / "compiled"
        log.unlink(missing_ok=True)
        command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
        succeed(*command, cwd=tree, PATH=no_ninja, **{**compiler, **changes})
        return log.is_file() and "-c" in log.read_text().split()

    try:
        assert compiled()
        assert not compiled()
        assert compiled(CXXFLAGS="-DA")
        assert not compiled(CXXFLAGS="-DA")
        record = tree / "sdkernels/_build.json"
        record.write_text(record.read_text().replace(torch.__version__, "2.10.0"))
        assert compiled(CXXFLAGS="-DA")
        other = script(tmp_path / "other", COMPILER.format(log=tmp_path / "compiled"))
        assert compiled(CXX=other)
    finally:
        for built in (tree / "sdkernels").glob("_[Cb]*[!i]"):
            built.unlink()


def test_an_editable_install_is_for_every_torch(tree, compiler, tmp_path):
    python = make_environment(tmp_path / "venv")
    pip_install(python, "-e", tree, **compiler)
    code = "from importlib.metadata import *; print(version('sdkernels'), requires('sdkernels')[0])"
    version, requirement = succeed(python, "-c", code, cwd=tmp_path).split(maxsplit=1)
    assert "+" not in version
    assert requirement.strip() == "torch>=2.10"
    for built in (tree / "sdkernels").glob("_[Cb]*[!i]"):
        built.unlink()


@pytest.fixture(scope="module")
def sdist(tree, tmp_path_factory):
    """The unpacked sdist."""
    folder = tmp_path_factory.mktemp("sdist")
    hook = "from build_tools import backend; import sys; print(backend.build_sdist(sys.argv[1]))"
    succeed(sys.executable, "-c", hook, folder, cwd=tree, SDKERNELS_BUILD="none")
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


def tracked_files():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    return succeed("git", "ls-files", cwd=ROOT).splitlines()


def test_the_sdist_holds_the_tree(sdist):
    """All of it, but for the records of benchmark runs' pictures."""
    files = {path.relative_to(sdist).as_posix() for path in sdist.rglob("*") if path.is_file()}
    missing = set(tracked_files()) - files
    assert {path for path in missing if not path.endswith((".png", ".gitignore"))} == set()


def test_the_sdist_builds_both_kinds(sdist, compiler, tmp_path):
    assert pip_wheel(sdist, tmp_path / "pure", SDKERNELS_BUILD="none").returncode == 0
    assert_pure(Wheel(tmp_path / "pure"))
    result = pip_wheel(sdist, tmp_path / "binary", **compiler)
    assert result.returncode == 0, result.stdout
    wheel = Wheel(tmp_path / "binary")
    assert wheel.has_extension
    # pip takes a wheel that it makes of an sdist only if it has the sdist's version.
    assert wheel.version == Wheel(tmp_path / "pure").version
    assert wheel.torch == "torch==" + torch.__version__.partition("+")[0]
    assert "sdkernels/gone.py" not in wheel.files


@pytest.mark.install
def test_the_sdist_holds_what_its_tests_import(sdist):
    """pytest collects all of them there, without a file of the checkout."""
    output = succeed(
        sys.executable, "-m", "pytest", "--collect-only", "-q", cwd=sdist, PYTHONPATH=sdist
    )
    assert "error" not in output.splitlines()[-1]
    assert int(output.splitlines()[-1].split("/")[0].split()[0]) > 1000

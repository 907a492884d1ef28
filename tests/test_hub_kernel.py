"""The package as a kernel of Hugging Face's hub: its layout, and loaded by their library."""

import ast
import json
import subprocess
import sys

import pytest
from installing import ROOT, environ

from build_tools import hub_kernel, metadata


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The layout, written once."""
    path = tmp_path_factory.mktemp("hub kernel") / "sdkernels"
    hub_kernel.write(path)
    return path


@pytest.mark.parametrize("backend", hub_kernel.BACKENDS)
def test_layout(folder, backend):
    variant = folder / f"build/torch-{backend}"
    described = json.loads((variant / "metadata.json").read_text())
    assert described["backend"] == {"type": backend}
    assert described["name"] == "sdkernels"
    # A name that differs between versions and backends: modules and operators have it.
    assert described["id"].startswith(f"_sdkernels_{backend}_")
    assert f"torch.ops.{described['id']}\n" in (variant / "_ops.py").read_text()
    source = folder / "torch-ext/sdkernels"
    for path in source.rglob("*.py"):
        assert (variant / path.relative_to(source)).read_text() == path.read_text()
    assert not list(folder.rglob("*.so"))


class RunTime(ast.NodeTransformer):
    """Leaves out what type checkers alone read."""

    def visit_If(self, node):
        if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return [self.visit(each) for each in node.orelse]
        return self.generic_visit(node)


def test_only_torch_triton_and_the_standard_library_are_imported(folder):
    """Absolute imports; those of its own are relative, because the package has no fixed name."""
    found = {}
    for path in (folder / "build/torch-cpu").rglob("*.py"):
        # What stands behind TYPE_CHECKING is never run.
        for node in ast.walk(RunTime().visit(ast.parse(path.read_text()))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            for name in names:
                found.setdefault(name.partition(".")[0], set()).add(path.parent.name)
    others = {name: places for name, places in found.items() if name not in sys.stdlib_module_names}
    assert others == {"torch": others["torch"], "triton": {"triton"}}


def test_every_change_has_a_name_of_its_own(folder, tmp_path):
    assert hub_kernel.digest(folder) == hub_kernel.digest(folder)
    (tmp_path / "a.py").write_text("1")
    one = hub_kernel.digest(tmp_path)
    (tmp_path / "a.py").write_text("2")
    assert hub_kernel.digest(tmp_path) != one
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    assert hub_kernel.digest(tmp_path) != one


PROGRAM = """
import socket, sys
from pathlib import Path

def refuse(*arguments):
    raise OSError("no network in this test")

socket.socket.connect = socket.getaddrinfo = refuse

import sdkernels, torch
from kernels import get_local_kernel

first, second = (get_local_kernel(Path(folder), backend="cpu") for folder in sys.argv[1:])
assert first.__name__ != second.__name__ != "sdkernels"
assert first.__version__ == VERSION, first.__version__
assert first.backends.extension.module is None
torch.manual_seed(0)
x = torch.randn(8, 5, 16, requires_grad=True)
branch, norm = torch.nn.Linear(16, 16), torch.nn.LayerNorm(16)
scale = torch.full((16,), 0.5, requires_grad=True)
leaves = [x, scale, *branch.parameters(), *norm.parameters()]

def step(package):
    torch.manual_seed(1)
    y = package.fused_stochastic_depth(x, branch, 0.5, norm=norm, layer_scale=scale)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), leaves)]

expected = step(sdkernels)
assert not torch.equal(expected[0], x)
for package in (first, second):
    for ours, theirs in zip(step(package), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    operators = getattr(torch.ops, package.__name__)
    assert package.backends.namespace.ops is operators
    index = torch.tensor([1, 4])
    assert torch.equal(operators.compact_rows(x.detach(), index), x.detach()[index])
model = torch.nn.Sequential(first.StochasticDepth(branch, 0.5))
compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
assert compiled(x).shape == x.shape
print("loaded", first.__name__, second.__name__)
"""


def test_loaded_by_their_library(folder, tmp_path):
    """Two versions, beside the installed package, in one process."""
    pytest.importorskip("kernels")
    hub_kernel.write(tmp_path / "other")
    for variant in (tmp_path / "other/build").iterdir():
        described = json.loads((variant / "metadata.json").read_text())
        for name in ("metadata.json", "_ops.py"):
            text = (variant / name).read_text()
            (variant / name).write_text(text.replace(described["id"], described["id"] + "b"))
    program = PROGRAM.replace("VERSION", repr(metadata.VERSION))
    result = subprocess.run(
        [sys.executable, "-c", program, folder, tmp_path / "other"],
        env=environ(HF_HUB_OFFLINE=1, PYTHONPATH=ROOT, HF_HOME=tmp_path),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("loaded _sdkernels_cpu_")


def test_their_builder_accepts_it(folder):
    """Their parser of build.toml."""
    library = pytest.importorskip("kernels._rust", reason="kernels is not installed")
    general = library.Build.open(folder).general
    assert [str(backend).lower() for backend in general.backends] == list(hub_kernel.BACKENDS)

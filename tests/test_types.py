"""What type checkers make of the installed package, of a wheel and of an editable install."""

import shutil
from pathlib import Path

import pytest
from installing import ROOT, Wheel, copy_tree, make_environment, pip_install, pip_wheel, succeed

pytestmark = pytest.mark.install

USER_CODE = ROOT / "tests/user_code.py"


@pytest.fixture(scope="module", params=["wheel", "editable"])
def python(request, tmp_path_factory):
    """The Python of an environment with the package, and a folder with a user's file in it."""
    folder = tmp_path_factory.mktemp(request.param)
    tree = copy_tree(folder / "checkout")
    python = make_environment(folder / "venv")
    if request.param == "wheel":
        assert pip_wheel(tree, folder, SDKERNELS_BUILD="none").returncode == 0
        pip_install(python, Wheel(folder).path)
        shutil.rmtree(tree)
    else:
        pip_install(python, "-e", tree, SDKERNELS_BUILD="none")
    (folder / "user").mkdir()
    shutil.copy(USER_CODE, folder / "user")
    return python


def user_folder(python: Path) -> Path:
    return python.parents[2] / "user"


def test_the_user_code_runs_where_types_are_right(python):
    """The part above the errors, outside of the source tree."""
    text = USER_CODE.read_text()
    right = text[: text.index("# Each line is an error")]
    where = "import sys; print(sys.modules['sdkernels'].__file__)"
    output = succeed(python, "-W", "error", "-c", f"{right}\n{where}", cwd=user_folder(python))
    assert not Path(output.strip()).is_relative_to(ROOT)


def test_mypy(python):
    pytest.importorskip("mypy")
    command = [python, "-m", "mypy", "--strict", "--python-executable", python, "user_code.py"]
    output = succeed(*command, cwd=user_folder(python), MYPY_CACHE_DIR=ROOT / ".mypy_cache/users")
    assert output.startswith("Success")


def test_pyright(python):
    pytest.importorskip("pyright")
    folder = user_folder(python)
    settings = """{"typeCheckingMode": "strict", "reportUnnecessaryTypeIgnoreComment": true,
        "reportUnknownMemberType": false, "reportUnusedExpression": false}"""
    (folder / "pyrightconfig.json").write_text(settings)
    command = [python, "-m", "pyright", "--pythonpath", python, "user_code.py"]
    output = succeed(*command, cwd=folder)
    assert "0 errors" in output

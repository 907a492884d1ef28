"""Python programs in processes of their own, which have PyTorch already.

To import it takes longer than most of them run. So one process of every test session does, and
forks for each program. The program's arguments, environment and working directory are its own, and
so is all that it imports beside torch: nothing of the package is there before. It ends after its
threads and its exit handlers, without taking torch apart.

What looks at how torch is imported, or at an environment that the interpreter or torch itself reads
as it starts (but OMP_NUM_THREADS), needs ``subprocess``.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import gc
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FORKS = sys.platform == "linux"
PR_SET_PDEATHSIG = 1


def run(
    *command: object, cwd: str | os.PathLike[str], env: Mapping[str, str], timeout: int = 0
) -> subprocess.CompletedProcess[str]:
    """``subprocess.run([sys.executable, *command])``, its output captured as text. `command` is
    ``-c PROGRAM``, ``-m MODULE`` or a path, and arguments; after `timeout` seconds, if there are
    any, a signal ends it, but nothing that it has started."""
    words = [str(word) for word in command]
    if not FORKS:
        return subprocess.run(
            [sys.executable, *words],
            cwd=cwd,
            env=env,
            capture_output=True,
            text=True,
            timeout=timeout or None,
        )
    with tempfile.TemporaryDirectory() as folder:
        files = [os.path.join(folder, name) for name in ("stdout", "stderr")]
        request = {"command": words, "cwd": os.fspath(cwd), "env": dict(env)}
        answer = _ask(json.dumps(request | {"files": files, "timeout": timeout}))
        out, error = (Path(file).read_text() for file in files)
    return subprocess.CompletedProcess([sys.executable, *words], answer, out, error)


def _ask(request: str) -> int:
    """The exit code of a program."""
    if _server().poll() is not None:
        _server.cache_clear()
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    try:
        server.stdin.write(request + "\n")
        server.stdin.flush()
        answer = server.stdout.readline()
        assert answer, "the process that forks has ended"
        return int(answer)
    except BaseException:
        # Interrupted: the next program would be given this one's answer.
        server.kill()
        _server.cache_clear()
        raise


@functools.cache
def _server() -> subprocess.Popen[str]:
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    server = subprocess.Popen(
        [sys.executable, __file__],
        env=clean,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(_stop, server)
    return server


def _stop(server: subprocess.Popen[str]) -> None:
    server.communicate()  # nothing more: the end of its loop


def _become(request: dict[str, Any]) -> None:
    """What a fresh interpreter has of its own."""
    import torch

    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # where nobody waits for it
    signal.alarm(request["timeout"])
    nothing = os.open(os.devnull, os.O_RDONLY)
    outputs = [os.open(file, os.O_WRONLY | os.O_CREAT) for file in request["files"]]
    for number, file in enumerate([nothing, *outputs]):
        os.dup2(file, number)
        os.close(file)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    sys.path[:0] = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    torch.seed()  # from the system's entropy, as it does where it is imported
    if "OMP_NUM_THREADS" in os.environ:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def _execute(kind: str, rest: list[str]) -> None:
    if kind == "-c":
        program, *arguments = rest
        sys.argv = ["-c", *arguments]
        sys.path.insert(0, "")
        main = sys.modules["__main__"] = types.ModuleType("__main__")  # not this file
        exec(compile(program, "<string>", "exec"), vars(main))
    elif kind == "-m":
        sys.argv = rest
        sys.path.insert(0, os.getcwd())
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [kind, *rest]
        sys.path.insert(0, os.path.dirname(kind))
        runpy.run_path(kind, run_name="__main__")


def _exit_code(kind: str, rest: list[str]) -> int:
    """That of an interpreter, which says why it is not 0."""
    try:
        _execute(kind, rest)
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


if __name__ == "__main__":
    del sys.path[0]  # this folder, which others do not see
    import torch  # noqa: F401

    gc.freeze()  # what is here already: no child writes to its pages
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            asked = json.loads(line)
            _become(asked)
            kind, *rest = asked["command"]
            code = _exit_code(kind, rest)
            threading._shutdown()
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)

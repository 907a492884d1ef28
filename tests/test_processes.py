"""Programs in forked processes behave as in fresh interpreters."""

import os
import signal
import time
from contextlib import contextmanager

import processes
import pytest

forked = pytest.mark.skipif(not processes.FORKS, reason="programs are not forked here")


def output_of(program, folder):
    done = processes.run("-c", program, cwd=folder, env=os.environ)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_threads_end_before_exit_handlers(tmp_path):
    program = """if True:
        import atexit, threading, time
        atexit.register(print, "handler")
        threading.Thread(target=lambda: (time.sleep(0.2), print("thread"))).start()
    """
    assert output_of(program, tmp_path) == "thread\nhandler\n"


def test_a_program_is_the_main_module(tmp_path):
    program = """if True:
        import pickle, sys
        def function(): return 1
        main = sys.modules["__main__"]
        print(pickle.loads(pickle.dumps(function))(), hasattr(main, "json"))
    """
    assert output_of(program, tmp_path) == "1 False\n"


@contextmanager
def interrupted(seconds):
    """A signal handler raises after so many."""

    def interrupt(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        with pytest.raises(TimeoutError):
            yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@forked
def test_after_an_interruption_a_program_has_its_own_answer(tmp_path):
    program = """if True:
        import pathlib, sys, time
        time.sleep(1)
        pathlib.Path("lives").touch()
        sys.exit(3)
    """
    output_of("", tmp_path)  # torch is imported
    with interrupted(0.3):
        processes.run("-c", program, cwd=tmp_path, env=os.environ)
    assert output_of("print(1)", tmp_path) == "1\n"
    time.sleep(1)
    assert not (tmp_path / "lives").exists()  # it has ended with the process that forked it


@forked
def test_a_server_that_has_died_is_started_anew(tmp_path):
    server = processes._server()
    server.kill()
    server.wait()
    assert output_of("print(1)", tmp_path) == "1\n"

"""Programs in the real sandbox; most also run outside of it, so that the tests would notice a sandbox that breaks them."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from lmtp_factory.errors import LMTPError
from lmtp_factory.evaluation.quality import code_sandbox
from lmtp_factory.evaluation.quality.code_sandbox import Limits, Outcome, check_sandbox, run_program


FAST = Limits(cpu_seconds=5, wall_seconds=30, memory_megabytes=256, file_megabytes=1)


@pytest.fixture(scope="module", autouse=True)
def sandbox():
    try:
        check_sandbox()
    except LMTPError as error:
        pytest.skip(str(error))


def passes_outside(source, directory):
    return (
        subprocess.run([sys.executable, "-c", source], cwd=directory, capture_output=True, timeout=30).returncode == 0
    )


def test_a_right_program_passes():
    assert run_program("def f(n):\n    return 2 * n\n\nassert f(3) == 6\nprint('done')") == Outcome(True)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("assert 1 == 2, 'wrong'", "AssertionError: wrong"),
        ("def f(:", "SyntaxError: invalid syntax"),
        ("raise SystemExit(3)", "exit status 3"),
        ("import sys\nsys.exit(0)\nassert False", "exited before its end"),
        ("import os\nos._exit(0)", "exited before its end"),
        ("import os\nos.kill(os.getpid(), 11)", "killed by signal 11"),
        ("input()", "EOFError: EOF when reading a line"),
    ],
)
def test_wrong_programs_fail_with_a_reason(source, reason):
    assert run_program(source, FAST) == Outcome(False, reason)


def test_a_program_that_loops_is_killed():
    """By its CPU time: on a busy machine that takes longer than on a clock."""
    assert run_program("while True: pass", Limits(cpu_seconds=1, wall_seconds=90)) == Outcome(
        False, "killed by signal 9"
    )


def test_a_program_that_sleeps_is_killed():
    assert run_program("import time; time.sleep(60)", Limits(wall_seconds=1)) == Outcome(
        False, "still running after 1 seconds"
    )


def test_a_launcher_that_does_not_answer_is_one_wrong_answer(monkeypatch, tmp_path):
    """And not the end of the run, which would lose the answers before it."""
    launcher = tmp_path / "launcher.py"
    launcher.write_text("import time; time.sleep(60)")
    monkeypatch.setattr(code_sandbox, "LAUNCHER", launcher)
    monkeypatch.setattr(code_sandbox, "_GRACE", 0.5)
    assert run_program("pass", Limits(wall_seconds=0.5)) == Outcome(
        False, "the sandbox did not end it within 1 seconds"
    )


def test_memory_is_limited(tmp_path):
    source = "memory = bytearray(400 << 20)"
    assert passes_outside(source, tmp_path)
    assert run_program(source, FAST) == Outcome(False, "MemoryError")
    assert run_program("memory = bytearray(40 << 20)", FAST).passed


def test_files_are_limited(tmp_path):
    source = "open('file', 'wb').write(bytes(2 << 20))"
    assert passes_outside(source, tmp_path)
    assert run_program(source, FAST) == Outcome(False, "OSError: [Errno 27] File too large")
    many = "for n in range(9): open(str(n), 'wb').write(bytes(1 << 19))"
    assert run_program(many, FAST).reason == "OSError: [Errno 28] No space left on device"


def test_the_directory_is_empty_and_writable():
    source = "import os\nassert os.listdir('.') == []\nopen('file', 'w').write('x')\nassert os.listdir('.') == ['file']"
    assert run_program(source, FAST).passed


def test_other_files_cannot_be_written(tmp_path):
    target = tmp_path / "target"
    source = f"open({str(target)!r}, 'w')"
    assert passes_outside(source, tmp_path) and target.is_file()
    target.unlink()
    assert "Read-only file system" in run_program(source, FAST).reason
    assert not target.exists()


def test_there_is_no_network(tmp_path):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        source = f"import socket\nsocket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 5)"
        assert passes_outside(source, tmp_path)
        assert run_program(source, FAST).reason == "OSError: [Errno 101] Network is unreachable"


def test_the_environment_is_cleared(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    source = "import os\nassert 'secret' not in os.environ.values()\nassert os.environ['HOME'] == os.getcwd()"
    assert run_program(source, FAST).passed


def test_the_environment_of_other_processes_is_hidden(monkeypatch, tmp_path):
    source = f"open('/proc/{os.getpid()}/environ').read()"
    assert passes_outside(source, tmp_path)
    assert "PermissionError" in run_program(source, FAST).reason


def test_limits_cannot_be_raised_and_mounts_cannot_be_undone():
    assert not run_program("import resource\nresource.setrlimit(resource.RLIMIT_CPU, (99, 99))", FAST).passed
    remount = (
        "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "assert libc.mount(b'none', b'/', None, ctypes.c_ulong(32), None) == -1 and ctypes.get_errno() == 1"
    )
    assert run_program(remount, FAST).passed


def test_nothing_is_left_behind():
    mark = "lmtp-left-behind"
    child = f"os.setsid(); os.execv({sys.executable!r}, ['{mark}', '-c', 'while True: pass'])"
    source = f"import os\nif os.fork() == 0:\n    {child}"
    assert run_program(source, FAST).passed
    names = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert names and not any(name.startswith(mark.encode()) for name in names)


def test_processes_are_limited():
    """The limit stands for everybody; the kernel does not enforce it for root."""
    source = "import resource\nassert resource.getrlimit(resource.RLIMIT_NPROC) == (32, 32)"
    assert run_program(source, FAST).passed
    if os.geteuid() != 0:
        forks = "import os, time\nfor _ in range(64):\n    if os.fork() == 0: time.sleep(9)"
        assert "BlockingIOError" in run_program(forks, FAST).reason


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ('call("unshare", ', 'call("unshare", 1 | ', "Invalid argument: 'unshare'"),
        ("AT_RECURSIVE = 442, ", "AT_RECURSIVE = 9999, ", "Function not implemented"),
        ('options["command"][0], ', '"/no/such/program", ', "No such file or directory"),
        ("import json", "import json, no_such_module", "No module named 'no_such_module'"),
    ],
)
def test_a_step_that_fails_is_a_refusal(before, after, words, monkeypatch, tmp_path):
    """A launcher one of whose steps fails, as on an old kernel and in most containers."""
    text = code_sandbox.LAUNCHER.read_text()
    assert text.count(before) == 1
    launcher = tmp_path / "launcher.py"
    launcher.write_text(text.replace(before, after))
    monkeypatch.setattr(code_sandbox, "LAUNCHER", launcher)
    with pytest.raises(LMTPError, match=rf"cannot be separated from network and files here \(.*{words}.*\): use Linux"):
        run_program("pass")


def test_other_systems_are_refused(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(LMTPError, match="it needs Linux"):
        run_program("pass")

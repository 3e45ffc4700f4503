"""Run a program that a model wrote: in processes of its own, without network, with limits, on a read-only file system.

`sandbox_launcher.py` does it with Linux namespaces and resource limits. What this does not protect from:
docs/quality.md.
"""

import contextlib
import json
import os
import secrets
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from ...errors import LMTPError


LAUNCHER = Path(__file__).with_name("sandbox_launcher.py")
# Numerical libraries start a thread for each core otherwise, and the limits count threads. Hashes are fixed so that a
# program that depends on the order of a set does the same in each run.
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}
ENVIRONMENT |= {f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL")}
_GRACE = 10  # seconds that the launcher may take beyond the program's


@dataclass(frozen=True)
class Limits:
    """What a program may use.

    Attributes:
        cpu_seconds: CPU time of each of its processes.
        wall_seconds: Time from start to end; then all its processes are killed.
        memory_megabytes: Address space of each process.
        file_megabytes: Size of one file; all its files together may have four times as much.
        processes: Processes and threads. Linux does not enforce it for a program that root starts.
    """

    cpu_seconds: int = 10
    wall_seconds: float = 30.0
    memory_megabytes: int = 1024
    file_megabytes: int = 4
    processes: int = 32


@dataclass(frozen=True)
class Outcome:
    """How a program ended.

    Attributes:
        passed: It ran to its last line and exited with status 0.
        reason: Empty, or why it did not pass.
    """

    passed: bool
    reason: str = ""


def run_program(source: str, limits: Limits | None = None) -> Outcome:
    """Run Python source text and return whether it reached its end.

    Raises:
        LMTPError: The system does not provide the sandbox. The program has not run.
    """
    if not sys.platform.startswith("linux"):
        raise _unavailable("it needs Linux")
    limits = limits or Limits()
    # The last line writes a word that the program cannot know before: exit(0) before the tests is no success.
    word = secrets.token_hex(16)
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="lmtp-code-"))
        errors = stack.enter_context(tempfile.TemporaryFile())
        reached, report = os.pipe()
        stack.callback(os.close, reached)
        os.set_blocking(reached, False)
        program = f'{source}\n__import__("os").write({report}, b"{word}")\n'
        options = asdict(limits) | {
            "directory": directory,
            "command": [sys.executable, "-s", "-P", "-"],
            "environment": ENVIRONMENT | {"HOME": directory, "TMPDIR": directory},
        }
        try:
            launcher = subprocess.run(
                [sys.executable, "-I", "-S", str(LAUNCHER), json.dumps(options)],
                input=program.encode("utf-8", "replace"),
                stdout=subprocess.PIPE,
                stderr=errors,
                pass_fds=[report],
                cwd=directory,
                env=ENVIRONMENT,
                timeout=limits.wall_seconds + _GRACE,
                start_new_session=True,
            )
        except subprocess.TimeoutExpired as late:  # the launcher is killed, and its children with it
            return Outcome(False, f"the sandbox did not end it within {late.timeout:g} seconds")
        finally:
            os.close(report)
        errors.seek(0)
        messages = errors.read().decode("utf-8", "replace").strip().splitlines()
        try:
            ended = json.loads(launcher.stdout)
        except ValueError:
            raise _unavailable(messages[-1] if messages else f"exit status {launcher.returncode}") from None
        if "refused" in ended:
            raise _unavailable(ended["refused"])
        if "timeout" in ended:
            return Outcome(False, f"still running after {limits.wall_seconds:g} seconds")
        return _outcome(ended["status"], _read(reached) == word.encode(), messages)


def check_sandbox() -> None:
    """Check that the sandbox works here.

    Raises:
        LMTPError: It does not.
    """
    outcome = run_program("pass")
    if not outcome.passed:
        raise _unavailable(outcome.reason)


def _outcome(status: int, at_the_end: bool, messages: list[str]) -> Outcome:
    if status == 0 and at_the_end:
        return Outcome(True)
    if status > 128:
        return Outcome(False, f"killed by signal {status - 128}")
    if status == 0:
        return Outcome(False, "exited before its end")
    return Outcome(False, messages[-1][:200] if messages else f"exit status {status}")


def _read(pipe: int) -> bytes:
    try:
        return os.read(pipe, 4096)
    except BlockingIOError:
        return b""


def _unavailable(reason: str) -> LMTPError:
    return LMTPError(
        f"Code that a model wrote is not run, because it cannot be separated from network and files here ({reason}): "
        "use Linux 5.12 or newer where processes may create user namespaces (containers often forbid it), or leave "
        "humaneval and mbpp out of --tasks."
    )

"""Run one program without network, with a read-only file system and under limits. A script of the standard library.

`code_sandbox.py` starts it as `python sandbox_launcher.py OPTIONS`, OPTIONS a JSON object with the fields of `Limits` and

- `directory`: an empty directory; the program sees an empty tmpfs in its place, which is its working directory;
- `command`: the program and its arguments; it reads the launcher's stdin, and its stdout is discarded.

Three processes, because only a child of the process that creates a PID namespace is in it:

    launcher: new namespaces, waits, kills at `wall_seconds`
    +- init: process 1 of the PID namespace; mounts; the kernel kills all that is left in the namespace when it ends
       +- program: limits, no capabilities

The launcher prints one JSON object: `{"status": n}` (exit status, or 128 and the number of the signal that ended the
program), `{"timeout": true}`, or `{"refused": "..."}` when the kernel refuses a step before the program starts.
"""

import ctypes
import json
import os
import resource
import signal
import sys
import time


# From the kernel's headers; they are the same on every architecture that CPython supports officially.
CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = (1 << n for n in (17, 27, 28, 29, 30))
MS_REC, MS_PRIVATE = 1 << 14, 1 << 18
MS_NOSUID, MS_NODEV = 1 << 1, 1 << 2
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV = 1, 2, 4
SYS_MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE = 442, -100, 0x8000
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38
# Not 0: a process with id 0 in its namespace keeps its capabilities across exec and could undo the mounts.
NOBODY = 65534
# Exit status of a process that could not do its part; the reason is in the pipe `failure`.
REFUSED = 125

libc = ctypes.CDLL(None, use_errno=True)
_int, _long, _string = ctypes.c_int, ctypes.c_ulong, ctypes.c_char_p
libc.mount.argtypes = (_string, _string, _string, _long, _string)
libc.prctl.argtypes = (_int, _long, _long, _long, _long)
libc.syscall.argtypes = (_long, _int, _string, ctypes.c_uint, ctypes.c_void_p, ctypes.c_size_t)


class MountAttributes(ctypes.Structure):
    """`struct mount_attr` of mount_setattr(2)."""

    _fields_ = [(name, ctypes.c_uint64) for name in ("attr_set", "attr_clr", "propagation", "userns_fd")]


def call(name: str, *arguments) -> None:
    """Call a function of libc that returns 0.

    Raises:
        OSError: It returned something else; the message names the function.
    """
    if getattr(libc, name)(*arguments) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), name)


def leave_namespaces() -> None:
    """Enter new user, network, mount, IPC and PID namespaces. The PID namespace is that of the next child."""
    uid, gid = os.getuid(), os.getgid()
    call("unshare", CLONE_NEWUSER | CLONE_NEWNET | CLONE_NEWNS | CLONE_NEWIPC | CLONE_NEWPID)
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{NOBODY} {uid} 1"),
        ("gid_map", f"{NOBODY} {gid} 1"),
    ):
        with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
            file.write(text)


def protect_files(directory: str, megabytes: int) -> None:
    """Make every mount read-only and without devices, then put an empty tmpfs over `directory`."""
    call("mount", b"none", b"/", None, MS_REC | MS_PRIVATE, None)
    attributes = MountAttributes(attr_set=MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV)
    size = ctypes.sizeof(attributes)
    call("syscall", SYS_MOUNT_SETATTR, AT_FDCWD, b"/", AT_RECURSIVE, ctypes.byref(attributes), size)
    options = f"size={megabytes}m,nr_inodes=1000,mode=700".encode()
    call("mount", b"tmpfs", os.fsencode(directory), b"tmpfs", MS_NOSUID | MS_NODEV, options)


def limit(options: dict) -> None:
    """Limit this process; soft and hard limits are equal, so the program cannot raise them."""
    megabyte = 1 << 20
    for name, value in (
        (resource.RLIMIT_CPU, options["cpu_seconds"]),
        (resource.RLIMIT_AS, options["memory_megabytes"] * megabyte),
        (resource.RLIMIT_FSIZE, options["file_megabytes"] * megabyte),
        (resource.RLIMIT_NPROC, options["processes"]),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(name, (value, value))


def run_program(options: dict, output: int) -> None:
    """Replace this process by the program, whose stdout is the file descriptor `output`."""
    os.dup2(output, 1)
    os.chdir(options["directory"])
    # The capabilities in the new user namespace end at exec, because the id there is not 0.
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    limit(options)
    os.execve(options["command"][0], options["command"], options["environment"])


def init(options: dict, failure: int) -> int:
    """Process 1 of the PID namespace: mount, start the program, return its exit status.

    Args:
        options: See the module's docstring.
        failure: Pipe for the reason if the program cannot be started. exec closes it.
    """
    try:
        call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        output = os.open(os.devnull, os.O_WRONLY)  # devices cannot be opened later
        protect_files(options["directory"], options["file_megabytes"] * 4)
        program = os.fork()
        if program == 0:
            run_program(options, output)
    except (OSError, ValueError) as error:
        os.write(failure, str(error).encode())
        return REFUSED
    while True:
        child, status = os.wait()  # also reaps what the program's own children leave
        if child == program:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code


def wait(child: int, seconds: float) -> int | None:
    """Return the exit status of `child`, or None if it had to be killed after `seconds`."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        finished, status = os.waitpid(child, os.WNOHANG)
        if finished:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def main(options: dict) -> dict:
    """Run the program; see the module's docstring."""
    try:
        leave_namespaces()
    except OSError as error:
        return {"refused": str(error)}
    reasons, failure = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reasons)
        status = REFUSED
        try:
            status = init(options, failure)
        finally:
            os._exit(status)
    os.close(failure)
    status = wait(child, options["wall_seconds"])
    reason = os.read(reasons, 4096).decode()
    if reason:
        return {"refused": reason}
    return {"timeout": True} if status is None else {"status": status}


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))

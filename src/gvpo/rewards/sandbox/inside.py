"""The program that keeps watch over a model's code: `python -I inside.py`, a job as JSON in, a report as JSON out.

With namespaces it is process 1 of its own: no network, no other processes to be seen or signalled, every file system
read-only but for one small folder in memory, and whatever the code leaves running ends when this program does.
Without them it adopts what the code leaves behind, and ends it. Standard library alone; it never runs the code itself.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

REFUSED = 3  # the exit status where the kernel does not allow what the job wants

# From linux/prctl.h, linux/sched.h, linux/mount.h.
_PDEATHSIG, _DUMPABLE, _SUBREAPER, _NO_NEW_PRIVS = 1, 4, 36, 38
_NEW_EVERYTHING = 0x10000000 | 0x40000000 | 0x20000000 | 0x08000000 | 0x00020000  # user, net, pid, ipc, mount
_MS_NOSUID, _MS_NODEV, _MS_REC, _MS_PRIVATE = 2, 4, 0x4000, 0x40000
_MOUNT_SETATTR, _AT_FDCWD, _AT_RECURSIVE, _RDONLY = 442, -100, 0x8000, 1

_libc = ctypes.CDLL(None, use_errno=True)
_ASSERTS = str(Path(__file__).with_name("asserts.py"))


def main() -> None:
    # Schedulers tell every process of a job to end; this one ends with the trainer, which may have to save first.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    job = json.load(sys.stdin)
    _die_with(job["parent"])
    _checked(_libc.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0))
    with suppress(OSError):  # when memory is short, this ends and not the trainer; not every kernel has it
        Path("/proc/self/oom_score_adj").write_text("1000")
    if job["namespaces"]:
        try:
            _isolate(job["folder"], 4 * job["limits"]["file_mb"])
        except OSError as error:
            print(error, file=sys.stderr)
            sys.exit(REFUSED)
    else:
        _checked(_libc.prctl(_SUBREAPER, 1, 0, 0, 0))
    _checked(_libc.prctl(_DUMPABLE, 0, 0, 0, 0))  # the code may not look into this process
    job["deadline"] = time.monotonic() + job["limits"]["seconds"]
    solution = Path(job["folder"], "solution.py")
    solution.write_text(job["code"], encoding="utf-8", errors="replace")
    json.dump([_asserted(job, solution)] if "tests" in job else _programs(job, solution), sys.stdout)


def _programs(job: dict[str, Any], solution: Path) -> list[dict[str, Any]]:
    runs: list[dict[str, Any]] = []
    for text, kept in job["inputs"]:
        with tempfile.TemporaryFile(dir=job["folder"]) as out:
            runs.append(_run(job, [str(solution)], text=text, out=out))
            out.seek(0)
            printed = out.read(kept + 1)
            runs[-1]["output"] = printed.decode(errors="replace") if len(printed) <= kept else None
        if runs[-1]["status"] != 0:
            break
    return runs


def _asserted(job: dict[str, Any], solution: Path) -> dict[str, Any]:
    """A run of asserts.py; `output` is what it wrote to a file that the code is not told of."""
    with tempfile.TemporaryFile(dir=job["folder"]) as tests, tempfile.TemporaryFile(dir=job["folder"]) as said:
        tests.write((job["token"] + job["tests"]).encode(errors="replace"))
        tests.flush()
        files = (tests.fileno(), said.fileno())
        run = _run(job, [_ASSERTS, str(solution), *map(str, files), str(len(job["token"]))], files=files)
        return {**run, "output": os.pread(said.fileno(), 100, 0).decode(errors="replace")}


def _run(
    job: dict[str, Any], argv: list[str], *, text: str = "", out: Any = subprocess.DEVNULL, files: tuple[int, ...] = ()
) -> dict[str, Any]:
    """Start a Python program in a new folder, wait for its end, and end everything that it has started."""
    home = tempfile.mkdtemp(dir=job["folder"])
    with tempfile.TemporaryFile(dir=job["folder"]) as source:
        source.write(text.encode(errors="replace"))
        source.seek(0)
        process = subprocess.Popen(
            [sys.executable, "-I", "-B", "-X", "utf8", *argv],
            stdin=source,
            stdout=out,
            stderr=subprocess.DEVNULL,
            cwd=home,
            env={"HOME": home, "TMPDIR": home, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            pass_fds=files,
            start_new_session=True,
            preexec_fn=lambda: _limit(job["limits"], job["namespaces"]),
        )
    ended = _wait(process, job["deadline"], job["limits"]["processes"])
    process.kill()
    status = process.wait()
    _end_the_rest()
    return {"ended": ended, "status": status if ended == "exit" else None}


def _wait(process: subprocess.Popen[bytes], deadline: float, processes: int) -> str:
    while process.poll() is None:
        if time.monotonic() > deadline:
            return "time"
        if _population() > processes + 1:
            return "processes"
        time.sleep(0.005)
    return "exit"


def _limit(limits: dict[str, Any], namespaces: bool) -> None:
    _die_with(None)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    bounds = {
        resource.RLIMIT_CPU: limits["cpu_seconds"],
        resource.RLIMIT_AS: limits["memory_mb"] << 20,
        resource.RLIMIT_FSIZE: limits["file_mb"] << 20,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NOFILE: 256,
    }
    # Elsewhere all processes and threads of this user count, the trainer's too, and the code could start none at all.
    if namespaces and _kernel() >= (5, 14):
        bounds[resource.RLIMIT_NPROC] = limits["processes"] + 1
    for what, bound in bounds.items():
        hard = resource.getrlimit(what)[1]
        bound = bound if hard == resource.RLIM_INFINITY else min(bound, hard)
        resource.setrlimit(what, (bound, bound))


def _kernel() -> tuple[int, ...]:
    return tuple(int(part) for part in os.uname().release.split("-")[0].split(".")[:2])


# Namespaces


def _isolate(folder: str, folder_mb: int) -> None:
    """Go on as process 1 in namespaces of its own; the process that came here waits for it and ends as it does."""
    user, group = os.geteuid(), os.getegid()
    _checked(_libc.unshare(_NEW_EVERYTHING), "unshare")
    Path("/proc/self/setgroups").write_text("deny")
    # Not as root inside: a program that root starts has all capabilities in its namespace, and could mount.
    Path("/proc/self/uid_map").write_text(f"1000 {user} 1")
    Path("/proc/self/gid_map").write_text(f"1000 {group} 1")
    if child := os.fork():
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status < 0:
            os.kill(os.getpid(), -status)
        os._exit(status)
    _die_with(None)
    _mount(None, "/", None, _MS_REC | _MS_PRIVATE)
    _make_read_only("/")
    _mount("tmpfs", folder, "tmpfs", _MS_NOSUID | _MS_NODEV, f"size={folder_mb}m,mode=700")
    try:
        _mount("proc", "/proc", "proc", _MS_NOSUID | _MS_NODEV)
    except PermissionError:  # in a container that hides parts of its own; an empty one shows no processes either
        _mount("tmpfs", "/proc", "tmpfs", _MS_NOSUID | _MS_NODEV, "size=0,mode=555")
    os.chdir(folder)


def _mount(source: str | None, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    texts = [text.encode() if text is not None else None for text in (source, target, kind, options)]
    _checked(_libc.mount(*texts[:3], ctypes.c_ulong(flags), texts[3]), f"mount {target}")


def _make_read_only(top: str) -> None:
    """All file systems under `top`, where the kernel can (5.12 and later)."""
    attributes = (ctypes.c_uint64 * 4)(_RDONLY)
    done = _libc.syscall(
        ctypes.c_long(_MOUNT_SETATTR), _AT_FDCWD, top.encode(), _AT_RECURSIVE, attributes, ctypes.sizeof(attributes)
    )
    if done != 0 and ctypes.get_errno() != 38:  # ENOSYS
        _checked(done, "mount_setattr")


# Processes


def _die_with(parent: int | None) -> None:
    """End when the parent ends; `parent`: its number, None in a namespace in which it has none."""
    _checked(_libc.prctl(_PDEATHSIG, signal.SIGKILL, 0, 0, 0))
    if parent is not None and os.getppid() != parent:
        os._exit(1)


def _population() -> int:
    """The processes of this namespace, this one included; 0 where they cannot be counted."""
    if os.getpid() != 1 or not os.path.isdir("/proc/1"):
        return 0
    return sum(name.isdecimal() for name in os.listdir("/proc"))


def _end_the_rest() -> None:
    """Kill all that is left and wait until none is, what they start meanwhile included."""
    while True:
        for pid in (-1,) if os.getpid() == 1 else _children():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.001)


def _children() -> list[int]:
    """Processes whose parent is this one, those included that it has adopted (it is their subreaper)."""
    found: list[int] = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with suppress(OSError):  # gone meanwhile
                state = (entry / "stat").read_text().rpartition(")")[2].split()
                found += [int(entry.name)] if int(state[1]) == os.getpid() else []
    return found


def _checked(result: int, what: str = "prctl") -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


if __name__ == "__main__":
    main()

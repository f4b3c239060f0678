"""What holds this process before the module's first instruction runs.

The order that must hold: working folder and environment; the module's folder opened (another user may not
reach it by its path); limits; Landlock and no_new_privs; the other user; and last the signal that ends
this process with its parent, which the kernel forgets whenever the user changes.
"""

from __future__ import annotations

import math
import os
import resource
import signal
import sys
from typing import Any

from instar.core.errors import InputError, MachineError
from instar.runner.kinds import Limits
from instar.runner.request import BUILTIN, Request

PLAIN = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}
KEPT = "INSTAR_WASMTIME"  # where the agent's configuration says that wasmtime is
HERE = "/proc/self/cwd"  # the working folder, for one who may not come there by its path
SPARE_S = 2  # past its deadline, a runner whose agent died ends itself
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS, PR_GET_NO_NEW_PRIVS = 1, 38, 39
STILL_IGNORED = (signal.SIGPIPE, signal.SIGXFSZ)  # so that a write fails with a reason
UNCATCHABLE = (signal.SIGKILL, signal.SIGSTOP)
_libc: Any = None


def settle() -> None:
    """What every runner does first, whoever started it: signals as at the start of a process, own files private."""
    for number in signal.valid_signals() - set(UNCATCHABLE):
        wanted = signal.SIG_IGN if number in STILL_IGNORED else signal.SIG_DFL
        if signal.getsignal(number) != wanted:
            signal.signal(number, wanted)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    os.umask(0o077)
    sys.dont_write_bytecode = True
    end_with_parent(signal.SIGKILL)


def end_with_parent(number: int) -> None:
    """Ask the kernel to send us `number` when our parent ends. A Python without ctypes goes without."""
    _prctl(PR_SET_PDEATHSIG, number)


def apply(request: Request) -> Request:
    """Bind this process to the request's bounds. Returns the request with the paths to use from now on.

    Raises InputError `bad-job`, MachineError `no-user`, `no-landlock`, `not-loadable`.
    """
    _place(request)
    if request.module.runs == BUILTIN:
        _limit(request.module.limits, request)
        return request
    uid, gid = _ids(request.user)
    other = uid != os.geteuid()
    module, data = request.module, request.data
    if other:
        for folder in dict.fromkeys((request.data, os.getcwd())):
            if folder:
                _give(folder, uid, gid)
        os.environ.update(HOME=HERE, TMPDIR=HERE)
        module = module._replace(folder=_held(module.folder))
        data = _held(data) if data else ""
    _limit(module.limits, request, uid)
    _fence(request)
    if other:
        _become(request.user, uid, gid)
    end_with_parent(signal.SIGTERM if request.do == "serve" else signal.SIGKILL)
    return request._replace(module=module, data=data)


def _place(request: Request) -> None:
    module = request.module
    try:
        if request.cwd:
            os.chdir(request.cwd)
        cwd = os.getcwd()
    except OSError as error:
        raise InputError("bad-job", f"cannot use the working folder: {error.strerror}") from error
    plain_environment()
    os.environ.update(HOME=cwd, TMPDIR=cwd, INSTAR_MODULE=module.name)
    sys.argv = [f"{module.home}/{module.entry}" if module.entry else module.name]


def warm_up() -> None:
    """Walk the ways of `apply` in a runner that waits, binding nothing: the pages that they touch are its own
    then, and its run need not wait for them."""
    os.environ.update(HOME=HERE, TMPDIR=HERE, INSTAR_MODULE="x")
    plain_environment()
    os.chdir(os.getcwd())
    sys.argv = ["x/x"]
    _ids("")
    for kind in (resource.RLIMIT_CORE, resource.RLIMIT_NOFILE, resource.RLIMIT_FSIZE, resource.RLIMIT_AS):
        resource.setrlimit(kind, resource.getrlimit(kind))
    with open("/proc/self/statm", "rb") as file:
        file.read().split()
    _prctl(PR_GET_NO_NEW_PRIVS, 0)
    landlock = sys.modules.get("instar.runner.landlock")  # not where this Python has no ctypes
    if landlock is not None:
        landlock.warm_up()


def plain_environment() -> None:
    """Nothing of whoever started us but what a module is promised. Idempotent."""
    for name in [name for name in os.environ if name not in PLAIN and name != KEPT]:
        del os.environ[name]
    for name, value in PLAIN.items():
        if os.environ.get(name) != value:
            os.environ[name] = value


# --- limits


def _limit(limits: Limits, request: Request, uid: int = 0) -> None:
    """Bound this process from inside, so that it ends even when its agent is gone."""
    if request.do != "serve":
        signal.alarm(math.ceil(limits.seconds) + SPARE_S)
    _set(resource.RLIMIT_CORE, 0)
    for kind, wanted in ((resource.RLIMIT_NOFILE, limits.files), (resource.RLIMIT_FSIZE, limits.disk)):
        if wanted:
            _set(kind, wanted)
    if limits.cpu_s:
        _set(resource.RLIMIT_CPU, limits.cpu_s, 1)  # SIGXCPU, and a second later SIGKILL
    if limits.memory:
        _limit_memory(limits.memory, request.module.runs)
    if limits.processes and uid:
        _set(resource.RLIMIT_NPROC, limits.processes + _tasks_of(uid))


def _limit_memory(wanted: int, runs: str) -> None:
    """`wanted` bytes more than what the runner itself has mapped, which hangs on the machine's C library."""
    with open("/proc/self/statm", "rb") as file:
        pages = file.read().split()
    if runs == "wasm":  # its engine reserves address space by the gigabyte, and uses little of it
        _set(resource.RLIMIT_DATA, wanted + int(pages[5]) * resource.getpagesize())
    else:
        _set(resource.RLIMIT_AS, wanted + int(pages[0]) * resource.getpagesize())


def _set(kind: int, wanted: int, spare: int = 0) -> None:
    hard = resource.getrlimit(kind)[1]
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
        spare = min(spare, hard - wanted)
    resource.setrlimit(kind, (wanted, wanted + spare))


def _tasks_of(uid: int) -> int:
    """How many threads of `uid` there are: the kernel counts all of them against RLIMIT_NPROC."""
    count = 0
    for name in os.listdir("/proc"):
        if name.isdecimal():
            try:
                if os.stat(f"/proc/{name}").st_uid == uid:
                    count += len(os.listdir(f"/proc/{name}/task"))
            except OSError:
                continue  # it has ended meanwhile
    return count


# --- what it may write, and as whom it runs


def _fence(request: Request) -> None:
    """Forbid new rights, and writing elsewhere where the kernel can."""
    try:
        from instar.runner.landlock import restrict_writes
    except ImportError:  # a Python without ctypes
        print("instar: no ctypes here: the module is not held to its folders", file=sys.stderr)
        return
    _prctl(PR_SET_NO_NEW_PRIVS, 1)
    touches = request.module.touches
    own = [path for path in (request.data, os.getcwd(), "/dev/null") if path]
    restrict_writes([*own, *touches.write], touches.network)


def _ids(user: str) -> tuple[int, int]:
    """The user's numbers; our own for ''. Raises MachineError `no-user`."""
    if not user:
        return os.geteuid(), os.getegid()
    import pwd

    try:
        entry = pwd.getpwnam(user)
    except KeyError:
        raise MachineError("no-user", f"cannot run as user {user}: there is none of that name") from None
    if entry.pw_uid != os.geteuid() and os.geteuid() != 0:
        raise MachineError("no-user", f"cannot run as user {user}: expected to be started as root")
    return entry.pw_uid, entry.pw_gid


def _held(folder: str) -> str:
    """A path to `folder` that stays good when the way to it is closed to us."""
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise MachineError("not-loadable", f"cannot open {folder}: {error.strerror}") from error
    return f"/proc/self/fd/{fd}"


def _give(folder: str, uid: int, gid: int) -> None:
    """Make `folder` and what is in it the user's, links themselves and not what they point to."""
    if os.stat(folder).st_uid == uid:
        return
    for top, folders, files in os.walk(folder, topdown=False):
        for name in (*folders, *files):
            os.chown(f"{top}/{name}", uid, gid, follow_symlinks=False)
    os.chown(folder, uid, gid)


def _become(user: str, uid: int, gid: int) -> None:
    try:
        os.initgroups(user, gid)
        os.setgid(gid)
        os.setuid(uid)
    except OSError as error:
        raise MachineError("no-user", f"cannot run as user {user}: {error.strerror}") from error


def _prctl(option: int, value: int) -> None:
    global _libc
    try:
        import ctypes
    except ImportError:
        return
    _libc = _libc or ctypes.CDLL(None)  # each new one makes a class of its own
    _libc.prctl(option, value, 0, 0, 0)

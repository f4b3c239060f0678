"""A stand-in for the runner process, cold and warm, that speaks the control line and runs the code it is given.

args {"code": "<Python>"}: run with `say(message)`, `hear() -> message | None`, `request`, `reply`
"""

import array
import json
import os
import select
import signal
import socket
import sys


def main():
    os.umask(0o077)
    if sys.argv[1:] == ["--warm"]:
        serve()
    else:
        sys.exit(work())


def work():
    line = os.fdopen(os.dup(3), "rb", buffering=0)

    def say(message):
        data = message if isinstance(message, bytes) else json.dumps(message).encode() + b"\n"
        while data:
            data = data[os.write(3, data) :]

    def hear():
        raw = b""
        while not raw.endswith(b"\n"):
            byte = line.read(1)
            if not byte:
                return None
            raw += byte
        return json.loads(raw)

    request = hear()
    if request is None:
        return 0
    os.chdir(request["cwd"])
    names = {"say": say, "hear": hear, "request": request, "reply": {}, "os": os, "sys": sys}
    try:
        exec(request["args"].get("code", ""), names)
    except SystemExit as error:
        return error.code
    except Exception as error:  # noqa: BLE001 - the test's code may raise anything
        say({"ok": False, "error": {"code": "module-failed", "text": repr(error)}})
        return 1
    if names["reply"] is not None:
        say({"ok": True, "reply": names["reply"]})
    return 0


def serve():
    line = socket.socket(fileno=3)
    woken, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    numbers = {}
    poll = select.poll()
    poll.register(3, select.POLLIN)
    poll.register(woken, select.POLLIN)
    while True:
        ready = [fd for fd, _ in poll.poll()]
        if 3 in ready:
            raw, extra, _, _ = line.recvmsg(4096, 64, socket.MSG_CMSG_CLOEXEC)
            if not raw:
                return
            fds = array.array("i")
            for _, _, data in extra:
                fds.frombytes(data)
            number = json.loads(raw)["n"]
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                os.setsid()
                control, errors, *entrance = fds
                for cgroup in entrance:
                    os.write(cgroup, b"0")
                line.detach()
                os.dup2(control, 3)
                os.dup2(errors, 1)
                os.dup2(errors, 2)
                os.closerange(4, 64)
                status = 1
                try:
                    status = work()
                finally:
                    sys.stderr.flush()
                    os._exit(status or 0)
            for fd in fds:
                os.close(fd)
            numbers[pid] = number
            line.send(json.dumps({"n": number, "pid": pid}).encode())
        if woken in ready:
            os.read(woken, 100)
            report(line, numbers)


def report(line, numbers):
    """Tell of all that have ended."""
    while numbers:
        pid, status, usage = os.wait4(-1, os.WNOHANG)
        if not pid:
            return
        message = {"n": numbers.pop(pid), "pid": pid, "status": status, "max_rss": usage.ru_maxrss * 1024}
        line.send(json.dumps({**message, "cpu_s": usage.ru_utime + usage.ru_stime}).encode())


if __name__ == "__main__":
    main()

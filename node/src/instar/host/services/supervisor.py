"""supervisor: a program for each role, which is the launcher itself."""

from __future__ import annotations

from instar.host.services.base import Manager, call

UP = ("RUNNING", "STARTING", "BACKOFF")
UNKNOWN = "no such"  # process, or group


class Supervisor(Manager):
    """Programs `instar-<role>` of the machine's supervisord (cli/scripts.py)."""

    name = "supervisor"

    def restart(self, role: str) -> None:
        self.end_strays(role)
        if self._state(role) not in UP:
            self.start(role)
            return
        old = self.recorded(role)
        self._ctl("restart", role)
        self.end(old)

    def stop(self, role: str) -> None:
        old = self.recorded(role)
        if self._state(role) in UP:
            self._ctl("stop", role)
        self.end(old)
        self.end_strays(role)

    def start(self, role: str) -> None:
        """The first start makes the program known: only ours, not what others may have written meanwhile."""
        state = self._state(role)
        if not state:
            self._ctl("reread")
            self._ctl("add", role)  # and supervisord starts it
        elif state not in UP:
            self._ctl("start", role)

    def _state(self, role: str) -> str:
        """In supervisor's words; '' when it knows no such program."""
        said = call(["supervisorctl", "status", f"instar-{role}"], f"ask for the {role}", good=(0, 3, 4))
        words = said.split()
        return "" if UNKNOWN in said or len(words) < 2 else words[1]

    def _ctl(self, verb: str, *roles: str) -> None:
        doing = f"{verb} the {roles[0]}" if roles else verb
        call(["supervisorctl", verb, *(f"instar-{role}" for role in roles)], doing)

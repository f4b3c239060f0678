"""Transactions that write no image: back to the other slot, and the proof that the firmware starts what runs."""

from __future__ import annotations

from instar.core.errors import MachineError
from instar.core.journal import Progress, Reason
from instar.engine.target import Failed, Outcome
from instar.host.boot import esp
from instar.host.boot.slots import other
from instar.targets.slots.install import Install

ROLLBACK, COLD_BOOT = "rollback", "cold-boot"
CAUSES = (ROLLBACK, COLD_BOOT)


class Ways:
    """`stage` and `verify` of these: they only look."""

    def __init__(self, install: Install) -> None:
        self.install, self.ledger, self.platform = install, install.ledger, install.platform

    def stage(self, progress: Progress) -> Outcome:
        """Raises Failed `nothing-to-roll-back-to`, `nothing-to-fall-back-to`, `not-running`."""
        begin, running = progress.begin, self.ledger.running()
        proof = begin.cause == COLD_BOOT
        slot = running if proof else other(running)
        if self.ledger.record(slot).digest != begin.digest:
            found = self.ledger.record(slot).name or "nothing"
            text = f"expected slot {slot} to hold {begin.release.name}, got {found}"
            raise Failed(Reason("not-running" if proof else "nothing-to-roll-back-to", text), blame=False)
        if not self.ledger.usable(other(running)):
            code = "nothing-to-fall-back-to" if proof else "nothing-to-roll-back-to"
            state = self.ledger.record(other(running)).state
            text = f"expected a whole system in slot {other(running)}, got one that is {state}, or has no kernel image"
            raise Failed(Reason(code, text), blame=False)
        deny: list[str] = []
        if bundle := self.ledger.manifest(slot):
            deny = list(bundle.deny_kexec)
        return Outcome({"slot": slot, "deny_kexec": deny})

    def verify(self, progress: Progress) -> Outcome:
        """What is to be started, and for a proof what is fallen back to, as the disk has it."""
        slot, tx = str(progress.data["slot"]), progress.begin.tx
        for each in (slot, other(slot)) if progress.begin.cause == COLD_BOOT else (slot,):
            self._check(each, tx)
        return Outcome()

    def _check(self, slot: str, tx: str) -> None:
        bundle = self.ledger.manifest(slot)
        if bundle is not None:
            try:
                kernel = bundle.image("kernel")
                esp.check_file(self.platform.boot.kernel(slot), kernel.size, kernel.sha256)
                self.install.read_back(slot, bundle, tx)
            except MachineError as error:
                # Its kernel image stays: what is damaged may still be better than nothing to fall back to.
                if error.code == "not-as-written" and slot != self.ledger.running():
                    self.ledger.mark(slot, state="bad", why=error.text)
                raise
        elif not self.ledger.record(slot).is_first:
            raise MachineError("no-manifest", f"cannot check slot {slot}: the manifest of its bundle is gone")
        elif not self.ledger.is_as_adopted(slot):
            text = f"cannot trust slot {slot}: its kernel image is not the one that was noted when it ran"
            raise MachineError("not-as-written", text)

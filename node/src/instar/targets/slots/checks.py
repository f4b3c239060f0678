"""What speaks against a system update, found out before anything is written."""

from __future__ import annotations

from instar.core.errors import TrustError
from instar.core.journal import Begin, Reason
from instar.core.releases import version_key
from instar.engine.target import Failed
from instar.host.boot.slots import Slot
from instar.targets.kit import TrustedTarget
from instar.targets.slots.platform import Platform
from instar.targets.slots.records import SlotRecord
from instar.trust.bundle import KIND, Bundle


def check_state(begin: Begin, running: SlotRecord) -> Reason | None:
    """Whether the system that runs lets its neighbour be overwritten. What was overridden, for the history.

    Raises Failed `already-running`, `on-trial`, `cold-boot-not-seen`.
    """
    if running.digest == begin.digest:
        text = f"expected another system than the one that runs, got {begin.release.name}"
        raise Failed(Reason("already-running", text), blame=False)
    if running.state == "trial":
        text = f"{running.version} runs on trial: the other slot is its way back"
        raise Failed(Reason("on-trial", text), blame=False)
    if running.state != "good" or running.cold_boot_seen:
        return None
    text = f"the firmware has not started {running.version} yet, only kexec: the other slot is its way back"
    if not begin.override:
        raise Failed(Reason("cold-boot-not-seen", text), blame=False)
    return Reason("overridden", f"{text}; overwritten, as ordered")


def check_promise(begin: Begin, target: TrustedTarget) -> None:
    """Raises TrustError `wish-differs` unless what is signed is what is wanted."""
    wanted = {"kind": KIND, "version": begin.version, "digest": begin.digest}
    for name, want in wanted.items():
        signed = target.custom.get(name)
        if signed != want:
            text = f"{begin.target}: expected {name} {want}, the signed metadata says {signed}"
            raise TrustError("wish-differs", text)


def check_bundle(bundle: Bundle, platform: Platform, slot: Slot, running: SlotRecord, oldest: str) -> None:
    """Whether the bundle is for this machine, as it is now, and not older than `oldest` ('': any).

    Raises Failed `too-old-bundle`, `wrong-hardware`, `too-old-system`, `slot-too-small`.
    """
    if oldest and version_key(bundle.version) < version_key(oldest):
        text = f"expected a bundle of version {oldest} at least, got {bundle.version}"
        raise Failed(Reason("too-old-bundle", text), blame=False)
    if bundle.arch != platform.arch or not set(bundle.compatible) & set(platform.hardware):
        mine, its = "/".join(platform.hardware), "/".join(bundle.compatible)
        text = f"expected a bundle for {platform.arch} {mine}, got {bundle.arch} {its}"
        raise Failed(Reason("wrong-hardware", text))
    least = bundle.min_version
    if least and (not running.version or version_key(running.version) < version_key(least)):
        text = f"expected the system to be {least} at least, it is {running.version or 'unknown'}"
        raise Failed(Reason("too-old-system", text), blame=False)
    if (size := bundle.image("root").size) > slot.size:
        raise Failed(Reason("slot-too-small", f"expected a slot of {size} bytes, got {slot.size}"))

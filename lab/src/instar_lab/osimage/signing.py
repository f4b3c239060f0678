"""Keys for Secure Boot, and images signed with them. They open nothing: every lab makes its own."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from instar_lab.osimage.packages import run

ROLES = ("PK", "KEK", "db")
OWNER = "6d1d7a56-9f0c-4c52-8d3c-2f1f5e1f0a11"  # who says in the firmware's databases that a key is his
DAYS = 3650


class Keys(NamedTuple):
    """`folder` holds `<role>.key` and `<role>.pem` of each role."""

    folder: Path

    def key(self, role: str) -> Path:
        return self.folder / f"{role}.key"

    def certificate(self, role: str) -> Path:
        return self.folder / f"{role}.pem"


def keys(folder: Path) -> Keys:
    """Those in `folder`, made where there are none. Raises MachineError `no-packages`."""
    folder.mkdir(parents=True, exist_ok=True)
    made = Keys(folder)
    for role in ROLES:
        if not made.certificate(role).exists():
            run(
                "openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", str(DAYS), "-subj",
                f"/CN=Instar lab {role}/", "-keyout", str(made.key(role)), "-out", str(made.certificate(role)),
            )  # fmt: skip
    return made


def sign(image: Path, by: Keys) -> None:
    """Sign a PE image in place, with the key that the firmware trusts for what it starts."""
    run(
        "sbsign", "--key", str(by.key("db")), "--cert", str(by.certificate("db")), "--output", str(image), str(image)
    )  # fmt: skip


def sign_kernel(image: Path, by: Keys) -> None:
    """The same for a kernel of Debian's: its own signature goes first, for kexec under lockdown looks at one alone."""
    run("sbattach", "--remove", str(image))
    sign(image, by)

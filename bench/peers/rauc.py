"""RAUC from Debian beside us: where it is not installed, its packages are unpacked into the cache and run there."""

from __future__ import annotations

import datetime
import os
import shutil
import subprocess
import sys
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from bench.peers.apart import Apart, PeerUnavailable, last_line, usable
from instar.core.errors import MachineError
from instar_lab.osimage.packages import unpacked

NAME = "RAUC"
PROGRAMS = ("rauc", "mksquashfs", "dbus-daemon")
PACKAGES = (
    "rauc", "squashfs-tools", "dbus-daemon", "libjson-glib-1.0-0", "libglib2.0-0", "libdbus-1-3", "libapparmor1",
    "libexpat1", "liblzo2-2",
)  # fmt: skip
START_S, BUNDLE_S = 60.0, 600.0
COMPRESSION = "-comp zstd"  # its default, gzip, takes twice as long to install
MANIFEST = """[update]
compatible=bench
version=1
[bundle]
format=plain
[image.rootfs]
filename=root.img
"""


def environment(cache: Path) -> dict[str, str]:
    """With which RAUC's programs are found. Raises PeerUnavailable."""
    if all(shutil.which(program) for program in PROGRAMS):
        return dict(os.environ)
    try:
        tree = unpacked(PACKAGES, usable(cache, NAME))
    except MachineError as error:
        raise PeerUnavailable("peer-install", f"cannot install {NAME}: {error.text}") from error
    libraries = ":".join(
        str(path) for below in ("lib", "usr/lib") for path in (tree / below).glob("*-linux-gnu")
    )
    path = f"{tree / 'usr/bin'}:{os.environ.get('PATH', os.defpath)}"
    return {**os.environ, "PATH": path, "LD_LIBRARY_PATH": libraries}


def make_bundle(image: Path, out: Path, cache: Path) -> None:
    """A signed bundle of `image`, and the certificate `<out>.pem` that it is checked with. Raises PeerUnavailable."""
    folder = out.with_suffix(".content")
    shutil.rmtree(folder, ignore_errors=True)
    out.unlink(missing_ok=True)
    folder.mkdir()
    os.link(image, folder / "root.img")
    (folder / "manifest.raucm").write_text(MANIFEST)
    key, certificate = _keys(out)
    words = ["rauc", "bundle", f"--cert={certificate}", f"--key={key}", f"--mksquashfs-args={COMPRESSION}"]
    try:
        done = subprocess.run(
            [*words, str(folder), str(out)], env=environment(cache), capture_output=True, text=True,
            timeout=BUNDLE_S, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PeerUnavailable("peer-failed", f"cannot measure {NAME}: {error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if done.returncode != 0:
        raise PeerUnavailable("peer-failed", f"cannot measure {NAME}: {last_line(done.stderr)}")


def _keys(out: Path) -> tuple[Path, Path]:
    key, name = (
        ec.generate_private_key(ec.SECP256R1()),
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "bench")]),
    )
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1)).not_valid_after(now + datetime.timedelta(days=9))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )  # fmt: skip
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    paths = out.with_suffix(".key"), out.with_suffix(".pem")
    for path, data in zip(paths, (private, made.public_bytes(serialization.Encoding.PEM)), strict=True):
        path.write_bytes(data)
    return paths


class Rauc(Apart):
    """Its service on a bus of its own; the words are those of `rauc_inside`. Needs root, for its loop mounts."""

    def __init__(self, bundle: Path, slot: Path, cache: Path) -> None:
        super().__init__(NAME, START_S)
        shutil.copy(bundle.with_suffix(".pem"), self.folder / "cert.pem")
        self.begin(
            [sys.executable, "-m", "bench.peers.rauc_inside", str(self.folder), str(bundle), str(slot)],
            environment(cache),
        )

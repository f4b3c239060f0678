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
# As `rauc bundle` packs when nothing is said, and as it installs fastest: what mksquashfs is told.
COMPRESSIONS = {"gzip": "", "zstd": "-comp zstd"}
VALID_DAYS = 3650
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


def make_bundles(image: Path, folder: Path, cache: Path) -> list[Path]:
    """A signed bundle of `image` for each compression, named so; kept in `folder`, with the certificate `cert.pem`
    that they are checked with. Raises PeerUnavailable."""
    out = [folder / f"{name}.raucb" for name in COMPRESSIONS]
    whole = folder / "whole"
    if whole.exists():
        return out
    print(f"building bundles of {NAME}: this takes some minutes, once", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    content = folder / "content"
    content.mkdir(parents=True)
    os.link(image, content / "root.img")
    (content / "manifest.raucm").write_text(MANIFEST)
    key, certificate = _keys(folder)
    words = ["rauc", "bundle", f"--cert={certificate}", f"--key={key}"]
    for bundle, compression in zip(out, COMPRESSIONS.values(), strict=True):
        said = [f"--mksquashfs-args={compression}"] if compression else []
        _run([*words, *said, str(content), str(bundle)], cache)
    shutil.rmtree(content)
    whole.touch()  # written last, so that an interrupted run does not count
    return out


def _run(words: list[str], cache: Path) -> None:
    try:
        done = subprocess.run(
            words, env=environment(cache), capture_output=True, text=True, timeout=BUNDLE_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PeerUnavailable("peer-failed", f"cannot measure {NAME}: {error}") from error
    if done.returncode != 0:
        raise PeerUnavailable("peer-failed", f"cannot measure {NAME}: {last_line(done.stderr)}")


def _keys(folder: Path) -> tuple[Path, Path]:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "bench")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
        .serial_number(x509.random_serial_number()).not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=VALID_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )  # fmt: skip
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    paths = folder / "key.pem", folder / "cert.pem"
    for path, data in zip(paths, (private, made.public_bytes(serialization.Encoding.PEM)), strict=True):
        path.write_bytes(data)
    return paths


class Rauc(Apart):
    """Its service on a bus of its own; the words are those of `rauc_inside`. Needs root, for its loop mounts."""

    def __init__(self, bundles: list[Path], slot: Path, cache: Path) -> None:
        super().__init__(NAME, START_S)
        shutil.copy(bundles[0].with_name("cert.pem"), self.folder / "cert.pem")
        words = [sys.executable, "-m", "bench.peers.rauc_inside", str(self.folder), str(slot)]
        self.begin([*words, *map(str, bundles)], environment(cache))

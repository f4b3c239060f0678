"""`instarctl release`: pack, sign and publish releases. All but `current` and `publish` work offline."""

from __future__ import annotations

import base64
import binascii
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Protocol

import typer
from tuf.api.metadata import Root as RootMetadata

from instar.core.errors import InputError, TrustError
from instar.trust import bundle as bundles
from instar_server.ctl import ids
from instar_server.ctl.output import Options, connected, plain_errors, progress_bar, refuse
from instar_server.ctl.papers import (
    AsJson,
    PassphraseFile,
    asker,
    in_days,
    read,
    say,
    when,
    write,
)
from instar_server.trust import keys, offline, pack, rules
from instar_server.trust.bundle import describe
from instar_server.trust.offline import Signed

app = typer.Typer(
    no_args_is_help=True,
    help="""Releases: from a built instar.pyz to the nodes.

    The walk: `pack` makes the archive; `current` fetches the targets metadata that is served; `add` lists
    the archive in its next version; each key holder runs `sign` (or `payload` and `attach`, with the key in
    another program or token); `verify` shows what is missing; `publish` uploads both.
    """,
    rich_markup_mode="markdown",
)
SIGNATURE_SIZE = 64  # bytes
Root = Annotated[Path, typer.Option(help="The current root.json, which says whose signatures count.")]
Document = Annotated[Path, typer.Argument(help="Targets (or root) metadata to work on.")]


class Uploads(Protocol):
    """What `publish` needs of `instar_server.ctl.client.Client`."""

    def upload(self, path: str, file: Path, progress: Any = None) -> Any: ...

    def put_bytes(self, path: str, data: bytes, content_type: str = "application/json") -> Any: ...


@app.command(name="pack")
def pack_command(
    program: Annotated[Path, typer.Argument(help="The built instar.pyz.")],
    out: Annotated[Path, typer.Option(help="Folder for the archive.")] = Path(),
    version: Annotated[
        str | None, typer.Option(help="Its version; by default what the program says.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make the release archive: manifest.json and instar.pyz. The same program gives the same bytes."""
    with plain_errors(as_json):
        release = pack.pack_release(read(program), version or program_version(program))
        path = out / Path(release.path).name
        write(path, release.archive)
        say(
            as_json,
            {
                "archive": str(path),
                "target": release.path,
                "sha256": release.sha256,
                "custom": release.custom,
            },
            [
                f"wrote {path} ({len(release.archive):,} bytes)",
                f"target   {release.path}",
                f"sha256   {release.sha256}",
                f"program  {release.custom['program_digest']}",
            ],
        )


def program_version(path: Path) -> str:
    """The version that a built program states. Raises InputError `no-version`."""
    try:
        with zipfile.ZipFile(path) as archive:
            match = pack.VERSION_LINE.search(archive.read("instar/version.py"))
    except (zipfile.BadZipFile, KeyError, OSError) as error:
        raise InputError(
            "no-version", f"cannot find the version of {path}: {error}; give --version"
        ) from error
    if match is None:
        raise InputError("no-version", f"cannot find the version of {path}: give --version")
    return match[1].decode()


@app.command()
def add(
    archive: Annotated[
        Path,
        typer.Argument(
            help="The archive that `pack` made, a recovery core (instar-recovery.pyz), or a system bundle."
        ),
    ],
    targets: Annotated[Path, typer.Option(help="The current targets.json.")],
    out: Annotated[Path, typer.Option(help="Where to write the next, unsigned targets metadata.")],
    days: Annotated[float, typer.Option(help="How long the signatures will be good.")] = 90,
    as_json: AsJson = False,
) -> None:
    """List a release in the next version of the targets metadata. Nothing is signed yet."""
    with plain_errors(as_json):
        listed = listed_of(archive)
        data = offline.add_target(
            read(targets), listed.path, listed.length, listed.sha256, listed.custom, in_days(days)
        )
        write(out, data)
        version = offline.parse_signable(data).signed.version
        say(
            as_json,
            {"out": str(out), "version": version, "target": listed.path},
            [f"wrote {out}: targets version {version} with {listed.path}", "now sign it: release sign"],
        )


@app.command()
def sign(
    document: Document,
    key: Annotated[list[Path], typer.Option(help="Private key (NAME.key); may be given several times.")],
    root: Root,
    passphrase_file: PassphraseFile = None,
    as_json: AsJson = False,
) -> None:
    """Add signatures to the document, in place. A key that does not count for it is refused."""
    with plain_errors(as_json):
        data, trusted = read(document), read(root)
        ask = asker(passphrase_file)
        for path in key:
            data = offline.sign(data, keys.load(path, ask), [trusted])
        write(document, data)
        _say_state(document, offline.state(data, trusted), as_json)


@app.command()
def payload(
    document: Document,
    out: Annotated[Path, typer.Option(help="Where to write the bytes.")],
    as_json: AsJson = False,
) -> None:
    """Write the exact bytes to sign, for a key that lives in another program or token.

    For example: openssl pkeyutl -sign -rawin -inkey KEY -in BYTES -out SIGNATURE
    """
    with plain_errors(as_json):
        data = offline.payload(read(document))
        write(out, data)
        say(as_json, {"out": str(out), "length": len(data)}, [f"wrote {out}: sign these {len(data):,} bytes"])


@app.command()
def attach(
    document: Document,
    keyid: Annotated[str, typer.Option(help="Id, or its start, of the key that signed.")],
    signature: Annotated[Path, typer.Option(help="The signature: 64 raw bytes, hexadecimal or base64.")],
    root: Root,
    as_json: AsJson = False,
) -> None:
    """Add a signature that was made elsewhere. It is verified first; a wrong one changes nothing."""
    with plain_errors(as_json):
        trusted = read(root)
        data = offline.attach(read(document), keyid, decode_signature(read(signature)), [trusted])
        write(document, data)
        _say_state(document, offline.state(data, trusted), as_json)


def decode_signature(data: bytes) -> bytes:
    """64 raw bytes from raw, hexadecimal or base64. Raises InputError `bad-signature-file`."""
    if len(data) == SIGNATURE_SIZE:
        return data
    text = data.strip()
    for decode in (bytes.fromhex, lambda value: base64.b64decode(value, validate=True)):
        try:
            raw = decode(text.decode("ascii"))
        except (ValueError, binascii.Error):
            continue
        if len(raw) == SIGNATURE_SIZE:
            return raw
    raise InputError(
        "bad-signature-file",
        f"cannot read the signature: expected 64 bytes raw, in hexadecimal or in base64, got {len(data)} bytes",
    )


@app.command()
def verify(document: Document, root: Root, as_json: AsJson = False) -> None:
    """Show who has signed and what is missing; the status is 3 unless enough have."""
    with plain_errors(as_json):
        data, trusted = read(document), read(root)
        state = offline.state(data, trusted)
        try:
            rules.check_signatures(
                offline.parse_signable(data), rules.parse(trusted, RootMetadata).signed, str(root)
            )
        except TrustError as error:
            if not as_json:
                _say_state(document, state, as_json)
            refuse(error, as_json, _told(document, state))
        _say_state(document, state, as_json)


def _say_state(document: Path, state: Signed, as_json: bool) -> None:
    say(
        as_json,
        _told(document, state),
        [
            f"{document}: {state.role} version {state.version}, good until {when(state.expires)}",
            f"signed by {len(state.signed)} of the {state.threshold} that are needed: "
            + (" ".join(keyid[:12] for keyid in state.signed) or "nobody"),
        ],
    )


def _told(document: Path, state: Signed) -> dict[str, Any]:
    return {"document": str(document), **asdict(state)}


Server = Annotated[str | None, typer.Option(help="https://host:port of the API.")]
TokenFile = Annotated[Path | None, typer.Option(help="File with the API token.")]
Authority = Annotated[Path | None, typer.Option(help="CA certificate of the API.")]


@app.command()
def current(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="Folder for root.json and targets.json.")] = Path(),
    server: Server = None,
    token_file: TokenFile = None,
    ca: Authority = None,
    as_json: AsJson = False,
) -> None:
    """Fetch the root and targets metadata that the server serves now."""
    with connected(context, Options(server, token_file, ca)) as client:
        names = ("root.json", "targets.json")
        for name in names:
            write(out / name, client.get_bytes(f"/trust/metadata/{name}"))
        say(
            as_json, {"files": [str(out / name) for name in names]}, [f"wrote {out / name}" for name in names]
        )


@app.command()
def publish(
    context: typer.Context,
    document: Annotated[Path, typer.Argument(help="The signed targets metadata.")],
    archive: Annotated[
        list[Path] | None, typer.Option(help="Archives that it lists and the server lacks.")
    ] = None,
    server: Server = None,
    token_file: TokenFile = None,
    ca: Authority = None,
    as_json: AsJson = False,
) -> None:
    """Upload the archives, then the signed metadata. From then on nodes may be told to want the release.

    Publishing twice is no error. Signed root metadata is published the same way.
    """
    with connected(context, Options(server, token_file, ca)) as client:
        published = upload(client, read(document), archive or [], quiet=as_json)
        lines = [f"{role} version {version}" for role, version in published.items()]
        say(as_json, {"published": published}, ["published:", *(f"  {line}" for line in lines)])


@app.command()
def parcel(
    context: typer.Context,
    version: Annotated[str, typer.Argument(help="A published version.")],
    out: Annotated[Path, typer.Option(help="Where to write it.")],
    recovery: Annotated[bool, typer.Option("--recovery", help="The recovery core of that version.")] = False,
    server: Server = None,
    token_file: TokenFile = None,
    ca: Authority = None,
    as_json: AsJson = False,
) -> None:
    """Fetch the parcel of a release: all that a node needs to install it without reaching the server."""
    with connected(context, Options(server, token_file, ca)) as client:
        kind = "recovery" if recovery else "node"
        sha384 = client.download(f"/releases/{ids.version(version)}/parcel", out, kind=kind)
        length = out.stat().st_size
        say(
            as_json,
            {"path": str(out), "length": length, "sha384": sha384},
            [f"wrote {out} ({length:,} bytes)", f"sha384   {sha384}"],
        )


class Listed(NamedTuple):
    """What targets metadata say of a file: target path, length in bytes, SHA-256, custom."""

    path: str
    length: int
    sha256: str
    custom: dict[str, Any]


def listed_of(path: Path) -> Listed:
    """What is signed of a file of any kind, checked. A system bundle is too large to be held: it is read in pieces.

    Raises InputError `no-file`, `bad-release`, `bad-bundle`, MachineError `disk-failed`.
    """
    try:
        with path.open("rb") as file:
            start = file.read(len(bundles.MAGIC))
    except OSError as error:
        raise InputError("no-file", f"cannot read {path}: {error.strerror}") from error
    if start == bundles.MAGIC:
        return Listed(*describe(path))
    release = pack.release_of(read(path), path.name)
    return Listed(release.path, len(release.archive), release.sha256, release.custom)


def upload(client: Uploads, document: bytes, archives: list[Path], quiet: bool) -> dict[str, Any]:
    """Upload blobs, then put the document; the versions that are served then. A bar for each unless `quiet`."""
    role = offline.parse_signable(document).signed.type
    for path in archives:
        listed = listed_of(path)
        with progress_bar(path.name, quiet) as progress:
            client.upload(f"/blobs/{listed.sha256}", path, progress)
    answer = client.put_bytes(f"/trust/{role}", document)
    return dict(answer)

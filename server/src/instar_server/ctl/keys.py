"""`instarctl keys`: make, show and change the keys that a fleet trusts. Works offline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from securesystemslib.signer import SSlibKey
from tuf.api.metadata import Root

from instar.core.errors import InputError
from instar.trust.embedded import fingerprint
from instar_server.ctl.output import plain_errors
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
from instar_server.trust import keys, offline, rules
from instar_server.trust.files import make_folder
from instar_server.trust.offline import RoleKeys

app = typer.Typer(
    no_args_is_help=True,
    help="""Keys that sign releases.

    Four roles: **root** says which keys count and changes rarely; **targets** signs releases; both need
    several people's keys and stay offline. **snapshot** and **timestamp** belong to the server.

    Start with `keys ceremony`. Later `keys rotate` replaces a key that was lost or stolen.
    """,
    rich_markup_mode="markdown",
)


@app.command()
def generate(
    name: Annotated[str, typer.Argument(help="Name of the key, such as root-4; letters, digits, - and _.")],
    out: Annotated[Path, typer.Option(help="Folder for NAME.key (mode 0600) and NAME.pub.json.")],
    online: Annotated[
        bool, typer.Option("--online", help="Without a passphrase, for a server's own key.")
    ] = False,
    passphrase_file: PassphraseFile = None,
    as_json: AsJson = False,
) -> None:
    """Make one ed25519 key. The .pub.json may be shown to anybody; the .key stays with its holder."""
    with plain_errors(as_json):
        passphrase = None if online else asker(passphrase_file, confirm=True)(name)
        key = keys.generate(out, name, passphrase)
        paths = keys.key_paths(out, name)
        say(
            as_json,
            {"keyid": key.keyid, "key": str(paths.private), "public": str(paths.public)},
            [f"made {paths.private} and {paths.public}", f"key id {key.keyid}"],
        )


@app.command()
def show(
    files: Annotated[list[Path], typer.Argument(help="NAME.pub.json files, or root metadata.")],
    as_json: AsJson = False,
) -> None:
    """Show public keys, or who may sign what by a root.json. Never opens a private key."""
    with plain_errors(as_json):
        shown = [_shown(path) for path in files]
        say(as_json, {"files": [value for value, _ in shown]}, [line for _, lines in shown for line in lines])


def _shown(path: Path) -> tuple[dict[str, Any], list[str]]:
    data = read(path)
    if b'"_type"' not in data:
        key = keys.parse_public(data, str(path))
        value = {"file": str(path), "keyid": key.keyid, "public": key.keyval["public"]}
        return value, [f"{path}", f"  key id  {key.keyid}", f"  public  {key.keyval['public']}"]
    root = rules.parse(data, Root).signed
    roles = {
        name: {"threshold": role.threshold, "keyids": list(role.keyids)} for name, role in root.roles.items()
    }
    expires = int(root.expires.timestamp())
    pin = fingerprint(json.loads(data))
    lines = [f"{path}: root version {root.version}, good until {when(expires)}", f"  pin        {pin}"]
    for name in rules.ROLES:
        ids = " ".join(keyid[:12] for keyid in root.roles[name].keyids)
        lines.append(f"  {name:<10} {root.roles[name].threshold} of {len(root.roles[name].keyids)}: {ids}")
    return {
        "file": str(path),
        "version": root.version,
        "expires": expires,
        "fingerprint": pin,
        "roles": roles,
    }, lines


@app.command()
def ceremony(
    out: Annotated[Path, typer.Option(help="New folder for everything that is made.")],
    holders: Annotated[int, typer.Option(help="Keys of root and of targets, each.", min=1, max=20)] = 3,
    threshold: Annotated[int, typer.Option(help="How many of them must sign.", min=1, max=20)] = 2,
    root_days: Annotated[float, typer.Option(help="How long the root is good.")] = 365,
    targets_days: Annotated[float, typer.Option(help="How long signed targets are good.")] = 90,
    passphrase_file: PassphraseFile = None,
    as_json: AsJson = False,
) -> None:
    """Make all keys of a new fleet, its first root.json and its first, empty targets.json.

    What it makes: root-1 … root-N and targets-1 … targets-N (encrypted; hand each to its holder and take
    it off this machine), online/ with the server's two keys, root.json and targets.json. Then:

        instar-server init --data DIR --host NAME --root OUT/root.json --online OUT/online
    """
    with plain_errors(as_json):
        if threshold > holders:
            raise InputError("bad-threshold", f"cannot make {holders} keys of which {threshold} must sign")
        if out.exists() and any(out.iterdir()):
            raise InputError("folder-not-empty", f"cannot make keys in {out}: it is not empty")
        expiries = in_days(root_days), in_days(targets_days)
        passphrase = asker(passphrase_file, confirm=True)("all offline keys")
        make_folder(out)
        roles = {
            role: _make_role(out / role, role, holders, threshold, passphrase) for role in ("root", "targets")
        }
        online = keys.generate_online(out / "online")
        roles |= {role: RoleKeys([key], 1) for role, key in online.items()}
        root = offline.first_root(roles, expiries[0])
        targets = offline.first_targets(expiries[1])
        for number in range(1, threshold + 1):
            root = offline.sign(
                root, keys.load(out / "root" / f"root-{number}.key", lambda _: passphrase), []
            )
            signer = keys.load(out / "targets" / f"targets-{number}.key", lambda _: passphrase)
            targets = offline.sign(targets, signer, [root])
        write(out / "targets.json", targets)
        write(out / "root.json", root)
        _, lines = _shown(out / "root.json")
        say(as_json, {"out": str(out), "root": _shown(out / "root.json")[0]}, lines)


def _make_role(folder: Path, role: str, holders: int, threshold: int, passphrase: bytes) -> RoleKeys:
    made: list[SSlibKey] = [
        keys.generate(folder, f"{role}-{number}", passphrase) for number in range(1, holders + 1)
    ]
    return RoleKeys(made, threshold)


@app.command()
def rotate(
    root: Annotated[Path, typer.Option(help="The current root.json.")],
    out: Annotated[Path, typer.Option(help="Where to write the next root.")],
    role: Annotated[str, typer.Option(help="root, targets, snapshot or timestamp.")] = "root",
    old: Annotated[str | None, typer.Option(help="Id, or its start, of the key that goes.")] = None,
    new: Annotated[Path | None, typer.Option(help="NAME.pub.json of the key that comes.")] = None,
    key: Annotated[list[Path] | None, typer.Option(help="Root keys (NAME.key) that sign at once.")] = None,
    days: Annotated[float, typer.Option(help="How long the next root is good.")] = 365,
    passphrase_file: PassphraseFile = None,
    as_json: AsJson = False,
) -> None:
    """Make the next root: with one key replaced, or (without --old and --new) only with a later expiry.

    It must be signed by enough keys of the current root and of itself; `release sign`, `release payload`
    and `release attach` add signatures later. A targets key is replaced in two steps: first publish
    targets signed by the old and the new keys, then the root.
    """
    with plain_errors(as_json):
        current = read(root)
        if (old is None) != (new is None):
            raise InputError("old-and-new", "cannot rotate: --old and --new belong together")
        if role not in rules.ROLES:
            raise InputError(
                "wrong-role", f"cannot rotate {role!r}: expected one of {', '.join(rules.ROLES)}"
            )
        if old is None or new is None:
            data = offline.next_root(current, {}, in_days(days))
        else:
            data = offline.replace_key(current, role, old, keys.load_public(new), in_days(days))
        ask = asker(passphrase_file)
        for path in key or []:
            data = offline.sign(data, keys.load(path, ask), [current])
        write(out, data)
        by_old, by_new = offline.state(data, current), offline.state(data, data)
        lacks = f"{by_old.missing} signatures of the current root's keys and {by_new.missing} of its own"
        say(
            as_json,
            {"out": str(out), "version": by_new.version, "missing": [by_old.missing, by_new.missing]},
            [
                f"wrote {out}: root version {by_new.version}, good until {when(by_new.expires)}",
                f"still needs {lacks}",
            ],
        )

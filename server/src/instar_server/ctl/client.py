"""One way to the server's API for every command: where it is, who asks, and errors as InstarError.

Where: options, else INSTARCTL_SERVER, INSTARCTL_TOKEN_FILE (or INSTARCTL_TOKEN), INSTARCTL_CA, else the
configuration file that `instarctl login` writes (INSTARCTL_CONFIG, by default
~/.config/instar/instarctl.toml).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import ssl
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from instar.core.errors import InputError, ServerRefused, ServerUnreachable, TrustError
from instar_server.trust.files import failed

CONNECT_S, ANSWER_S = 10.0, 60.0
EVENT_S = 45.0  # the server says something at least every 15 s
PAUSE_S = 1.0  # at least, before a broken stream of events is taken up again; at most half as much more
STREAM_S = 3600.0  # one stream is asked for no longer
BLOCK = 262_144  # bytes of an upload that are sent at once

Progress = Callable[[int, int], None]  # bytes done, bytes in all


@dataclass(frozen=True, slots=True)
class Access:
    """`server` is the API's URL, `ca` the path of its CA certificate ('' for plain HTTP or a public CA)."""

    server: str
    token: str
    ca: str = ""


def config_path(environment: Mapping[str, str] = os.environ) -> Path:
    named = environment.get("INSTARCTL_CONFIG")
    base = environment.get("XDG_CONFIG_HOME") or str(Path.home() / ".config")
    return Path(named) if named else Path(base) / "instar" / "instarctl.toml"


def find_access(
    server: str | None, token_file: Path | None, ca: Path | None, environment: Mapping[str, str] = os.environ
) -> Access:
    """Put together what was given. Raises InputError `no-server`, `no-token`, `bad-config`."""
    saved = _read_config(config_path(environment))
    url = server if server is not None else environment.get("INSTARCTL_SERVER") or saved.get("server", "")
    file = token_file or environment.get("INSTARCTL_TOKEN_FILE") or saved.get("token_file", "")
    authority = str(ca or environment.get("INSTARCTL_CA") or saved.get("ca", ""))
    if not url.startswith(("https://", "http://")):
        text = (
            f"cannot find the server: expected --server or INSTARCTL_SERVER as https://host:port, got {url!r}"
        )
        raise InputError("no-server", text)
    token = environment.get("INSTARCTL_TOKEN", "") if token_file is None else ""
    if not token and file:
        try:
            token = Path(file).read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError("no-token", f"cannot read the API token in {file}: {error}") from error
    if not token:
        raise InputError("no-token", "cannot ask the server: expected --token FILE or INSTARCTL_TOKEN_FILE")
    return Access(url.rstrip("/"), token, authority)


def _read_config(path: Path) -> dict[str, str]:
    try:
        values = tomllib.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError("bad-config", f"cannot read {path}: {error}") from error
    return {name: str(value) for name, value in values.items()}


class Client:
    """Calls below /api/v1. Every method raises ServerUnreachable and ServerRefused (with the server's code)."""

    def __init__(self, access: Access) -> None:
        verify: ssl.SSLContext | bool = True
        if access.ca:
            try:
                verify = ssl.create_default_context(cafile=access.ca)
            except (OSError, ssl.SSLError) as error:
                raise InputError("bad-ca", f"cannot read the CA certificate {access.ca}: {error}") from error
        self._http = httpx.Client(
            base_url=f"{access.server}/api/v1",
            headers={"Authorization": f"Bearer {access.token}"},
            verify=verify,
            timeout=httpx.Timeout(ANSWER_S, connect=CONNECT_S),
            trust_env=False,
        )

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_error: object) -> None:
        self._http.close()

    def get(self, path: str, **query: Any) -> Any:
        """The decoded JSON answer. Query values that are None are left out."""
        return self._json(self._ask("GET", path, params=_given(query)))

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        return self._json(self._ask("POST", path, json=body))

    def events(self, path: str, **query: Any) -> Iterator[dict[str, Any] | None]:
        """Server-sent events as they come; None now and then, when there was none. Ends when the server ends it."""
        try:
            with self._http.stream("GET", path, params=_given(query), timeout=EVENT_S) as answer:
                if not answer.is_success:
                    answer.read()
                    raise _refusal(answer)
                for line in answer.iter_lines():
                    if line.startswith("data: "):
                        yield json.loads(line.removeprefix("data: "))
                    elif line.startswith(":"):
                        yield None
        except httpx.TransportError as error:
            raise ServerUnreachable("unreachable", f"cannot reach {self._http.base_url}: {error}") from error
        except ValueError as error:
            raise ServerUnreachable("bad-answer", f"cannot read the server's events: {error}") from error

    def follow(self, path: str, until: float) -> Iterator[dict[str, Any] | None]:
        """`events` until it is `until` (time.monotonic). A stream that ends is taken up again, a server that is away
        is waited for; who has heard enough stops asking."""
        while (left := until - time.monotonic()) > 0:
            with contextlib.suppress(ServerUnreachable):
                for event in self.events(path, for_s=round(min(left, STREAM_S), 3)):
                    yield event
                    if time.monotonic() >= until:
                        return
            pause = PAUSE_S * (1.0 + random.random() / 2)
            time.sleep(max(0.0, min(pause, until - time.monotonic())))

    def put(self, path: str, body: Mapping[str, Any]) -> Any:
        return self._json(self._ask("PUT", path, json=body))

    def put_bytes(self, path: str, data: bytes, content_type: str = "application/json") -> Any:
        """Send exactly these bytes: signed metadata must not be written anew."""
        return self._json(self._ask("PUT", path, content=data, headers={"Content-Type": content_type}))

    def delete(self, path: str, **query: Any) -> Any:
        return self._json(self._ask("DELETE", path, params=_given(query)))

    def get_bytes(self, path: str, **query: Any) -> bytes:
        return self._ask("GET", path, params=_given(query)).content

    def download(self, path: str, file: Path, **query: Any) -> str:
        """Write what comes to `file`, a block at a time; its SHA-384, which is the one that the server named.

        Raises TrustError `altered-download`, MachineError; `file` is then as it was.
        """
        temporary = file.with_name(f".{file.name}.part")
        digest = hashlib.sha384()
        try:
            with self._http.stream("GET", path, params=_given(query)) as answer, temporary.open("wb") as out:
                if not answer.is_success:
                    answer.read()
                    raise _refusal(answer)
                for block in answer.iter_bytes(BLOCK):
                    digest.update(block)
                    out.write(block)
                stated = answer.headers.get("Instar-SHA384", "")
            if stated != digest.hexdigest():
                text = f"cannot use {path}: expected SHA-384 {stated[:24]}, got {digest.hexdigest()[:24]}"
                raise TrustError("altered-download", text)
            temporary.replace(file)
        except httpx.TransportError as error:
            raise ServerUnreachable("unreachable", f"cannot reach {self._http.base_url}: {error}") from error
        except OSError as error:
            raise failed("write", file, error) from error
        finally:
            temporary.unlink(missing_ok=True)
        return str(stated)

    def upload(self, path: str, file: Path, progress: Progress | None = None) -> Any:
        """Send a file as the body of a PUT, a block at a time."""
        size = file.stat().st_size
        headers = {"Content-Type": "application/octet-stream", "Content-Length": str(size)}
        return self._json(self._ask("PUT", path, content=_blocks(file, size, progress), headers=headers))

    def _ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        try:
            answer = self._http.request(method, path, **options)
        except httpx.TransportError as error:
            raise ServerUnreachable("unreachable", f"cannot reach {self._http.base_url}: {error}") from error
        if answer.is_success:
            return answer
        raise _refusal(answer)

    def _json(self, answer: httpx.Response) -> Any:
        try:
            return answer.json()
        except ValueError as error:
            raise ServerUnreachable("bad-answer", f"cannot read the server's answer: {error}") from error


def _given(query: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in query.items() if value is not None}


def _refusal(answer: httpx.Response) -> ServerUnreachable | ServerRefused:
    code, text = _error_of(answer)
    kind = ServerUnreachable if answer.status_code >= 500 or answer.status_code == 429 else ServerRefused
    return kind(code, text)


def _error_of(answer: httpx.Response) -> tuple[str, str]:
    try:
        error = json.loads(answer.content)["error"]
        return str(error["code"]), str(error["message"])
    except (ValueError, KeyError, TypeError):
        return "bad-answer", f"the server answered {answer.status_code} without saying why"


def _blocks(file: Path, size: int, progress: Progress | None) -> Iterator[bytes]:
    done = 0
    with file.open("rb") as stream:
        while block := stream.read(BLOCK):
            yield block
            done += len(block)
            if progress is not None:
                progress(done, size)

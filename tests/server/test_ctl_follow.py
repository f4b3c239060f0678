"""A command that follows something: streams that break, a server that is away, one that never ends."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from instar_server.ctl import client as ctl_client
from instar_server.ctl.client import Access, Client

PAUSE_S = 0.1
ENOUGH_S = 20.0


class Played(ThreadingHTTPServer):
    """Answers the n-th question with `answers[n]`, the last one from then on; a status or a stream's pieces."""

    daemon_threads = True

    def __init__(self, *answers: int | Callable[[], Iterator[bytes]]) -> None:
        self.answers, self.asked = answers, list[str]()
        super().__init__(("127.0.0.1", 0), _Handler)
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def access(self) -> Access:
        return Access(f"http://127.0.0.1:{self.server_address[1]}", "token")


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        played = self.server
        assert isinstance(played, Played)
        answer = played.answers[min(len(played.asked), len(played.answers) - 1)]
        played.asked.append(self.path)
        self.send_response(answer if isinstance(answer, int) else 200)
        self.end_headers()
        if isinstance(answer, int):
            return
        for piece in answer():
            try:
                self.wfile.write(piece)
            except OSError:
                return

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Played]]:
    monkeypatch.setattr(ctl_client, "PAUSE_S", PAUSE_S)
    made: list[Played] = []

    def play(*answers: int | Callable[[], Iterator[bytes]]) -> Played:
        made.append(Played(*answers))
        return made[-1]

    yield play
    for each in made:
        each.shutdown()
        each.server_close()


def says(number: int) -> Callable[[], Iterator[bytes]]:
    return lambda: iter([f'data: {{"n": {number}}}\n\n'.encode()])


def ticks() -> Iterator[bytes]:
    while True:
        yield b": nothing new\n\n"
        time.sleep(0.05)


def test_a_stream_that_ends_is_taken_up_again_after_a_pause(played: Callable[..., Played]) -> None:
    server = played(says(1), 503, says(2))
    began, heard = time.monotonic(), []
    with Client(server.access) as client:
        for event in client.follow("/x/events", began + ENOUGH_S):
            heard.append(event)
            if event == {"n": 2}:
                break
    assert heard == [{"n": 1}, {"n": 2}]
    assert len(server.asked) == 3
    assert time.monotonic() - began >= 2 * PAUSE_S
    assert server.asked[0].startswith("/api/v1/x/events?for_s=")


@pytest.mark.parametrize("answer", [ticks, 503, says(1)])
def test_it_ends_in_time_whatever_the_server_does(played: Callable[..., Played], answer: object) -> None:
    server = played(answer)
    until = time.monotonic() + 5 * PAUSE_S
    with Client(server.access) as client:
        for _ in client.follow("/x/events", until):
            pass
    assert 0.0 <= time.monotonic() - until < ENOUGH_S
    assert len(server.asked) <= 7  # a pause before each

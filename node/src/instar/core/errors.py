"""Errors, grouped by who is at fault, with codes that stay the same across processes.

A message reads 'cannot X: expected N, got M'; a code never changes once released.
"""

from __future__ import annotations


class InstarError(Exception):
    """Anything Instar refuses or cannot do. `code` is for machines, the text for people."""

    exit_status = 1

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code
        self.text = text

    def as_json(self) -> dict[str, str]:
        return {"code": self.code, "text": self.text}


class InputError(InstarError):
    """The caller's words, file or frame are wrong; nothing was changed."""

    exit_status = 2


class TrustError(InstarError):
    """Something is not what its signer signed, or not signed by whom we trust; nothing was changed."""

    exit_status = 3


class MachineError(InstarError):
    """This machine cannot do it: no space, a mount flag, a missing program, a failed call."""

    exit_status = 4


class ServerUnreachable(InstarError):
    """The server did not answer, or had a passing fault (429, 5xx). Decides nothing about a release."""

    exit_status = 5


class ServerRefused(InstarError):
    """The server answered and said no; its own code and words are kept."""

    exit_status = 6


class ReleaseError(InstarError):
    """The release itself is at fault: it does not start, hangs, or gives a wrong answer."""

    exit_status = 7

"""The numbers of sdk/instar_module.h for what a host's function cannot do, and the exception that carries one."""

from __future__ import annotations

from instar.core.errors import InstarError

OK, ABSENT, BAD_POINTER, BAD_ORDER, BAD_VALUE, REFUSED, FAILED, TOO_LARGE = 0, -1, -2, -3, -4, -5, -6, -7
QUIET = (ABSENT, REFUSED, FAILED)  # answers, not mistakes: the module decides what to make of them


class Wrong(Exception):
    """`number` goes back to the module. For a mistake, `code` and `text` become the error of the whole call."""

    def __init__(self, number: int, code: str = "module-failed", text: str = "") -> None:
        super().__init__(number, text)
        self.number = number
        self.code = code
        self.text = text

    def error(self, function: str) -> InstarError:
        return InstarError(
            self.code, f"{self.text} (in {function})" if self.text else f"cannot do {function}"
        )

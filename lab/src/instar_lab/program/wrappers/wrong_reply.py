"""The runner's selftest answers with a wrong answer; everything else works."""


def start(argv: list[str]) -> None:
    if argv[:1] != ["runner"]:
        return
    from instar.modules import selftest

    right = selftest.answer
    selftest.answer = lambda nonce, digest, version: right(nonce[::-1], digest, version)

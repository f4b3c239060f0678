"""Python modules in real runner processes: what good ones can do, and what becomes of bad ones."""

from __future__ import annotations

from tests.runner.conftest import SELFTEST, MakeModule, Runner


def test_x(runner: Runner, make_module: MakeModule) -> None:
    end = runner.run(SELFTEST, {"nonce": "ab" * 16})
    assert end.reply["version"] == "1.2.3"
    m = make_module(
        "demo",
        {
            "main.py": "def run(args, context):\n context.log('hi')\n context.progress(0.5)\n print('x')\n return {'a': args, 'n': context.name}\n"
        },
    )
    e = runner.run(m, {"q": 1})
    print(e)
    w = runner.warm()
    for i in range(10):
        e = w.run(m, {"q": i})
        assert e.reply
    print(e)
    assert w.close() == 0
    assert 0

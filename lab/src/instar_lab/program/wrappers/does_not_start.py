"""The agent and the updater end at once, as after an import that fails."""


def start(argv: list[str]) -> None:
    if argv[:1] in (["agent"], ["updater"]):
        raise ModuleNotFoundError("No module named 'instar.needed'", name="instar.needed")

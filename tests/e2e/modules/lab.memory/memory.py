"""A stateful service: what it was told stays told, however it ends."""

VERSION = "one"
state = {"sum": 0, "starts": 0}


def start(context):
    state.update(context.load() or {})
    state["starts"] += 1
    context.save(state)


def request(args, context):
    if args.get("die"):
        raise SystemExit(9)
    if args.get("add"):
        state["sum"] += args["add"]
        context.save(state)
    return {**state, "version": VERSION}

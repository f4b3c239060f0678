"""instarctl job run example.notes do=add text="rack 4, new disk" --node n-…"""

MOST = 100
notes = []
unsaved = False


def start(context):
    """Called once. State is what the last `save` kept, whoever ended this module and however."""
    notes.extend((context.load() or {}).get("notes", []))


def request(args, context):
    """Answers one job. Its errors are the job's; the service goes on."""
    global unsaved
    if args.get("do") == "add":
        notes.append(str(args["text"]))
        del notes[:-MOST]
        unsaved = True
    elif args.get("do") != "list":
        raise ValueError("cannot answer: expected do=add or do=list")
    return {"notes": notes}


def step(context):
    """Its own work, whenever it wants to; returns seconds until the next time."""
    save(context)
    return 10.0


def ready_to_stop(context):
    """Asked until it says yes, at most `stop_s` long. What must outlive the stop is saved by then."""
    save(context)
    return True


def health(context):
    return "" if len(notes) < MOST else "full: the oldest notes are dropped"


def save(context):
    global unsaved
    if unsaved:
        context.save({"notes": notes})
        unsaved = False

"""instarctl job run example.load minutes=5 --group web"""

from pathlib import Path

COLUMNS = {1: 0, 5: 1, 15: 2}


def run(args, context):
    minutes = args.get("minutes", 1)
    if minutes not in COLUMNS:
        raise ValueError(f"cannot tell the load: expected 1, 5 or 15 minutes, got {minutes!r}")
    up = float(Path("/proc/uptime").read_text().split()[0])
    load = float(Path("/proc/loadavg").read_text().split()[COLUMNS[minutes]])
    context.progress(0.5, "read")
    context.text(f"up {up / 86400:.1f} days, load {load:.2f}\n")
    return {"up_s": up, "load": load}

"""Appends a line to a file, so that a test can count how often a job ran."""

import os
import time


def run(args, context):
    file = os.open(args["file"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.write(file, f"{args['n']}\n".encode())
    os.close(file)
    for number in range(int(args.get("lines", 0))):
        context.log(f"line {number}")
        context.progress((number + 1) / args["lines"])
        time.sleep(0.1)
    time.sleep(args.get("seconds", 0.0))
    return {"n": args["n"]}

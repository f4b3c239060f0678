#!/usr/bin/env bash
# Write requirements/*.txt anew from requirements/*.in: every package with its hashes, for Python 3.11 and
# later. No host, address or path of this machine enters the files.
set -euo pipefail
cd "$(dirname "$0")/.."
command -v uv >/dev/null || { echo "make lock: needs uv (https://docs.astral.sh/uv/)" >&2; exit 1; }
for name in dev server; do
    constraint=()
    # What the server runs with is what the tests saw: the smaller lock never strays from the larger one.
    [ "$name" = server ] && constraint=(--constraint requirements/dev.txt)
    uv pip compile --quiet --generate-hashes --universal --python-version 3.11 --no-header --no-annotate \
        "${constraint[@]}" "$@" --output-file "requirements/$name.txt" "requirements/$name.in"
done

#!/usr/bin/env bash
# Make .venv: a virtual environment with exactly the packages of requirements/dev.txt (hash-checked) and the
# three distributions of this repository, editable. Does nothing when .venv already is what the lock says.
#
# Needs Python 3.11 or later. Uses uv where it is present (seconds) and pip where not (about a minute).
set -euo pipefail
cd "$(dirname "$0")/.."

lock=requirements/dev.txt
venv=.venv
packages=(node server lab)

fail() {
    printf 'make setup: %s\n' "$*" >&2
    exit 1
}

find_python() {
    local name
    for name in ${PYTHON:-python3.11 python3 python3.12 python3.13 python3.14}; do
        # A version manager's stand-in may be on PATH and yet start nothing: run it to see.
        if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
            command -v "$name"
            return
        fi
    done
    fail "cannot find Python 3.11 or later: on Debian 12, apt-get install python3 python3-venv"
}

make_venv() {
    local python=$1 minor
    rm -rf "$venv"
    if [ -n "$uv" ]; then
        "$uv" venv --quiet --python "$python" "$venv" && return
        uv=
    fi
    minor=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "cannot make a virtual environment: $python has no ensurepip; on Debian, apt-get install python$minor-venv"
    "$python" -m venv "$venv" || fail "cannot make a virtual environment with $python"
}

install_locked() {
    if [ -n "$uv" ]; then
        "$uv" pip sync --quiet --compile-bytecode --python "$venv/bin/python" --require-hashes "$lock"
        "$uv" pip install --quiet --offline --python "$venv/bin/python" --no-deps --no-build-isolation \
            "${packages[@]/#/-e./}"
    else
        local pip=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check)
        [ "$(id -u)" != 0 ] || pip+=(--root-user-action=ignore)
        "${pip[@]}" --require-hashes --requirement "$lock"
        "${pip[@]}" --no-index --no-deps --no-build-isolation "${packages[@]/#/-e./}"
    fi
}

uv=
[ -n "${NO_UV:-}" ] || uv=$(command -v uv || true)

# What decides the content of .venv, and where it stands: a venv that was moved is made again.
wanted=$({ pwd; cat "$lock" node/pyproject.toml server/pyproject.toml lab/pyproject.toml tools/setup.sh; } |
    sha256sum | cut -c1-16)
stamp=$venv/setup-$wanted
if [ -e "$stamp" ] && "$venv/bin/python" -c '' 2>/dev/null; then
    exit 0
fi

python=$(find_python)
printf 'setting up .venv (%s, %s) …\n' "$("$python" --version)" "$([ -n "$uv" ] && echo uv || echo pip)" >&2
make_venv "$python"
install_locked
touch "$stamp"

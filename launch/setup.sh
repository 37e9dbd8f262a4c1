# shellcheck shell=bash
# Sourced by quickstart.sh and test.sh: one virtual environment, .venv/ at the root of the repository.
#
#   setup NAME [EXTRAS]   installs cm3jax (with pyproject.toml's EXTRAS) in the versions of requirements.lock,
#                         unless the same was done before; NAME is "core" or "test", and "test" includes "core" and
#                         the programs of tests/references.txt.

fail() {
    echo "$0: $*" >&2
    exit 2
}

# Print the first Python >= 3.11 that has pip; PYTHON=... in the environment is tried first.
find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11 python; do
        if "$candidate" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
            echo "$candidate"
            return
        fi
    done
    fail "needs Python 3.11 or newer, found $(python3 --version 2>&1 || echo none);" \
        "install it, or name one: PYTHON=/path/to/python3.11 bash $0"
}

# Make .venv/; Debian's Python comes without ensurepip, but its pip can install into a bare environment.
make_venv() {
    local python
    python=$(find_python) || exit 2
    echo "Making .venv with $("$python" --version)" >&2
    if "$python" -c 'import ensurepip' >/dev/null 2>&1; then
        "$python" -m venv .venv
    else
        "$python" -m venv --without-pip .venv
        "$python" -m pip --python .venv/bin/python install --quiet pip ||
            fail "Python has neither ensurepip nor a pip of 22.3 or newer; install pip (Debian: python3-venv)"
    fi
}

setup() {
    local name=$1 extras=${2:-} stamp
    [ -x .venv/bin/python ] || make_venv
    stamp=$(cat requirements.txt requirements.lock pyproject.toml tests/references.txt | .venv/bin/python -c \
        'import hashlib, os, sys; print(hashlib.sha256(sys.stdin.buffer.read() + os.getcwd().encode()).hexdigest())')
    [ "$(cat ".venv/.installed-$name" 2>/dev/null)" = "$stamp" ] && return
    echo "Installing cm3jax${extras:+[$extras]} into .venv; once, a few minutes" >&2
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -c requirements.lock -e ".${extras:+[$extras]}" ||
        fail "the installation failed; its last lines above say why, and running this again continues"
    if [ "$name" = test ]; then
        rm -rf .venv/references
        .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --target .venv/references \
            -r tests/references.txt || fail "the installation of tests/references.txt failed; run this again"
    fi
    echo "$stamp" >.venv/.installed-core
    echo "$stamp" >".venv/.installed-$name"
}

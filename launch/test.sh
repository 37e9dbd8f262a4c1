#!/usr/bin/env bash
# Runs the tests on eight virtual devices, in two processes.
#
#   bash launch/test.sh [--setup-only] [--all] [arguments of pytest]
#
# Without --all: the fast tier, at most 10 minutes after the installation. With it: the slow tier too (the notebook, the
# digits, the quickstart, parity, kills), at most 45 minutes, and the coverage of cm3jax/; where there is a Java runtime,
# also the comparison with the Java tokenizer that captions are scored with elsewhere.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/setup.sh

setup test dev,tfds
if [ "${1:-}" = --setup-only ]; then exit; fi
tier=()
if [ "${1:-}" = --all ]; then
    shift
    tier=(--slow --cov=cm3jax --cov-report=term:skip-covered --cov-fail-under=90)
    if command -v java > /dev/null; then tier+=(--java); fi
fi
lint=0 tests=0
.venv/bin/ruff check && .venv/bin/ruff format --check || lint=$?
.venv/bin/python -m pytest -q -n 2 --dist loadfile --durations=10 ${tier[@]+"${tier[@]}"} "$@" || tests=$?
[ $lint = 0 ] || echo "test.sh: ruff found something; its words stand above the tests" >&2
exit $((tests ? tests : lint))

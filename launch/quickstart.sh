#!/usr/bin/env bash
# Trains a small CM3Leon from nothing on this machine and scores it; the result is runs/quickstart/.
#
#   bash launch/quickstart.sh [--setup-only] [flags of `cm3jax run`, such as --out DIR]
#
# Interrupted, the same command continues.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/setup.sh

setup core
if [ "${1:-}" = --setup-only ]; then exit; fi
exec .venv/bin/cm3jax run configs/quickstart.py "$@"

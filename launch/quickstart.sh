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
# Large pages: a training step writes hundreds of megabytes that malloc would fetch anew in pages of 4 KiB, 1.2 x slower.
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}
exec .venv/bin/cm3jax run configs/quickstart.py "$@"

#!/usr/bin/env bash
# What tpu_vm.sh asks of each host of a TPU slice, in its copy of this repository:
#
#   bash launch/host.sh install [BUCKET]       the environment, and the bucket at /mnt/cm3jax
#   bash launch/host.sh start COMMAND...       in the background, again when it crashes; its words go to run.log
#   bash launch/host.sh keep COMMAND...        the same, but only where it was lost, as when the machine restarted
#   bash launch/host.sh log                    the end of run.log, and last "== running", "== ended CODE" or "== lost"
#   bash launch/host.sh stop                   SIGTERM, and wait: the training saves and ends
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/setup.sh
source launch/cloud.sh

install() {
    local bucket=${1:-}
    command -v uv >/dev/null || python3 -m pip install --quiet --user uv # the image's own Python is older than 3.11
    export PATH=$HOME/.local/bin:$PATH
    uv python install --quiet 3.11
    PYTHON=$(uv python find 3.11) setup core tpu
    if [ "$bucket" ]; then
        echo "$bucket" >.bucket
        mount_bucket
    fi
}

# Names, sizes and folders are asked for anew each time, so that a host sees at once what another has written.
mount_bucket() {
    if [ ! -f .bucket ] || mountpoint -q "$MOUNT"; then return; fi
    command -v gcsfuse >/dev/null || install_gcsfuse
    sudo mkdir -p "$MOUNT"
    sudo chown "$(id -u):$(id -g)" "$MOUNT"
    gcsfuse --implicit-dirs --rename-dir-limit=100000 --metadata-cache-ttl-secs=0 "$(cat .bucket)" "$MOUNT"
}

# As cloud.google.com/storage/docs/cloud-storage-fuse/install says.
install_gcsfuse() {
    local key=/usr/share/keyrings/cloud.google.asc site=https://packages.cloud.google.com/apt
    curl -fsS "$site/doc/apt-key.gpg" | sudo tee "$key" >/dev/null
    echo "deb [signed-by=$key] $site gcsfuse-$(lsb_release -cs) main" | sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
    sudo apt-get update -qq
    sudo apt-get install -qq -y gcsfuse
}

running() {
    [ -f run.pid ] && kill -0 "$(cat run.pid)" 2>/dev/null
}

start() {
    if running; then
        echo "$(hostname): process $(cat run.pid) is at work already; another command needs a stop first"
        return
    fi
    mount_bucket
    export PATH=$PWD/.venv/bin:$PATH
    if mountpoint -q "$MOUNT"; then # a second start finds its programs compiled
        export JAX_COMPILATION_CACHE_DIR=$MOUNT/compilation-cache JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0
    fi
    rm -f run.code run.pid
    # shellcheck disable=SC2016 # the inner shell expands these
    setsid nohup bash -c 'bash launch/again.sh "$@" & echo $! >run.pid; wait $!; echo $? >run.code' \
        start "$@" >>run.log 2>&1 </dev/null &
    until [ -s run.pid ]; do sleep 0.1; done
    echo "$(hostname): started $(quote "$@")"
}

keep() {
    if ! running && [ ! -f run.code ]; then start "$@"; fi
}

log() {
    tail -n 20 run.log 2>/dev/null || true
    if running; then
        echo "== running"
    elif [ -f run.code ]; then
        echo "== ended $(cat run.code)"
    else
        echo "== lost"
    fi
}

stop() {
    if ! running; then
        echo "$(hostname): nothing is running"
        return
    fi
    kill -TERM "$(cat run.pid)"
    until [ -f run.code ]; do sleep 0.2; done
    echo "$(hostname): stopped"
}

case ${1:-} in
    install | start | keep | log | stop) "$@" ;;
    *) fail "'${1:-}': must be install, start, keep, log or stop" ;;
esac

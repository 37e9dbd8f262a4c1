#!/usr/bin/env bash
# Trains on a Cloud TPU slice, taken as a queued resource. launch/README.md leads through it.
#
#   bash launch/tpu_vm.sh SUBCOMMAND NAME --zone ZONE [OPTIONS] [-- COMMAND]
#
#   create     ask for the slice; returns at once                                        needs --type
#   wait       until it is there
#   install    copy this repository to every host, install it, mount the bucket
#   run        start COMMAND on every host, in the background; it starts again when it crashes
#   watch      show state and log every minute until COMMAND has ended; with -- COMMAND, and what create takes, it also
#              starts it on hosts that have restarted, and resumes when the slice is lost
#   resume     the same COMMAND goes on from its last checkpoint: on this slice, or on a new one if it is gone or never
#              was there (another NAME, --type or --zone moves the run)                  needs --type
#   stop       the training saves and ends; the slice stays
#   delete     give the slice back: what costs money ends here
#
#   --zone ZONE                such as us-west4-a
#   --type TYPE                v5e-256, v5p-128, v6e-64, v4-128 ...: as `cm3jax plan` takes it
#   --slices N                 that many slices of the type, for one run
#   --project PROJECT          default: gcloud's own
#   --spot | --reserved        cheap, and taken away at any time | from a reservation of the project
#   --bucket BUCKET            Cloud Storage bucket (its name, no gs://) that every host sees at /mnt/cm3jax
#   --service-account ACCOUNT  that may use the bucket; default: the project's
#   --runtime VERSION          software of the hosts; default: Google's for the type
#   --dry-run                  print the commands, run none
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/launch/cloud.sh"

ZONE='' TYPE='' SLICES='' PROJECT='' SPOT='' RESERVED='' BUCKET='' SERVICE_ACCOUNT='' RUNTIME=''
EVERY=${WATCH_EVERY:-60} # seconds between two looks

qr() { # qr VERB WORDS...: a command about the queued resource
    local verb=$1
    shift
    run gcloud compute tpus queued-resources "$verb" "$name" --zone="$ZONE" ${PROJECT:+--project="$PROJECT"} "$@"
}

on_hosts() { # on_hosts LINE: run a line of shell on every host
    qr ssh --worker=all --node=all --command="$1"
}

create() {
    local type runtime=$RUNTIME nodes=(--node-id="$name")
    given --type "$TYPE"
    type=$(tpu_type "$TYPE") || exit 2
    [ -z "$SPOT" ] || [ -z "$RESERVED" ] || fail "--spot and --reserved exclude each other"
    if [ "${SLICES:-1}" != 1 ]; then
        number --slices "$SLICES"
        nodes=(--node-count="$SLICES" --node-prefix="$name")
    fi
    qr create --accelerator-type="$type" --runtime-version="${runtime:-$(runtime_of "$type")}" "${nodes[@]}" \
        ${SPOT:+--spot} ${RESERVED:+--reserved} ${SERVICE_ACCOUNT:+--service-account="$SERVICE_ACCOUNT"}
}

runtime_of() { # cloud.google.com/tpu/docs/runtimes
    case $1 in
        v4-*) echo tpu-ubuntu2204-base ;;
        v5litepod-*) echo v2-alpha-tpuv5-lite ;;
        v5p-*) echo v2-alpha-tpuv5 ;;
        v6e-*) echo v2-alpha-tpuv6e ;;
    esac
}

# Print the state: ACTIVE, WAITING_FOR_RESOURCES, ...; ABSENT if there is no such resource.
state() {
    local out
    if out=$(qr describe --format='value(state.state)' 2>&1); then
        tail -n 1 <<<"$out"
    elif [[ $out == *NOT_FOUND* || $out == *"not found"* ]]; then
        echo ABSENT
    else
        fail "gcloud: $(tail -n 1 <<<"$out")"
    fi
}

await() {
    local now
    if [ "$DRY" ]; then
        note "every $EVERY s, until it prints ACTIVE:"
        qr describe --format='value(state.state)'
        return
    fi
    while :; do
        now=$(state) || exit 2
        echo "$(date +%T) $name: $now" >&2
        case $now in
            ACTIVE) return ;;
            FAILED | SUSPENDED | SUSPENDING | ABSENT) fail "$name is $now and will not come; ask again: resume" ;;
        esac
        sleep "$EVERY"
    done
}

install() {
    local folder=${TMPDIR:-/tmp}
    local archive=$folder/$name.cm3jax.tar.gz
    run tar --exclude=./.git --exclude=./.venv --exclude=./runs --exclude=__pycache__ -czf "$archive" -C "$root" .
    run gcloud compute tpus queued-resources scp "$archive" "$name:cm3jax.tar.gz" --zone="$ZONE" \
        ${PROJECT:+--project="$PROJECT"} --worker=all --node=all
    on_hosts "mkdir -p cm3jax && tar -xzf cm3jax.tar.gz -C cm3jax && $(quote bash cm3jax/launch/host.sh install ${BUCKET:+"$BUCKET"})"
}

start() {
    need_command
    on_hosts "$(quote bash cm3jax/launch/host.sh start "${COMMAND[@]}")"
}

watch() {
    local now said
    if [ "$DRY" ]; then
        note "every $EVERY s, until the last line says: == ended"
        qr describe --format='value(state.state)'
        look
        [ ${#COMMAND[@]} = 0 ] || note "if the slice is lost or the run ended badly: resume"
        return
    fi
    while :; do
        now=$(state) || exit 2
        said=''
        [ "$now" != ACTIVE ] || said=$(look) || said="no answer from the first host"
        printf '%s\n== %s %s: %s\n' "$said" "$(date +%T)" "$name" "$now"
        case $now:${said##*== } in
            ACTIVE:ended\ 0) exit ;;
            ACTIVE:ended\ 2) fail "a mistake in the input, see the log above" ;;
            ACTIVE:ended* | ACTIVE:lost | FAILED:* | SUSPENDED:* | ABSENT:*)
                [ ${#COMMAND[@]} -gt 0 ] || fail "$name: the run has stopped; go on with: resume"
                resume
                ;;
        esac
        sleep "$EVERY"
    done
}

# Print the end of the first host's log; start the command on hosts that have lost it.
look() {
    [ ${#COMMAND[@]} = 0 ] || on_hosts "$(quote bash cm3jax/launch/host.sh keep "${COMMAND[@]}")"
    qr ssh --worker=0 --node=0 --command='bash cm3jax/launch/host.sh log'
}

resume() {
    local now=ABSENT
    need_command
    given --type "$TYPE"
    if [ "$DRY" ]; then
        note "where the slice is ACTIVE, only the last command; where it never was, not the delete:"
        qr describe --format='value(state.state)'
        delete
    else
        now=$(state) || exit 2
        if [ "$now" != ACTIVE ] && [ "$now" != ABSENT ]; then delete; fi
    fi
    if [ "$now" != ACTIVE ]; then
        create
        await
        install
    fi
    start
}

stop() {
    on_hosts 'bash cm3jax/launch/host.sh stop'
}

delete() {
    qr delete --force --quiet
}

case ${1:-} in
    -h | --help | '') usage && exit ;;
    create | wait | install | run | watch | resume | stop | delete) verb=$1 ;;
    *) fail "'$1': must be create, wait, install, run, watch, resume, stop or delete" ;;
esac
name=${2:-}
case $name in
    -h | --help) usage && exit ;;
esac
named "$name"
arguments "--zone --type --slices --project --bucket --service-account --runtime" "--spot --reserved" "${@:3}"
given --zone "$ZONE"
need gcloud "get it from cloud.google.com/sdk/docs/install"
case $verb in
    wait) await ;;
    run) start ;;
    *) "$verb" ;;
esac

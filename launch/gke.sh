#!/usr/bin/env bash
# Trains on TPU slices of a GKE cluster, through xpk. launch/README.md leads through it.
#
#   bash launch/gke.sh SUBCOMMAND NAME --cluster CLUSTER --zone ZONE [OPTIONS] [-- COMMAND]
#
#   create          make the cluster and show the bucket to it           needs --type, --bucket; NAME is that of the storage
#   install         build the container image and push it                needs --image
#   run             start COMMAND on every host of the slices            needs --type, --image
#   watch           show the workload's state, then follow its log
#   resume          the same COMMAND goes on from its last checkpoint, on this type or another one   needs as run
#   stop            end the workload: the training has 30 s to save; the cluster stays
#   delete          delete the cluster: what costs money ends here
#
#   --cluster CLUSTER       name of the cluster
#   --zone ZONE             such as us-west4-a
#   --type TYPE             v5e-256, v5p-128, v6e-64, v4-128 ...: as `cm3jax plan` takes it
#   --slices N              that many slices of the type, for one run
#   --project PROJECT       default: gcloud's own
#   --spot | --on-demand | --reservation NAME     how the cluster gets its TPUs
#   --bucket BUCKET         Cloud Storage bucket (its name, no gs://) that every host sees at /mnt/cm3jax
#   --image IMAGE           such as us-docker.pkg.dev/PROJECT/cm3jax/cm3jax:1
#   --restarts N            starts after a crash, before it is given up; default 50
#   --dry-run               print the commands, run none
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/launch/cloud.sh"

CLUSTER='' ZONE='' TYPE='' SLICES=1 PROJECT='' SPOT='' ON_DEMAND='' RESERVATION='' BUCKET='' IMAGE='' RESTARTS=50

on_cluster() { # on_cluster xpk WORDS...: with what says which cluster
    run "$@" --cluster="$CLUSTER" --zone="$ZONE" ${PROJECT:+--project="$PROJECT"}
}

slices() { # set `type`, check --slices
    given --type "$TYPE"
    type=$(tpu_type "$TYPE") || exit 2
    number --slices "$SLICES"
}

create() {
    local type ways=${SPOT:+x}${ON_DEMAND:+x}${RESERVATION:+x}
    slices
    given --bucket "$BUCKET"
    [ "$ways" = x ] || fail "give one of --spot, --on-demand and --reservation NAME"
    on_cluster xpk cluster create --tpu-type="$type" --num-slices="$SLICES" --enable-gcsfuse-csi-driver \
        ${SPOT:+--spot} ${ON_DEMAND:+--on-demand} ${RESERVATION:+--reservation="$RESERVATION"}
    on_cluster xpk storage attach "$name" --type=gcsfuse --bucket="$BUCKET" --mount-point="$MOUNT" \
        --mount-options=implicit-dirs,rename-dir-limit=100000,metadata-cache:ttl-secs:0 \
        --readonly=false --auto-mount=true --size=1
}

install() {
    given --image "$IMAGE"
    run docker build --platform=linux/amd64 --tag="$IMAGE" --file="$root/launch/Dockerfile" "$root"
    run docker push "$IMAGE"
}

# xpk starts all hosts again if one ends with 1, 42 or 127 and above; 2 is a mistake in the input.
start() {
    local type
    need_command
    slices
    given --image "$IMAGE"
    number --restarts "$RESTARTS"
    on_cluster xpk workload create --workload="$name" --tpu-type="$type" --num-slices="$SLICES" \
        --docker-image="$IMAGE" --max-restarts="$RESTARTS" --restart-on-exit-codes=1 \
        --env=JAX_COMPILATION_CACHE_DIR="$MOUNT/compilation-cache" \
        --env=JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0 \
        --command="$(quote exec "${COMMAND[@]}")" # exec: else SIGTERM ends xpk's shell around it, and not the training
}

watch() {
    on_cluster xpk workload list --filter-by-job="$name"
    run kubectl logs --follow --container=jax-tpu --tail=20 --prefix \
        --selector="jobset.sigs.k8s.io/jobset-name=$name,batch.kubernetes.io/job-completion-index=0"
}

stop() {
    on_cluster xpk workload delete --workload="$name" --force
}

resume() {
    need_command
    note "where the workload is gone already, only the last command:"
    stop || echo "gke.sh: nothing to end" >&2
    start
}

delete() {
    on_cluster xpk cluster delete --force
}

case ${1:-} in
    -h | --help | '') usage && exit ;;
    create | install | run | watch | resume | stop | delete) verb=$1 ;;
    *) fail "'$1': must be create, install, run, watch, resume, stop or delete" ;;
esac
name=${2:-}
case $name in
    -h | --help) usage && exit ;;
esac
named "$name"
arguments "--cluster --zone --type --slices --project --reservation --bucket --image --restarts" \
    "--spot --on-demand" "${@:3}"
case $verb in
    install) need docker "see docs.docker.com/engine/install" ;;
    *)
        given --cluster "$CLUSTER"
        given --zone "$ZONE"
        need xpk "pip install xpk"
        need kubectl "gcloud components install kubectl"
        ;;
esac
case $verb in
    run) start ;;
    *) "$verb" ;;
esac

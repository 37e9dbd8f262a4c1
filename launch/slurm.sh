#!/usr/bin/env bash
# Trains on the NVIDIA GPUs of a SLURM cluster. launch/README.md leads through it.
#
#   bash launch/slurm.sh SUBCOMMAND NAME [OPTIONS] [-- COMMAND]
#
#   install    make .venv/ in this copy of the repository, which all nodes must see
#   run        queue COMMAND: launch/slurm.sbatch, one process per GPU; it goes on by itself after the time limit or a crash
#   watch      show the job's state, then follow its log (slurm-NAME.log)
#   resume     the same as run: COMMAND goes on from its last checkpoint, on these nodes or others
#   stop       the training saves and ends
#   delete     take the job off the queue, at once
#
#   --nodes N             default 1
#   --gpus N              GPUs of each node, default 8
#   --cpus N              CPU cores of each GPU, default 8
#   --time TIME           limit after which the job saves and queues anew, default 24:00:00
#   --partition NAME  --account NAME  --qos NAME      as the cluster asks for them
#   --cache FOLDER        jax's compilation cache, which all nodes see; default .compilation-cache/ here
#   --dry-run             print the commands, run none
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/cloud.sh

NODES=1 GPUS=8 CPUS=8 TIME=24:00:00 PARTITION='' ACCOUNT='' QOS='' CACHE=$PWD/.compilation-cache
GRACE=300 # seconds before the time limit at which the training is told to save

install() {
    run bash -c 'source launch/setup.sh && setup core cuda'
}

# jax takes one GPU per process under SLURM, by its number on the node: all of a node's GPUs must be seen by its tasks.
start() {
    need_command
    number --nodes "$NODES"
    number --gpus "$GPUS"
    number --cpus "$CPUS"
    run sbatch --job-name="$name" --nodes="$NODES" --ntasks-per-node="$GPUS" --gpus-per-node="$GPUS" \
        --cpus-per-task="$CPUS" --time="$TIME" ${PARTITION:+--partition="$PARTITION"} \
        ${ACCOUNT:+--account="$ACCOUNT"} ${QOS:+--qos="$QOS"} --signal="B:USR1@$GRACE" --requeue \
        --open-mode=append --output="slurm-$name.log" --chdir="$PWD" --export="ALL,JAX_COMPILATION_CACHE_DIR=$CACHE" \
        launch/slurm.sbatch "${COMMAND[@]}"
}

watch() {
    run squeue --me --name="$name" --format='%i %T %M of %l, %D nodes %R'
    run tail -n 20 -F "slurm-$name.log"
}

stop() { # the job's steps only: its script then sees them end well
    run scancel --me --name="$name" --signal=TERM
}

delete() {
    run scancel --me --name="$name"
}

case ${1:-} in
    -h | --help | '') usage && exit ;;
    install | run | watch | resume | stop | delete) verb=$1 ;;
    *) fail "'$1': must be install, run, watch, resume, stop or delete" ;;
esac
name=${2:-}
case $name in
    -h | --help) usage && exit ;;
esac
named "$name"
arguments "--nodes --gpus --cpus --time --partition --account --qos --cache" "" "${@:3}"
[ "$verb" = install ] || need sbatch "run this on a login node of the cluster"
case $verb in
    run | resume) start ;;
    *) "$verb" ;;
esac

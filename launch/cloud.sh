# shellcheck shell=bash
# Sourced by tpu_vm.sh, gke.sh and slurm.sh: reading arguments, and running commands or only showing them.

MOUNT=/mnt/cm3jax # where the bucket lies on every host: runs, data and the compilation cache
export DRY=       # "yes": commands are printed, not run

fail() {
    echo "$(basename "$0"): $*" >&2
    exit 2
}

# Print words as one line that a shell reads back as the same words.
quote() {
    local word line=''
    # shellcheck disable=SC2001 # bash's own ${word//...} reads quotes one way in one version, another way in the next
    for word in "$@"; do
        case $word in
            '' | *[!A-Za-z0-9_./:=,@%+-]*) line+=" '$(sed "s/'/'\\\\''/g" <<<"$word")'" ;;
            *) line+=" $word" ;;
        esac
    done
    printf '%s\n' "${line# }"
}

# Show a command, and run it unless this is a dry run.
run() {
    if [ "$DRY" ]; then
        quote "$@"
    else
        echo "+ $(quote "$@")" >&2
        "$@"
    fi
}

# Say in a dry run what the commands around it are for.
note() {
    [ -z "$DRY" ] || echo "# $*"
}

# Show the head of the script, its usage, without the marks of a comment.
usage() {
    sed -n '2,/^[^#]/{s/^# \{0,1\}//p;}' "$0"
}

# need TOOL HOW: stop unless TOOL is installed; a dry run needs none.
need() {
    [ "$DRY" ] || command -v "$1" >/dev/null || fail "$1 is not installed; $2"
}

# given FLAG VALUE: stop unless the value is there.
given() {
    [ "$2" ] || fail "$1 is missing; see: bash launch/$(basename "$0") --help"
}

# number FLAG VALUE: stop unless the value is a whole number from 1 on.
number() {
    [[ $2 =~ ^[1-9][0-9]*$ ]] || fail "$1 = '$2': must be a whole number from 1 on"
}

# arguments "FLAGS with values" "FLAGS without" WORDS...: put --some-flag VALUE into SOME_FLAG, all behind -- into COMMAND.
arguments() {
    local valued=" $1 " plain=" $2 " flag variable
    shift 2
    COMMAND=()
    while [ $# -gt 0 ]; do
        case $1 in
            -h | --help) usage && exit ;;
            --dry-run) DRY=yes ;;
            --)
                shift
                COMMAND=("$@")
                return
                ;;
            --*)
                flag=${1%%=*} && variable=$(tr a-z- A-Z_ <<<"${flag#--}")
                if [[ $plain == *" $flag "* ]]; then
                    [ "$flag" = "$1" ] || fail "$flag takes no value"
                    printf -v "$variable" yes
                elif [[ $valued != *" $flag "* ]]; then
                    fail "$flag: no such option; see: bash launch/$(basename "$0") --help"
                elif [ "$flag" != "$1" ]; then
                    printf -v "$variable" %s "${1#*=}"
                else
                    [ $# -gt 1 ] || fail "$flag needs a value"
                    printf -v "$variable" %s "$2"
                    shift
                fi
                ;;
            *) fail "'$1': not understood; the command to run stands behind --" ;;
        esac
        shift
    done
}

# The command that a host runs; what goes on is the same command.
need_command() {
    [ ${#COMMAND[@]} -gt 0 ] ||
        fail "no command; put it last: -- cm3jax train configs/cm3leon/7b.py --inputs $MOUNT/runs/7b"
}

# named NAME: stop unless the cloud takes such a name.
named() {
    [ "$1" ] || fail "the name is missing; see: bash launch/$(basename "$0") --help"
    [[ $1 =~ ^[a-z]([a-z0-9-]*[a-z0-9])?$ ]] ||
        fail "name '$1': must be lower-case letters, digits and hyphens, a letter first"
}

# Print a TPU's name as gcloud and xpk want it: v5e-256 is v5litepod-256 there.
tpu_type() {
    [[ $1 =~ ^(v4|v5e|v5litepod|v5p|v6e)-[1-9][0-9]*$ ]] ||
        fail "--type = '$1': must be like v5e-256, v5p-128, v6e-64 or v4-128"
    echo "${1/v5e-/v5litepod-}"
}

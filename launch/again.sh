#!/usr/bin/env bash
# Runs a command, and again when it crashes: a training goes on from its last checkpoint.
#
#   bash launch/again.sh COMMAND [ARGUMENTS]
#
# It ends with the command if that ends well (0: done, or saved after SIGTERM) or because of a mistake in the input (2),
# which another start would only repeat. SIGTERM is passed on, and then nothing starts again.
# AGAIN_MOST=50 starts at most beyond the first, AGAIN_PAUSE=30 seconds apart.
set -uo pipefail

[ $# -gt 0 ] || {
    echo "again.sh: no command; see the head of $0" >&2
    exit 2
}
most=${AGAIN_MOST:-50} pause=${AGAIN_PAUSE:-30} asked='' child='' woken=''
trap 'asked=yes woken=yes; [ -z "$child" ] || kill -TERM "$child" 2>/dev/null' TERM INT

# Wait for the last background process to its end, also when a signal cuts the waiting short; return its exit code.
ended() {
    local code
    while :; do
        woken=''
        wait "$child"
        code=$?
        [ "$woken" ] || return $code
    done
}

for ((starts = 0; ; starts++)); do
    "$@" &
    child=$!
    ended
    code=$?
    if [ "$asked" ] || [ $code = 0 ] || [ $code = 2 ]; then exit $code; fi
    if ((starts >= most)); then
        echo "again.sh: ended with $code after $((starts + 1)) starts; given up" >&2
        exit $code
    fi
    echo "again.sh: $(date -u +%FT%TZ) ended with $code; starts again in $pause s" >&2
    sleep "$pause" &
    child=$!
    ended
    [ -z "$asked" ] || exit $code
done

#!/usr/bin/env bash
# Pretrain with several workers on this machine, to try what docs/scaling.md tells:
#
#   scripts/train_workers.sh N [flags of pretraining.py]
#
# starts N processes that train together over loopback, each with the flags and its own TF_CONFIG, and prints the
# chief's output. If one fails, the others are ended, and the exit status is that of the one that failed.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}

fail() { # message, exit status
    echo "$(basename "$0"): $1" >&2
    exit "${2:-1}"
}

[[ ${1:-} =~ ^[1-9][0-9]*$ ]] || fail "the first argument is the number of workers, as in: train_workers.sh 2 --dataset=shapes"
number=$1
shift
# All sockets are open at once, so that no port is given twice.
hosts=$("$python" -c '
import json, socket, sys
sockets = [socket.socket() for _ in range(int(sys.argv[1]))]
for each in sockets:
    each.bind(("127.0.0.1", 0))
print(json.dumps(["127.0.0.1:%d" % each.getsockname()[1] for each in sockets]))' "$number")
logs=$(mktemp -d)

pids=()
status=0
failed=
running() { # Keep those of pids that run; status becomes that of the first that failed.
    local index code left=()
    for index in "${!pids[@]}"; do
        if kill -0 "${pids[$index]}" 2>/dev/null; then
            left[index]=${pids[$index]}
        else
            code=0
            wait "${pids[$index]}" || code=$?
            if [ $code -ne 0 ] && [ $status -eq 0 ]; then
                status=$code
                failed=$index
            fi
        fi
    done
    pids=()
    for index in "${!left[@]}"; do
        pids[index]=${left[$index]}
    done
    [ ${#pids[@]} -gt 0 ]
}
end() { # signal; what has not ended after a while is killed
    [ ${#pids[@]} -eq 0 ] || kill "-$1" "${pids[@]}" 2>/dev/null || true
    for ((tenths = 0; tenths < ${STOP_SECONDS:-60} * 10; tenths++)); do
        running || break
        sleep 0.1
    done
    [ ${#pids[@]} -eq 0 ] || kill -KILL "${pids[@]}" 2>/dev/null || true
    rm -rf "$logs"
}
trap 'end TERM; exit 143' TERM
trap 'end TERM; exit 130' INT # bash has them ignore SIGINT until they ask for it

for ((index = 0; index < number; index++)); do
    export TF_CONFIG="{\"cluster\": {\"worker\": $hosts}, \"task\": {\"type\": \"worker\", \"index\": $index}}"
    if [ $index -eq 0 ]; then
        "$python" "$root/pretraining.py" "$@" &
    else
        "$python" "$root/pretraining.py" "$@" >"$logs/$index" 2>&1 &
    fi
    pids+=($!)
done
while running && [ $status -eq 0 ]; do
    sleep 0.2
done
if [ $status -ne 0 ]; then
    [ "$failed" -eq 0 ] || tail -n 3 "$logs/$failed" >&2
    end TERM
    fail "worker $failed failed (exit status $status), so the others were ended." $status
fi
rm -rf "$logs"

#!/usr/bin/env bash
# Pretrain on the 8 devices of an Ascend server through HCCL, then evaluate linearly on one: see --help.
# shellcheck source=scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
common_flags 200
value[device]=npu # HCCL is the NPU's
flag eval_epochs 50 "epochs of the linear evaluation"
flag rank_size 8 "processes, of one device each: 1, 2, 4 or 8; rank i computes on device i"
flag rank_table_file "${RANK_TABLE_FILE:-}" "HCCL's rank table, JSON"
parse "Pretrains on several NPUs of this machine, one process each, evaluates the encoder linearly on the first, and writes
speed and accuracy into output_path/\${CaseName}.log. Only rank 0 writes results; each rank has a log, train_<rank>.log.
If one process fails, the others are ended." "$@"
[[ ${value[rank_size]} =~ ^[1248]$ ]] || fail "--rank_size is '${value[rank_size]}'; it is 1, 2, 4 or 8."
table=${value[rank_table_file]}
[ -f "$table" ] || fail "--rank_table_file (or RANK_TABLE_FILE): there is no file '$table'."
prepare "${value[rank_size]}" acc

pids=()
running() { # Keep those of pids that run; status becomes that of the first that failed.
    local pid code left=()
    for pid in "${pids[@]}"; do
        if kill -0 "$pid" 2>/dev/null; then
            left+=("$pid")
        else
            code=0
            wait "$pid" || code=$?
            [ $status -ne 0 ] || status=$code
        fi
    done
    pids=(${left[@]+"${left[@]}"})
    [ ${#pids[@]} -gt 0 ]
}
stop() { # A process that waits for another in HCCL does not heed SIGTERM.
    kill "${pids[@]}" 2>/dev/null || true
    for ((second = 0; second < ${STOP_SECONDS:-30}; second++)); do
        running || return 0
        sleep 1
    done
    kill -KILL "${pids[@]}" 2>/dev/null || true
}
status=0
: >"$output/train_0.log"
tail -n +1 -f --pid=$$ "$output/train_0.log" &
follow=$!
trap 'stop; kill "$follow"; exit 143' TERM
trap 'stop; kill "$follow"; exit 130' INT
for ((rank = 0; rank < ranks; rank++)); do
    RANK_TABLE_FILE=$table RANK_SIZE=$ranks RANK_ID=$rank ASCEND_DEVICE_ID=$rank \
        "$python" "${pretraining[@]}" >"$output/train_$rank.log" 2>&1 &
    pids+=($!)
done
while running && [ $status -eq 0 ]; do
    sleep 1
done
kill "$follow"
if [ $status -ne 0 ]; then
    stop
    tail -n 3 "$output"/train_[0-9].log >&2
    fail "a process failed; the logs are $output/train_<rank>.log." $status
fi
trap - TERM INT
accuracy=$(evaluate_linearly "$output/train_0.log")
write_log "$output/train_0.log" "$accuracy"

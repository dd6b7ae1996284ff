#!/usr/bin/env bash
# Measure the speed of pretraining on one device: see --help.
# shellcheck source=scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
common_flags 1
flag perf 0 "0: end after 20 batches, as ModelZoo's does; 1: take the whole of --train_epochs"
parse "Pretrains for a short while on one device, from the start, and writes its speed into output_path/\${CaseName}.log." "$@"
prepare 1 perf
mine=(--overwrite) # an earlier run of this script's; a folder that was named may hold another one
[ -z "${value[ckpt_path]}" ] || mine=()
pretrain_alone --noresume "--perf=${value[perf]}" ${mine[@]+"${mine[@]}"}
log=$output/train_$ASCEND_DEVICE_ID.log
write_log "$log" "$(sed -n 's/.*k-NN accuracy=\([0-9.]*\).*/\1/p' "$log" | tail -n 1)"

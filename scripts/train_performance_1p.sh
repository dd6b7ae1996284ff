#!/usr/bin/env bash
# Measure the speed of pretraining on one device: see --help.
# shellcheck source=scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
common_flags 1
parse "Pretrains for a short while on one device, from the start, and writes its speed into output_path/\${CaseName}.log." "$@"
prepare 1 perf
pretrain_alone --noresume --overwrite
log=$output/train_$ASCEND_DEVICE_ID.log
write_log "$log" "$(sed -n 's/.*k-NN accuracy=\([0-9.]*\).*/\1/p' "$log" | tail -n 1)"

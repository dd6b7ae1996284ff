#!/usr/bin/env bash
# Pretrain on one device to the end, then evaluate linearly: see --help.
# shellcheck source=scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
common_flags 200
flag eval_epochs 50 "epochs of the linear evaluation"
parse "Pretrains on one device to the end (goes on where an earlier run stopped), evaluates the encoder linearly, and writes
speed and accuracy into output_path/\${CaseName}.log." "$@"
prepare 1 acc
pretrain_alone --resume
log=$output/train_$ASCEND_DEVICE_ID.log
accuracy=$(evaluate_linearly "$log")
write_log "$log" "$accuracy"

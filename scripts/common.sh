# shellcheck shell=bash
# What the train_*.sh share: flags in ModelZoo's spelling, the run, and ModelZoo's result log. Sourced, not run.
# Flags are declared once, so that --help lists exactly those that are parsed.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
Network=BYOL_for_TensorFlow2
declare -A value text
declare -A alias=([num_epochs]=train_epochs [autotune]=auto_tune) # other spellings of flags
names=()
extra=()

flag() { # name, default, explanation
    names+=("$1")
    value[$1]=$2
    text[$1]=$3
}

common_flags() { # epochs
    flag data_path "" "the data set: CIFAR-10's folder or .tar.gz, or a folder of images; without it Keras's cache is looked at"
    flag dataset cifar10 "cifar10, cifar100, shapes (needs no files), folder or tfds:NAME"
    flag encoder resnet18 "resnet18 or resnet34"
    flag width_multiplier 1.0 "scales the encoder's filters"
    flag batch_size 512 "images a step, over all devices"
    flag train_epochs "$1" "epochs to pretrain; also --num_epochs"
    flag device auto "auto, cpu, gpu or npu"
    flag precision_mode "" "the NPU adapter's name of the precision; by default allow_mix_precision on NPU"
    flag loss_scale auto "auto, dynamic, none or a number"
    flag over_dump False "True: dump overflowing operators"
    flag over_dump_path "" "where to; by default overflow_dump in the output folder"
    flag data_dump_flag False "True: dump operators' data"
    flag data_dump_step 10 "the steps to dump, as in 0|5|10"
    flag data_dump_path "" "where to; by default data_dump in the output folder"
    flag profiling False "True: write a profile"
    flag profiling_dump_path "" "where to; by default profiling in the output folder"
    flag use_mixlist False "True: use --mixlist_file"
    flag mixlist_file ops_info.json "operators to add to or remove from the mixed precision lists"
    flag fusion_off_flag False "True: use --fusion_off_file"
    flag fusion_off_file fusion_switch.cfg "which fusion rules are off"
    flag auto_tune False "accepted, without effect: the current adapter no longer has it; also --autotune"
    flag ckpt_path "" "folder of the run: checkpoints, weights, losses; by default run in the output folder"
    flag output_path "" "folder of logs and results; by default output/\$ASCEND_DEVICE_ID beside scripts"
}

fail() { # message, exit status
    echo "$(basename "$0"): $1" >&2
    exit "${2:-1}"
}

usage() { # purpose of the script
    echo "Usage: $(basename "$0") [--flag=value | --flag value]... [-- further flags of pretraining.py]"
    echo "$1"
    for name in "${names[@]}"; do
        printf '  --%-18s %s (default: %s)\n' "$name" "${text[$name]}" "${value[$name]:-none}"
    done
    printf '  %-20s %s\n' "-h, --help" "this text"
    exit 0
}

parse() { # purpose of the script, then its arguments
    local name given purpose=$1
    shift
    while [ $# -gt 0 ]; do
        case $1 in
        -h | --help) usage "$purpose" ;;
        --) shift; extra=("$@"); break ;;
        --[a-z]*) given=${1%%=*}; name=${alias[${given#--}]:-${given#--}} ;;
        *) fail "unexpected argument $1; see --help." ;;
        esac
        [ -n "${text[$name]+known}" ] || fail "unknown flag $given; see --help."
        if [ "$1" = "$given" ]; then
            [ $# -gt 1 ] || fail "$given needs a value; see --help."
            value[$name]=$2
            shift
        else
            value[$name]=${1#*=}
        fi
        shift
    done
}

prepare() { # processes, acc or perf
    local name
    ranks=$1
    export ASCEND_DEVICE_ID=${ASCEND_DEVICE_ID:-0}
    [ -z "${value[data_path]}" ] || [ -e "${value[data_path]}" ] || fail "--data_path: there is no ${value[data_path]}."
    output=${value[output_path]:-$root/output/$ASCEND_DEVICE_ID}
    mkdir -p "$output" || fail "cannot write into $output."
    output=$(cd "$output" && pwd)
    CaseName=${Network}_bs${value[batch_size]}_${ranks}p_$2
    run=${value[ckpt_path]:-$output/run}
    rm -f "$output/$CaseName.log" # a failing run must not leave an earlier one's figures
    forwarded=()
    for name in data_path dataset encoder width_multiplier device precision_mode; do
        [ -z "${value[$name]}" ] || forwarded+=("--$name=${value[$name]}")
    done
    pretraining=("$root/pretraining.py" "${forwarded[@]}" "--output_dir=$run" "--num_epochs=${value[train_epochs]}"
        "--over_dump_path=${value[over_dump_path]:-$output/overflow_dump}"
        "--data_dump_path=${value[data_dump_path]:-$output/data_dump}"
        "--profiling_dump_path=${value[profiling_dump_path]:-$output/profiling}")
    for name in batch_size loss_scale over_dump data_dump_flag data_dump_step profiling use_mixlist mixlist_file \
        fusion_off_flag fusion_off_file auto_tune; do
        pretraining+=("--$name=${value[$name]}")
    done
    pretraining+=(${extra[@]+"${extra[@]}"})
    began=$(date +%s.%N)
}

alone() { # Run a command as the only process of its training, whatever the environment says of others.
    env -u RANK_SIZE -u RANK_ID -u RANK_TABLE_FILE -u CM_WORKER_SIZE -u CM_CHIEF_IP "$@"
}

pretrain_alone() { # A signal to all ends the training, which still prints and saves then, but not tee.
    local code=0
    alone "$python" "${pretraining[@]}" "$@" 2>&1 | (trap '' INT TERM HUP && exec tee "$output/train_$ASCEND_DEVICE_ID.log") || code=$?
    [ $code -lt 129 ] || fail "stopped; the same command goes on from where it was." $code
    [ $code -eq 0 ] || fail "pretraining failed; its output is in $output/train_$ASCEND_DEVICE_ID.log." $code
}

evaluate_linearly() { # log; print the accuracy of a linear head on the newest weights, and write it into the training's log.
    local weights
    weights=$(find "$run" -name 'f_online_*.h5' | sort -V | tail -n 1)
    [ -n "$weights" ] || fail "pretraining saved no weights; it must reach the end of its last epoch."
    alone "$python" "$root/linearevaluation.py" "${forwarded[@]}" "--encoder_weights=$weights" "--output_dir=$run" \
        "--batch_size=${value[batch_size]}" "--num_epochs=${value[eval_epochs]}" 2>&1 | tee "$output/linear.log" >&2 ||
        fail "the linear evaluation failed; its output is in $output/linear.log." $?
    grep '^Test Accuracy: ' "$output/linear.log" >>"$1"
    sed -n 's/^Test Accuracy: //p' "$output/linear.log"
}

write_log() { # log to take the speed from, accuracy
    local log=$1 accuracy=${2:-none} result="$output/$CaseName.log" fps loss seconds
    # Log lines cover equally many steps each, so the mean speed is the harmonic one. The first line has the compilation in it.
    fps=$(sed -n 's/.*[ ,]\([0-9.][0-9.]*\) images\/s.*/\1/p' "$log" |
        awk '{ x[NR] = $1 } END { for (i = NR > 1 ? 2 : 1; i <= NR; i++) { n++; t += 1 / x[i] } if (n) printf "%.2f", n / t }')
    [ -n "$fps" ] || fail "no line with a speed in $log: either the run was finished before, or it has fewer steps than --log_every."
    loss=$(tail -n 1 "$run/losses.txt")
    cp "$run/losses.txt" "$output/train_${CaseName}_loss.txt"
    seconds=$(awk "BEGIN { printf \"%.2f\", $(date +%s.%N) - $began }")
    echo "Final Loss=$loss" >>"$log" # for ModelZoo's awk, which would take a log line's full stop for part of the number
    printf '%s : %s\n' "Final Performance images/sec" "$fps" "Final Train Accuracy" "$accuracy" \
        "E2E Training Duration sec" "$seconds" | tee -a "$log"
    {
        echo "Network = $Network"
        echo "RankSize = $ranks"
        echo "BatchSize = ${value[batch_size]}"
        echo "DeviceType = $(uname -m)"
        echo "CaseName = $CaseName"
        echo "ActualFPS = $fps"
        echo "TrainingTime = $(awk "BEGIN { printf \"%.3f\", ${value[batch_size]} * 1000 / $fps }") ms/step"
        echo "TrainAccuracy = $accuracy"
        echo "ActualLoss = $loss"
        echo "E2ETrainingTime = $seconds s"
    } >"$result.part"
    mv "$result.part" "$result"
    cat "$result"
}

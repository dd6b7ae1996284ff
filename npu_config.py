"""Which device computes, at which precision: CPU, GPU or Ascend 910; one, or several together.

`open_device` is called once, early in each command, before any tensor or variable exists. What it gives, a
`devices.base.Device`, is all that the other modules know of devices.
"""
import dataclasses
import importlib.util
import sys
from typing import Optional

import commands  # before TensorFlow, whose start it quiets

# isort: split

from absl import logging

from commands import UserError, flag
from devices import host
from devices.base import Device

# Flags that do nothing where there is no NPU; ModelZoo's scripts pass them as False.
NPU_FLAGS = ("use_mixlist", "fusion_off_flag", "over_dump", "data_dump_flag", "profiling")
PRECISION_MODES = ("allow_fp32_to_fp16", "allow_mix_precision", "allow_mix_precision_fp16", "allow_mix_precision_bf16",
                   "cube_fp16in_fp32out", "force_fp16", "force_fp32", "must_keep_origin_dtype")


@dataclasses.dataclass(frozen=True)
class Options:
    """Flags of the device, the base of every command's settings."""
    device: str = flag("auto", "Where to compute. auto: the NPU if npu_device imports and opens, else a GPU, else the CPU.",
                       choices=("auto", "cpu", "gpu", "npu"))
    precision_mode: Optional[str] = flag(
        None, "Precision, by the NPU adapter's names. Default: allow_mix_precision on NPU (ModelZoo README) and GPU, "
        "must_keep_origin_dtype (float32) on CPU. allow_mix_precision on GPU is Keras's mixed_bfloat16 where the GPU has "
        "it, else mixed_float16; on CPU it is mixed_bfloat16 where processor and TensorFlow have it, else float32.",
        choices=PRECISION_MODES)
    loss_scale: str = flag("auto", "auto, dynamic, none, or a number. auto: dynamic where something is computed in float16, "
                           "else none.")
    num_devices: int = flag(1, "GPUs (or logical CPU devices) of this machine to train on together; with TF_CONFIG, of each "
                            "worker. NPUs take one process each.", low=1)
    sync_batch_norm: bool = flag(True, "With several devices: BatchNorm statistics over the global batch, so that n devices "
                                 "compute what one would; --nosync_batch_norm: over each device's rows. On NPU always the latter.")
    jit_compile: bool = flag(False, "Compile the train step with XLA; meant for one GPU, without effect on NPU.")
    hcom_parallel: bool = flag(False, "NPU: overlap all-reduce and computation. ModelZoo's README has True; Huawei's tuning guide "
                               "advises False for small networks, naming ResNet-18. It matters on several devices only.")
    use_mixlist: bool = flag(False, "NPU: use --mixlist_file (ModelZoo).")
    mixlist_file: str = flag("ops_info.json", "NPU: JSON with the operators to add to or remove from the mixed precision lists.")
    fusion_off_flag: bool = flag(False, "NPU: use --fusion_off_file (ModelZoo).")
    fusion_off_file: str = flag("fusion_switch.cfg", "NPU: file that switches fusion rules off.")
    over_dump: bool = flag(False, "NPU: dump the operators that overflow (ModelZoo).")
    over_dump_path: str = flag("overflow_dump", "NPU: folder for --over_dump, made if need be.")
    data_dump_flag: bool = flag(False, "NPU: dump operators' inputs and outputs (ModelZoo).")
    data_dump_step: str = flag("10", "NPU: the steps to dump, as in 0|5|10.")
    data_dump_path: str = flag("data_dump", "NPU: folder for --data_dump_flag, made if need be.")
    profiling: bool = flag(False, "NPU: collect a profile (ModelZoo).")
    profiling_dump_path: str = flag("profiling", "NPU: folder for --profiling, made if need be.")
    auto_tune: bool = flag(False, "Accepted for ModelZoo's scripts, without effect: the current adapter no longer has it.",
                           alias="autotune")


def open_device(options: Options, alone: bool = False) -> Device:
    """Open the device that the flags ask for; UserError if it is not there or does not know the precision.

    alone: for a command that is no worker among others. UserError if TF_CONFIG says that it is one.
    Must come before any tensor or variable: what exists before an NPU is opened is unusable on it.
    """
    if options.auto_tune:
        logging.warning("--auto_tune has no effect: the current NPU adapter no longer has it.")
    if options.device == "npu" or options.device == "auto" and importlib.util.find_spec("npu_device"):
        from devices import ascend  # only now: elsewhere there is no adapter to import

        try:
            return ascend.open_npu(options)
        except ascend.NoDeviceError as error:
            if options.device == "npu":
                raise
            logging.warning("Going on without the NPU. %s", error)
    for name in NPU_FLAGS:
        if getattr(options, name):
            logging.warning("--%s has no effect without an NPU.", name)
    try:
        with commands.quiet_start():
            return host.open_host(options, alone)
    except RuntimeError as error:  # as in a notebook: some settings must come before TensorFlow's first operation
        raise UserError("--device and --num_devices cannot be changed where TensorFlow is at work already (%s); start Python anew."
                        % " ".join(str(error).split()).rstrip("."))


if __name__ == "__main__":
    sys.exit("To tell whether an Ascend 910 can take the training loop whole: python pretraining.py --check_npu "
             "[--npu_ops FILE], with the flags of the run.")

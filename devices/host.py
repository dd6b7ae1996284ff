"""The CPU or the GPUs of this machine: found, set up for a precision, and through replicas.py taken together as one."""
from typing import Any, Optional, Sequence, Tuple

import tensorflow as tf

from commands import UserError
from devices import convolutions, replicas
from devices.base import Device
from models import keras

# Whether TensorFlow has bfloat16 convolutions on the CPU, as 2.6.5 has not: told by a function of Keras 2.7.
BFLOAT16_ON_CPU = hasattr(keras.utils, "set_random_seed")


def open_host(options: Any, alone: bool) -> Device:
    """The CPU or GPUs that npu_config.Options ask for; UserError if they are not there. alone: as for npu_config.open_device."""
    gpus = tf.config.list_physical_devices("GPU") if options.device != "cpu" else []
    if options.device == "gpu" and not gpus:
        raise UserError("--device gpu, but TensorFlow %s sees no GPU here; use --device cpu, or install a TensorFlow with "
                        "CUDA: pip install 'tensorflow[and-cuda]'." % tf.__version__)
    half, advice = _half(options, gpus)
    if options.device == "cpu":
        tf.config.set_visible_devices([], "GPU")
    for gpu in gpus:
        tf.config.experimental.set_memory_growth(gpu, True)
    kind = "gpu" if gpus else "cpu"
    device = replicas.open_replicas(kind, gpus, options, alone) or Device(kind, options.loss_scale, options.jit_compile)
    device.half, device.advice = half, advice
    if half and kind == "cpu":
        device.convolution = convolutions.Conv2D
    keras.mixed_precision.set_global_policy("mixed_" + half if half else "float32")
    return device


def _half(options: Any, gpus: Sequence[Any]) -> Tuple[Optional[str], Optional[str]]:
    """What CPU or GPU compute in where the precision mode allows it, and what to tell the user about it."""
    mode = options.precision_mode or ("allow_mix_precision" if gpus else "must_keep_origin_dtype")
    if mode not in ("allow_mix_precision", "must_keep_origin_dtype"):
        raise UserError("--precision_mode %s is known to the NPU only; on %s give allow_mix_precision or "
                        "must_keep_origin_dtype." % (mode, "GPU" if gpus else "CPU"))
    if gpus:
        if mode == "must_keep_origin_dtype":
            return None, None
        details = tf.config.experimental.get_device_details(gpus[0])
        return "bfloat16" if details.get("compute_capability", (0, 0)) >= (8, 0) else "float16", None
    fast = BFLOAT16_ON_CPU and processor_has_bfloat16()
    if mode == "must_keep_origin_dtype":
        return None, ("This processor has bfloat16 instructions: --precision_mode allow_mix_precision would be faster."
                      if fast and not options.precision_mode else None)
    # Emulated, a step takes five times as long as in float32.
    return ("bfloat16", None) if fast else (None, "Computing in float32: %s." % (
        "this processor has no bfloat16 instructions" if BFLOAT16_ON_CPU else
        "TensorFlow %s has no bfloat16 convolutions on the CPU" % tf.__version__))


def processor_has_bfloat16() -> bool:
    """Whether Linux lists bfloat16 instructions among the processor's flags (x86: avx512_bf16, amx_bf16; Arm: bf16)."""
    try:
        with open("/proc/cpuinfo") as file:
            words = set(file.read().split())
    except OSError:
        return False
    return bool(words & {"avx512_bf16", "amx_bf16", "bf16"})

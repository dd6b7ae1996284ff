"""Which device computes, at which precision: CPU, GPU or Ascend 910; one, or several together.

`open_device` is called once, early in each command, before any tensor or variable exists. The object it gives is all
that the other modules know of devices: where variables live, how a step runs on every replica, how the loss is scaled
and gradients are averaged, which rows of a batch are made here, who writes files. What only the NPU needs is in ascend.py,
what only several CPUs or GPUs need in distribution.py.

    python npu_config.py --check --npu_ops ops.txt

tells, without an NPU, whether the training loop is one that an Ascend 910 can take whole (see graph_check.py).
"""
import contextlib
import dataclasses
import importlib.util
from typing import Any, Callable, ContextManager, Iterator, List, Optional, Sequence, Tuple

import commands  # before TensorFlow, whose start it quiets

# isort: split

import tensorflow as tf
from absl import logging

from commands import UserError, flag
from models import keras

SECONDS_A_CALL = 2.0  # that a call of the training loop takes at most, or one step if that takes longer
# Whether TensorFlow has bfloat16 convolutions on the CPU, as 2.6.5 has not: told by a function of Keras 2.7.
BFLOAT16_ON_CPU = hasattr(keras.utils, "set_random_seed")
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
        "it, else mixed_float16; on CPU it is mixed_bfloat16.", choices=PRECISION_MODES)
    loss_scale: str = flag("auto", "auto, dynamic, none, or a number. auto: dynamic where something is computed in float16, "
                           "else none.")
    num_devices: int = flag(1, "GPUs (or logical CPU devices) of this machine to train on together; with TF_CONFIG, of each "
                            "worker. NPUs take one process each.", low=1)
    sync_batch_norm: bool = flag(True, "With several devices: BatchNorm statistics over the global batch, so that n devices "
                                 "compute what one would; --nosync_batch_norm: over each device's rows. On NPU always the latter.")
    jit_compile: bool = flag(False, "Compile the training loop with XLA; meant for one GPU, without effect on NPU.")
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
    auto_tune: bool = flag(False, "Accepted for ModelZoo's scripts, without effect: the current adapter no longer has it.")


class Device:
    """A CPU or GPU; the base of the NPU's, and of several CPUs or GPUs as one.

    kind: 'cpu', 'gpu' or 'npu'. workers, worker_id: processes that train together, and which one this is.
    replicas: devices that share each global batch, over all workers. half: what is computed in where the precision mode
    allows it, 'float16', 'bfloat16' or None. advice: a line that the user should see once, or None. batch_norm,
    convolution: the networks' layers, classes whose weights are those of Keras's BatchNormalization and Conv2D.
    """

    def __init__(self, kind: str, options: Options) -> None:
        self.kind = kind
        self.options = options
        self.replicas = self.workers = 1
        self.worker_id = 0
        self.batch_norm = keras.layers.BatchNormalization  # type: Any
        self.convolution = keras.layers.Conv2D  # type: Any
        self.half = None  # type: Optional[str]
        self.advice = None  # type: Optional[str]

    # Placement

    @property
    def is_chief(self) -> bool:
        """Whether this process writes files and prints."""
        return self.worker_id == 0

    @property
    def restores(self) -> bool:
        """Whether this process reads checkpoints itself, rather than be given the chief's values by `broadcast`."""
        return True

    @property
    def knn_every(self) -> int:
        """Epochs between k-NN evaluations by default: on a CPU, where one takes as long as many steps, only at the end."""
        return 0 if self.kind == "cpu" else 10

    def scope(self) -> ContextManager[Any]:
        """Where networks and the optimiser are made."""
        return contextlib.nullcontext()

    def host(self) -> ContextManager[Any]:
        """Where data sets and what they hold are made, whatever the default device is. Networks cannot run inside."""
        return tf.device("CPU:0")

    def keep_float32(self) -> ContextManager[Any]:
        """Operators made inside stay in the precision that they are written in."""
        return contextlib.nullcontext()

    def set_seed(self, seed: int) -> None:
        """Seed initial weights. On NPU a seed set before the device was opened would be lost."""
        if hasattr(keras.utils, "set_random_seed"):
            keras.utils.set_random_seed(seed)
        else:
            tf.random.set_seed(seed)

    def describe(self) -> str:
        """For example `GPU in mixed_float16, 2 replicas`."""
        policy = keras.mixed_precision.global_policy().name
        return "%s in %s%s" % (self.kind.upper(), policy, ", %d replicas" % self.replicas if self.replicas > 1 else "")

    # The step

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function as a graph."""
        return tf.function(function, jit_compile=True) if self.options.jit_compile else tf.function(function)

    def run(self, function: Callable[..., Any], args: Tuple[Any, ...]) -> Any:
        """Run `function` on every replica, each with its rows, and give the mean of its results, a tuple of scalars."""
        return function(*args)

    def mean(self, tensor: tf.Tensor) -> tf.Tensor:
        """Within what `run` runs: the mean over the replicas. On NPU, where BatchNorm is each device's own as well, its own."""
        return tensor

    def update(self, variable: tf.Variable, function: Callable[..., Any], *arguments: Any) -> None:
        """Call function(variable, *arguments), which assigns to the variable, on each replica with its copies of these variables."""
        function(variable, *arguments)

    def loss_scaled(self, optimizer: Any) -> Any:
        """The optimiser, wrapped in loss scaling if precision or flag ask for it."""
        scale = self._loss_scale()
        if scale is None:
            return optimizer
        if scale == "dynamic":
            return self._loss_scale_optimizer()(optimizer)
        return self._loss_scale_optimizer()(optimizer, dynamic=False, initial_scale=scale)

    def _loss_scale_optimizer(self) -> Any:
        return keras.mixed_precision.LossScaleOptimizer

    def _loss_scale(self) -> Any:
        """None, 'dynamic' or a fixed number."""
        value = self.options.loss_scale
        if value == "auto":
            return "dynamic" if self.half == "float16" else None
        if value in ("dynamic", "none"):
            return None if value == "none" else value
        try:
            number = float(value)
        except ValueError:
            number = 0.0
        if not 0 < number < float("inf"):
            raise UserError("--loss_scale is %s: give auto, dynamic, none or a number above 0." % value)
        return number

    def apply_gradients(self, optimizer: Any, loss: tf.Tensor, tape: Any, weights: Sequence[tf.Variable]) -> None:
        """One optimiser step on the mean over all replicas of the gradients of `loss`.

        `loss` is as `scale_loss` gave it, made under `tape`.
        """
        gradients = tape.gradient(loss, weights)
        with self.keep_float32():
            if hasattr(optimizer, "get_unscaled_gradients"):
                gradients = optimizer.get_unscaled_gradients(gradients)
            self._apply(optimizer, gradients, weights)

    def _apply(self, optimizer: Any, gradients: List[tf.Tensor], weights: Sequence[tf.Variable]) -> None:
        optimizer.apply_gradients(zip(gradients, weights))

    def scale_loss(self, optimizer: Any, loss: tf.Tensor) -> tf.Tensor:
        """The loss to differentiate: times the loss scale, where there is one."""
        return optimizer.get_scaled_loss(loss) if hasattr(optimizer, "get_scaled_loss") else loss

    # The loop and its data

    def steps_a_call(self, steps: int, seconds_a_step: Optional[float]) -> int:
        """How many of the next `steps` one call of the loop should take, so that it returns soon enough to answer Ctrl-C.

        seconds_a_step: as the last call took them; None before the first.
        """
        return max(1, min(steps, int(SECONDS_A_CALL / seconds_a_step))) if seconds_a_step else 1

    def set_loop_size(self, steps: int) -> None:
        """Announce how many steps the next call of the training loop takes; only the NPU wants to know."""

    def broadcast(self, variables: Sequence[tf.Variable]) -> None:
        """Give every worker the chief's values, once they are as the training starts from."""

    def gather(self, number: float) -> List[float]:
        """Every worker's number, in their order, for all to decide alike. On NPU only its own."""
        return [number]

    def together(self) -> ContextManager[Any]:
        """What is done inside needs all workers: UserError if another one is lost."""
        return contextlib.nullcontext()

    def rows(self, batch_size: int) -> Tuple[int, int]:
        """(first, count): the rows of each global batch that this worker makes. UserError if they do not come out even."""
        if batch_size % self.replicas:
            raise UserError("--batch_size %d is not a multiple of the %d devices that share it." % (batch_size, self.replicas))
        count = batch_size // self.workers
        return self.worker_id * count, count

    def iterate(self, batches: tf.data.Dataset) -> Iterator[Any]:
        """An iterator for the training loop over this worker's batches, one element a replica where there are several."""
        return iter(batches)


def open_device(options: Options, alone: bool = False) -> Device:
    """Open the device that the flags ask for; UserError if it is not there or does not know the precision.

    alone: for a command that is no worker among others. UserError if TF_CONFIG says that it is one.
    Must come before any tensor or variable: what exists before an NPU is opened is unusable on it.
    """
    if options.auto_tune:
        logging.warning("--auto_tune has no effect: the current NPU adapter no longer has it.")
    if options.device == "npu" or options.device == "auto" and importlib.util.find_spec("npu_device"):
        import ascend  # only now: elsewhere there is no adapter to import

        try:
            return ascend.open_npu(options)
        except ascend.NoDeviceError as error:
            if options.device == "npu":
                raise
            logging.warning("Going on without the NPU. %s", error)
    for name in NPU_FLAGS:
        if getattr(options, name):
            logging.warning("--%s has no effect without an NPU.", name)
    with commands.quiet_start():
        return _open_host(options, alone)


def _open_host(options: Options, alone: bool) -> Device:
    """The CPU or the GPUs, through tf.distribute where they are several."""
    gpus = tf.config.list_physical_devices("GPU") if options.device != "cpu" else []
    if options.device == "gpu" and not gpus:
        raise UserError("--device gpu, but TensorFlow %s sees no GPU here; use --device cpu, or install a TensorFlow with "
                        "CUDA: pip install 'tensorflow[and-cuda]'." % tf.__version__)
    half, advice = _half(options, gpus)
    if options.device == "cpu":
        tf.config.set_visible_devices([], "GPU")
    for gpu in gpus:
        tf.config.experimental.set_memory_growth(gpu, True)
    import distribution  # only now: it builds on this module

    kind = "gpu" if gpus else "cpu"
    device = distribution.open_replicas(kind, gpus, options, alone) or Device(kind, options)
    device.half, device.advice = half, advice
    if half and kind == "cpu":
        import convolutions  # only now: elsewhere Keras's own is used

        device.convolution = convolutions.Conv2D
    keras.mixed_precision.set_global_policy("mixed_" + half if half else "float32")
    return device


def _half(options: Options, gpus: Sequence[Any]) -> Tuple[Optional[str], Optional[str]]:
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
    fast = processor_has_bfloat16()
    if mode == "must_keep_origin_dtype":
        return None, ("This processor has bfloat16 instructions: --precision_mode allow_mix_precision would be faster."
                      if fast and BFLOAT16_ON_CPU and not options.precision_mode else None)
    if not BFLOAT16_ON_CPU:
        raise UserError("--precision_mode allow_mix_precision: TensorFlow %s has no bfloat16 convolutions on the CPU; use "
                        "must_keep_origin_dtype here, or a current TensorFlow." % tf.__version__)
    return "bfloat16", None if fast else ("This processor has no bfloat16 instructions: --precision_mode "
                                          "allow_mix_precision is slower than must_keep_origin_dtype here.")


def processor_has_bfloat16() -> bool:
    """Whether Linux lists bfloat16 instructions among the processor's flags (x86: avx512_bf16, amx_bf16; Arm: bf16)."""
    try:
        with open("/proc/cpuinfo") as file:
            words = set(file.read().split())
    except OSError:
        return False
    return bool(words & {"avx512_bf16", "amx_bf16", "bf16"})


if __name__ == "__main__":
    import graph_check

    commands.define_flags(graph_check.Config)
    commands.run(graph_check.main)

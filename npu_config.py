"""Which device computes, at which precision: CPU, GPU or Ascend 910; one, or several together.

`open_device` is called once, early in each command, before any tensor or variable exists. The object it gives is all
that the other modules know of devices: where variables live, how a step runs on every replica, how the loss is scaled
and gradients are averaged, which rows of a batch are made here, who writes files.

    python npu_config.py --check --npu_ops ops.txt

tells, without an NPU, whether the training loop is one that an Ascend 910 can take whole (see `check_graph`).
"""
import contextlib
import dataclasses
import importlib.util
import json
import os
from typing import Any, Callable, ContextManager, Iterator, List, Optional, Sequence, Tuple

import commands
import tensorflow as tf
from absl import logging
from commands import UserError, flag
from models import keras

PRECISION_MODES = ("allow_fp32_to_fp16", "allow_mix_precision", "allow_mix_precision_fp16", "allow_mix_precision_bf16",
                   "cube_fp16in_fp32out", "force_fp16", "force_fp32", "must_keep_origin_dtype")
# What an Ascend 910 can train in: it has no bfloat16, and force_fp16 is for inference.
NPU_MODES = ("allow_fp32_to_fp16", "allow_mix_precision", "allow_mix_precision_fp16", "cube_fp16in_fp32out",
             "force_fp32", "must_keep_origin_dtype")
MIXED_MODES = ("allow_mix_precision", "allow_mix_precision_fp16")
INSTALL_NPU = ("install the wheel npu_device-2.6.5 of your CANN version under Python 3.7 to 3.9 with TensorFlow 2.6.5, add "
               "its folder to PYTHONPATH, and run `source /usr/local/Ascend/cann/set_env.sh`; or use --device cpu")


@dataclasses.dataclass(frozen=True)
class Options:
    """Flags of the device, the base of every command's settings."""
    device: str = flag("auto", "Where to compute. auto: the NPU if npu_device imports and opens, else a GPU, else the CPU.",
                       choices=("auto", "cpu", "gpu", "npu"))
    precision_mode: Optional[str] = flag(
        None, "Precision, by the NPU adapter's names. Default: allow_mix_precision on NPU (ModelZoo README) and GPU, "
        "must_keep_origin_dtype (float32) on CPU. allow_mix_precision on GPU is Keras's mixed_bfloat16 where the GPU has "
        "it, else mixed_float16; on CPU it is mixed_bfloat16.", choices=PRECISION_MODES)
    loss_scale: str = flag("auto", "auto, dynamic, none, or a number. auto: dynamic where the precision is float16, else none.")
    num_devices: int = flag(1, "GPUs (or logical CPU devices) of this machine to train on together.", low=1)
    sync_batch_norm: bool = flag(True, "With several devices: BatchNorm statistics over the global batch, so that n devices "
                                 "compute what one would. On NPU they stay per device.")
    jit_compile: bool = flag(False, "Compile the training loop with XLA; meant for the GPU.")
    hcom_parallel: bool = flag(False, "NPU: overlap all-reduce and computation. Huawei's tuning guide advises False for small "
                               "networks, naming ResNet-18; it matters on several devices only.")
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
    """A CPU or GPU, or several as one through tf.distribute; the base of the NPU's.

    kind: 'cpu', 'gpu' or 'npu'. workers, worker_id: processes that train together, and which one this is.
    replicas: devices that share each global batch, over all workers.
    """

    def __init__(self, kind: str, strategy: Any, options: Options) -> None:
        self.kind = kind
        self.strategy = strategy
        self.options = options
        self.replicas = strategy.num_replicas_in_sync
        resolver = getattr(strategy, "cluster_resolver", None)
        multi_worker = isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy)
        self.workers = len(resolver.cluster_spec().as_dict()["worker"]) if multi_worker else 1
        self.worker_id = resolver.task_id if multi_worker else 0
        self.half = None  # type: Optional[str]

    # Placement

    @property
    def is_chief(self) -> bool:
        """Whether this process writes files and prints."""
        return self.worker_id == 0

    def scope(self) -> ContextManager[Any]:
        """Where networks and the optimiser are made."""
        return self.strategy.scope()

    def host(self) -> ContextManager[Any]:
        """Where data sets are made, whatever the default device is."""
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
        results = self.strategy.run(function, args)
        return tuple(self.strategy.reduce(tf.distribute.ReduceOp.MEAN, result, axis=None) for result in results)

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
        if hasattr(optimizer, "get_unscaled_gradients"):
            gradients = optimizer.get_unscaled_gradients(gradients)
        self._apply(optimizer, gradients, weights)

    def _apply(self, optimizer: Any, gradients: List[tf.Tensor], weights: Sequence[tf.Variable]) -> None:
        if self.replicas > 1:
            gradients = tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.MEAN, gradients)
            optimizer.apply_gradients(zip(gradients, weights), experimental_aggregate_gradients=False)
        else:
            optimizer.apply_gradients(zip(gradients, weights))

    def scale_loss(self, optimizer: Any, loss: tf.Tensor) -> tf.Tensor:
        """The loss to differentiate: times the loss scale, where there is one."""
        return optimizer.get_scaled_loss(loss) if hasattr(optimizer, "get_scaled_loss") else loss

    # The loop and its data

    def set_loop_size(self, steps: int) -> None:
        """Announce how many steps the next call of the training loop takes; only the NPU wants to know."""

    def broadcast(self, variables: Sequence[tf.Variable]) -> None:
        """Give every worker the chief's values. tf.distribute does so as variables are made."""

    def rows(self, batch_size: int) -> Tuple[int, int]:
        """(first, count): the rows of each global batch that this worker makes. UserError if they do not come out even."""
        if batch_size % self.replicas:
            raise UserError("--batch_size %d is not a multiple of the %d devices that share it." % (batch_size, self.replicas))
        count = batch_size // self.workers
        return self.worker_id * count, count

    def iterate(self, batches: tf.data.Dataset) -> Iterator[Any]:
        """An iterator for the training loop over this worker's batches, one element a replica where there are several."""
        local = self.replicas // self.workers
        if self.replicas == 1:
            return iter(batches)
        if local > 1:
            batches = batches.map(lambda *views: tuple(
                tf.reshape(view, [local, view.shape[0] // local] + view.shape[1:]) for view in views)).unbatch()
        return iter(self.strategy.distribute_datasets_from_function(lambda context: batches))


class NpuDevice(Device):
    """An Ascend 910 through npu_device, one a process; several through HCCL. Made from the adapter's documentation and
    from runs on an emulated engine; not tried on hardware."""

    def __init__(self, npu: Any, handle: Any, options: Options, half: Optional[str]) -> None:
        super().__init__("npu", tf.distribute.get_strategy(), options)
        self.npu = npu
        self.workers = self.replicas = handle.workers_num
        self.worker_id = handle.worker_id
        self.half = half
        self._loop_size = 0

    def host(self) -> ContextManager[Any]:
        from tensorflow.python.eager import context  # tf.device is a no-op once the NPU is the default device

        return context.device("CPU:0")

    def keep_float32(self) -> ContextManager[Any]:
        return self.npu.keep_dtype_scope()

    def describe(self) -> str:
        return "NPU in %s%s" % (self.options.precision_mode or "allow_mix_precision",
                                ", %d replicas" % self.replicas if self.replicas > 1 else "")

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return tf.function(function)

    def run(self, function: Callable[..., Any], args: Tuple[Any, ...]) -> Any:
        return function(*args)

    def _loss_scale_optimizer(self) -> Any:
        # An overflow on the 910 saturates instead of giving Inf, so Keras's own loss scaling would not see it.
        return self.npu.train.optimizer.NpuLossScaleOptimizer

    def _apply(self, optimizer: Any, gradients: List[tf.Tensor], weights: Sequence[tf.Variable]) -> None:
        if self.workers > 1:
            gradients = self.npu.distribute.all_reduce(gradients, reduction="mean")
        optimizer.apply_gradients(zip(gradients, weights))

    def set_loop_size(self, steps: int) -> None:
        # An npu-loop takes exactly this many steps and batches, whatever the range in the graph says.
        if steps != self._loop_size:
            self.npu.set_npu_loop_size(steps)
            self._loop_size = steps

    def broadcast(self, variables: Sequence[tf.Variable]) -> None:
        if self.workers > 1:
            self.npu.distribute.broadcast(list(variables), root_rank=0)

    def iterate(self, batches: tf.data.Dataset) -> Iterator[Any]:
        return iter(batches)


def open_device(options: Options) -> Device:
    """Open the device that the flags ask for; UserError if it is not there or does not know the precision.

    Must come before any tensor or variable: what exists before an NPU is opened is unusable on it.
    """
    if options.auto_tune:
        logging.warning("--auto_tune has no effect: the current NPU adapter no longer has it.")
    if options.device == "npu":
        return _open_npu(options)
    if options.device == "auto" and importlib.util.find_spec("npu_device"):
        try:
            return _open_npu(options)
        except UserError as error:
            logging.warning("Going on without the NPU: %s", error)
    return _open_host(options)


def _open_host(options: Options) -> Device:
    """The CPU or the GPUs, through tf.distribute where they are several."""
    gpus = tf.config.list_physical_devices("GPU") if options.device != "cpu" else []
    if options.device == "gpu" and not gpus:
        raise UserError("--device gpu, but TensorFlow %s sees no GPU here; use --device cpu, or install a TensorFlow with "
                        "CUDA: pip install 'tensorflow[and-cuda]'." % tf.__version__)
    kind = "gpu" if gpus else "cpu"
    half = _half(options, gpus)
    if options.device == "cpu":
        tf.config.set_visible_devices([], "GPU")
    for gpu in gpus:
        tf.config.experimental.set_memory_growth(gpu, True)
    device = Device(kind, _strategy(options, gpus), options)
    device.half = half
    keras.mixed_precision.set_global_policy("mixed_" + half if half else "float32")
    return device


def _half(options: Options, gpus: Sequence[Any]) -> Optional[str]:
    """'float16', 'bfloat16' or None: what CPU or GPU compute in where the precision mode allows it."""
    mode = options.precision_mode or ("allow_mix_precision" if gpus else "must_keep_origin_dtype")
    if mode not in ("allow_mix_precision", "must_keep_origin_dtype"):
        raise UserError("--precision_mode %s is known to the NPU only; on %s give allow_mix_precision or "
                        "must_keep_origin_dtype." % (mode, "GPU" if gpus else "CPU"))
    if gpus:
        if mode == "must_keep_origin_dtype":
            return None
        details = tf.config.experimental.get_device_details(gpus[0])
        return "bfloat16" if details.get("compute_capability", (0, 0)) >= (8, 0) else "float16"
    fast = _processor_has_bfloat16()
    modern = keras is not tf.keras or hasattr(keras.utils, "set_random_seed")  # 2.6.5 has no bfloat16 convolution
    if mode == "allow_mix_precision":
        if not modern:
            raise UserError("--precision_mode allow_mix_precision: TensorFlow %s has no bfloat16 convolutions on the CPU; use "
                            "must_keep_origin_dtype here, or a current TensorFlow." % tf.__version__)
        if not fast:
            logging.warning("This processor has no bfloat16 instructions: allow_mix_precision will be slower than float32.")
        return "bfloat16"
    if fast and modern and options.precision_mode is None:
        logging.info("This processor has bfloat16 instructions: --precision_mode allow_mix_precision would be faster.")
    return None


def _processor_has_bfloat16() -> bool:
    """Whether Linux lists bfloat16 instructions among the processor's flags (x86: avx512_bf16, amx_bf16; Arm: bf16)."""
    try:
        with open("/proc/cpuinfo") as file:
            words = set(file.read().split())
    except OSError:
        return False
    return bool(words & {"avx512_bf16", "amx_bf16", "bf16"})


def _strategy(options: Options, gpus: Sequence[Any]) -> Any:
    """tf.distribute's strategy for the machines of TF_CONFIG, the devices of this one, or a single device."""
    if "TF_CONFIG" in os.environ:
        return tf.distribute.MultiWorkerMirroredStrategy()
    if options.num_devices == 1:
        return tf.distribute.get_strategy()
    if gpus:
        if options.num_devices > len(gpus):
            raise UserError("--num_devices %d, but TensorFlow sees %d GPUs." % (options.num_devices, len(gpus)))
        return tf.distribute.MirroredStrategy(["GPU:%d" % i for i in range(options.num_devices)])
    parts = [tf.config.LogicalDeviceConfiguration() for _ in range(options.num_devices)]
    tf.config.set_logical_device_configuration(tf.config.list_physical_devices("CPU")[0], parts)
    return tf.distribute.MirroredStrategy(["CPU:%d" % i for i in range(options.num_devices)])


def _open_npu(options: Options) -> Device:
    """The Ascend 910: options first, then open(), then as_default(). UserError if any of it cannot be."""
    mode = options.precision_mode or "allow_mix_precision"
    if mode not in NPU_MODES:
        raise UserError("--precision_mode %s: an Ascend 910 trains in one of %s." % (mode, ", ".join(NPU_MODES)))
    os.environ.setdefault("JOB_ID", "byol")
    try:
        import npu_device as npu
    except Exception as error:  # a missing package, a missing CANN library, or a TensorFlow that it was not built for
        raise UserError("--device npu: cannot import npu_device under TensorFlow %s (%s); %s."
                        % (tf.__version__, " ".join(str(error).split()), INSTALL_NPU))
    try:
        _set_npu_options(npu.global_options(), options, mode)
        handle = npu.open().as_default()
    except (ValueError, TypeError, RuntimeError) as error:
        raise UserError("--device npu: the NPU adapter refused (%s); see the plog files under $HOME/ascend/log, or use "
                        "--device cpu." % " ".join(str(error).split()))
    half = "float16" if mode in MIXED_MODES + ("allow_fp32_to_fp16",) else None
    return NpuDevice(npu, handle, options, half)


def _set_npu_options(target: Any, options: Options, mode: str) -> None:
    """Set what we rely on, and only that: defaults differ between versions of the adapter, and so do the names it has."""
    target.precision_mode = mode
    target.graph_run_mode = 1
    target.hcom_parallel = options.hcom_parallel
    if options.use_mixlist:
        if mode not in MIXED_MODES:
            raise UserError("--use_mixlist goes with --precision_mode allow_mix_precision, not with %s." % mode)
        target.modify_mixlist = _existing("mixlist_file", options.mixlist_file)
    if options.fusion_off_flag:
        target.fusion_switch_file = _existing("fusion_off_file", options.fusion_off_file)
    if options.over_dump and options.data_dump_flag:
        raise UserError("--over_dump and --data_dump_flag cannot be used together; choose one.")
    if options.over_dump:
        target.dump_config.enable_dump_debug = True
        target.dump_config.dump_path = _folder(options.over_dump_path)
        target.dump_config.dump_debug_mode = "all"
    if options.data_dump_flag:
        target.dump_config.enable_dump = True
        target.dump_config.dump_path = _folder(options.data_dump_path)
        target.dump_config.dump_step = options.data_dump_step
        target.dump_config.dump_mode = "all"
    if options.profiling:
        target.profiling_config.enable_profiling = True
        target.profiling_config.profiling_options = json.dumps(
            {"output": _folder(options.profiling_dump_path), "training_trace": "on", "task_trace": "on"})


def _existing(name: str, path: str) -> str:
    if not os.path.isfile(path):
        raise UserError("--%s: there is no file %s." % (name, path))
    return os.path.abspath(path)


def _folder(path: str) -> str:
    """The adapter wants these folders to exist."""
    return commands.make_folder(os.path.abspath(path))

"""The Ascend 910 through Huawei's adapter npu_device: one device a process, several processes through HCCL.

Only npu_config imports this module, and only where an NPU is wanted: importing the adapter takes the device's libraries. Built from
the adapter's documentation and source and from runs over an emulated graph engine; not tried on hardware.
"""
import contextlib
import json
import os
import sys
import threading
from typing import Any, Callable, ContextManager, Iterator, List, Optional, Sequence, Tuple

import numpy as np
import tensorflow as tf
from absl import logging

import commands
from commands import UserError
from devices.base import Device

# What an Ascend 910 can train in: it has no bfloat16, and force_fp16 is for inference.
MODES = ("allow_fp32_to_fp16", "allow_mix_precision", "allow_mix_precision_fp16", "cube_fp16in_fp32out", "force_fp32",
         "must_keep_origin_dtype")
MIXED_MODES = ("allow_mix_precision", "allow_mix_precision_fp16")
DEFAULT_MODE = "allow_mix_precision"
INSTALL = ("install TensorFlow 2.6.5 under Python 3.7 to 3.9 and the wheel npu_device-2.6.5 that belongs to your CANN, add the "
           "wheel's folder to PYTHONPATH, and run `source /usr/local/Ascend/cann/set_env.sh`; or use --device cpu")

# Seconds that a rank waits for the others before it ends: the variable that sets them, and what they are without it.
RANK_TIMEOUT = "BYOL_RANK_TIMEOUT"
RANK_SECONDS = "600"


class NoDeviceError(UserError):
    """There is no adapter, or it finds no NPU; --device auto goes on without."""


class NpuDevice(Device):
    """One Ascend 910, and through HCCL the others that train with it.

    npu: the adapter's module; handle: what its open() gave; mode: one of MODES.
    """

    def __init__(self, npu: Any, handle: Any, mode: str, loss_scale: str = "auto") -> None:
        super().__init__("npu", loss_scale)
        self.npu = npu
        self.handle = handle
        self.mode = mode
        self.workers = self.replicas = handle.workers_num
        self.worker_id = handle.worker_id
        # In every other mode matrix products and convolutions take float16, so that small gradients could vanish.
        self.half = None if mode == "must_keep_origin_dtype" else "float16"
        self._loop_size = 0
        self._sum = tf.function(self._sum_over_ranks, autograph=False)  # type: Any

    @property
    def restores(self) -> bool:
        return self.is_chief

    def host(self) -> ContextManager[Any]:
        from tensorflow.python.eager import context

        return context.device("CPU:0")  # tf.device does nothing any more once the NPU is the default device

    def keep_float32(self) -> ContextManager[Any]:
        return self.npu.keep_dtype_scope()

    def describe(self) -> str:
        return "NPU in %s%s" % (self.mode, ", %d replicas" % self.replicas if self.replicas > 1 else "")

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        compiled = tf.function(function)
        if self.workers == 1:
            return compiled

        def with_the_others(*args: Any) -> Any:
            with self._awaiting_others():
                return compiled(*args)

        return with_the_others

    def run(self, function: Callable[..., Any], args: Tuple[Any, ...]) -> Any:
        results = function(*args)
        return tuple(self.npu.distribute.all_reduce(list(results), reduction="mean")) if self.workers > 1 else results

    def loss_scaled(self, optimizer: Any) -> Any:
        apply = optimizer.apply_gradients

        def apply_in_float32(*args: Any, **settings: Any) -> Any:
            # Loss scaling applies gradients in a branch, which is a graph of its own: the scope around it does not reach inside.
            with self.keep_float32():
                return apply(*args, **settings)

        optimizer.apply_gradients = apply_in_float32
        return super().loss_scaled(optimizer)

    def _loss_scale_optimizer(self) -> Any:
        # An overflow on the 910 saturates instead of giving Inf, so Keras's own loss scaling would not see it.
        return self.npu.train.optimizer.NpuLossScaleOptimizer

    def skipped(self, optimizer: Any, before: tf.Tensor) -> tf.Tensor:
        finite = getattr(optimizer, "last_step_finite", None)  # which adapters of early 2022 lack
        return super().skipped(optimizer, before) if finite is None else 1.0 - tf.cast(finite, tf.float32)

    def _apply(self, optimizer: Any, gradients: List[tf.Tensor], weights: Sequence[tf.Variable]) -> None:
        if self.workers > 1:
            gradients = self.npu.distribute.all_reduce(gradients, reduction="mean")
        optimizer.apply_gradients(list(zip(gradients, weights)))  # older adapters go through it twice

    def steps_a_call(self, steps: int, seconds_a_step: Optional[float]) -> int:
        return steps  # each other number would be announced anew, and the device is fast

    def set_loop_size(self, steps: int) -> None:
        # An npu-loop takes exactly this many steps and batches, whatever the range in the graph says.
        if steps != self._loop_size:
            self.npu.set_npu_loop_size(steps)
            self._loop_size = steps

    def broadcast(self, variables: Sequence[tf.Variable]) -> None:
        if self.workers == 1:
            return
        # Counters are int64, which is not among the types that HCCL is documented to take: they travel as int32.
        wide = [variable for variable in variables if variable.dtype == tf.int64]
        narrow = [tf.Variable(tf.cast(variable, tf.int32), trainable=False) for variable in wide]
        with self._awaiting_others():
            self.npu.distribute.broadcast([v for v in variables if v.dtype != tf.int64] + narrow, root_rank=0)
        for variable, value in zip(wide, narrow):
            variable.assign(tf.cast(value, tf.int64))

    def gather(self, number: float) -> List[float]:
        if self.workers == 1:
            return [number]
        # HCCL takes no float64, and a sum of float32 would round: the 64 bits travel as four numbers of 16, in int32.
        parts = np.zeros([self.workers, 4], np.int32)
        parts[self.worker_id] = np.frombuffer(np.float64(number).tobytes(), np.uint16)
        with self._awaiting_others():
            everyone = self._sum(tf.constant(parts)).numpy()
        return [float(each) for each in np.frombuffer(everyone.astype(np.uint16).tobytes(), np.float64)]

    def _sum_over_ranks(self, values: tf.Tensor) -> tf.Tensor:
        return self.npu.distribute.all_reduce([values], reduction="sum")[0]

    @contextlib.contextmanager
    def _awaiting_others(self) -> Iterator[None]:
        """What is done inside needs the other ranks: if it takes too long, this process ends with one line.

        A thread does it, for nothing else gets through to a process that waits in HCCL.
        """
        seconds = float(os.environ.get(RANK_TIMEOUT, RANK_SECONDS))

        def end() -> None:
            sys.stderr.write("%s: Rank %d has waited %g seconds for the other ranks, of which one has ended, failed or hangs, so it "
                             "ends too. Start all ranks again with the same commands: they go on from the newest checkpoint. %s sets "
                             "the seconds.\n" % (os.path.basename(sys.argv[0]), self.worker_id, seconds, RANK_TIMEOUT))
            sys.stderr.flush()
            os._exit(1)

        timer = threading.Timer(seconds, end)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def iterate(self, batches: tf.data.Dataset) -> Iterator[Any]:
        # The adapter feeds the device only from iterators that were made on it, even where the data set is on the host.
        with self.handle.scope():
            return iter(batches)


def open_npu(options: Any) -> NpuDevice:
    """The NPU that npu_config.Options ask for: options first, then open(), then as_default().

    NoDeviceError if there is no NPU to be had, UserError for wrong settings.
    """
    mode = options.precision_mode or DEFAULT_MODE
    if mode not in MODES:
        raise UserError("--precision_mode %s: an Ascend 910 trains in one of %s." % (mode, ", ".join(MODES)))
    if options.num_devices > 1:
        raise UserError("--num_devices %d: on NPU each process has one device; start one for each, as scripts/train_full_8p.sh "
                        "does." % options.num_devices)
    _check_environment()
    try:
        import npu_device as npu
    except Exception as error:  # no package, no CANN library, or a TensorFlow that it was not built for
        raise NoDeviceError("The NPU's adapter npu_device cannot be imported under TensorFlow %s (%s): %s."
                            % (tf.__version__, _one_line(error), INSTALL))
    _check_version()
    try:
        _set_options(npu.global_options(), options, mode)
    except (ValueError, TypeError) as error:
        raise UserError("The NPU's adapter does not know an option (%s); leave the flag out, or take the adapter of a newer CANN."
                        % _one_line(error))
    try:
        handle = npu.open().as_default()
    except Exception as error:
        raise NoDeviceError("The NPU's adapter cannot open the device (%s); see `npu-smi info` and the files under "
                            "$HOME/ascend/log, or use --device cpu." % _one_line(error))
    device = NpuDevice(npu, handle, mode, options.loss_scale)
    if not device.is_chief:
        logging.set_verbosity(logging.ERROR)
    return device


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _check_environment() -> None:
    """Check what the adapter reads from the environment, where its own complaints would come late or say little."""
    environment = os.environ
    environment.setdefault("JOB_ID", "byol")
    if not environment.get("ASCEND_DEVICE_ID", "0").isdigit():
        raise UserError("ASCEND_DEVICE_ID is %r; it is the number of a device, such as 0." % environment["ASCEND_DEVICE_ID"])
    if "RANK_SIZE" in environment and "CM_WORKER_SIZE" in environment:
        raise UserError("RANK_SIZE and CM_WORKER_SIZE are both set; HCCL wants one of them: unset the other.")
    name = "RANK_SIZE" if "RANK_SIZE" in environment else "CM_WORKER_SIZE"
    size = environment.get(name, "1")
    if not size.isdigit() or int(size) < 1:
        raise UserError("%s is %r; it is the number of devices that train together, 1 or more." % (name, size))
    if int(size) == 1:
        return
    try:
        patient = float(environment.get(RANK_TIMEOUT, RANK_SECONDS)) > 0
    except ValueError:
        patient = False
    if not patient:
        raise UserError("%s is %r; it is the seconds that a rank waits for the others, a number above 0."
                        % (RANK_TIMEOUT, environment[RANK_TIMEOUT]))
    table = environment.get("RANK_TABLE_FILE")
    if (table is None) == ("CM_CHIEF_IP" not in environment):
        raise UserError("%s is %s, so HCCL needs either RANK_TABLE_FILE and RANK_ID, or CM_CHIEF_IP, CM_CHIEF_PORT, "
                        "CM_CHIEF_DEVICE and CM_WORKER_IP: set one of the two groups." % (name, size))
    if table is not None:
        if not os.path.isfile(table):
            raise UserError("RANK_TABLE_FILE: there is no file %s." % table)
        rank = environment.get("RANK_ID", "")
        if not rank.isdigit() or int(rank) >= int(size):
            raise UserError("RANK_ID is %r; with RANK_SIZE %s it is a number from 0 to %d." % (rank, size, int(size) - 1))


def _check_version() -> None:
    """NoDeviceError if the adapter's wheel says that it belongs to another TensorFlow 2. Other numbers say nothing of it."""
    version = _adapter_version()
    if version is not None and version.startswith("2.") and version.split(".")[:2] != tf.__version__.split(".")[:2]:
        raise NoDeviceError("npu_device %s does not fit TensorFlow %s: %s." % (version, tf.__version__, INSTALL))


def _adapter_version() -> Optional[str]:
    """What the wheel is numbered, which is as the TensorFlow that it belongs to; None where that cannot be told."""
    try:
        from importlib import metadata  # since Python 3.8

        return metadata.version("npu_device")
    except ImportError:  # no such module, or no such package
        return None


def _set_options(target: Any, options: Any, mode: str) -> None:
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

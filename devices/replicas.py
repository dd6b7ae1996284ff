"""Several CPUs or GPUs, of one machine or of several, as one device through tf.distribute.

What a step sends, how BatchNorm and files are dealt with, and what happens when a worker dies, is told in docs/scaling.md.
"""
import atexit
import contextlib
import gc
import json
import os
import re
import threading
from typing import Any, Callable, ContextManager, Iterator, List, Optional, Sequence, Tuple

import tensorflow as tf
from absl import logging

from commands import UserError
from devices.base import Device
from models import keras

try:
    from tensorflow.python.eager import record
except ImportError:
    from tensorflow.python.eager import tape as record  # its name in TensorFlow 2.6.5

EXAMPLE = ("""it is to be such as {"cluster": {"worker": ["host1:port", "host2:port"]}, "task": {"type": "worker", "index": 0}}, """
           "a number for each port")
OWN = threading.local()  # of each replica: the constants of the graph that it makes
ADDRESS = re.compile(r"(?:[\w.-]+|\[[0-9a-fA-F:.]+\]):([0-9]{1,5})")  # host:port, an IPv6 address in brackets
LOST = (tf.errors.UnavailableError, tf.errors.AbortedError, tf.errors.CancelledError, tf.errors.DeadlineExceededError,
        tf.errors.InternalError, tf.errors.FailedPreconditionError, tf.errors.UnknownError)


class ReplicaBatchNormalization(keras.layers.BatchNormalization):
    """BatchNorm over a replica's own rows. Each replica keeps its own moving statistics; those of the first are used and saved.

    Keras's would be the mean over replicas, made whenever they are read: all workers would have to read them together.
    """

    def add_weight(self, *arguments: Any, **settings: Any) -> Any:
        if settings.get("synchronization") == tf.VariableSynchronization.ON_READ:
            settings["aggregation"] = tf.VariableAggregation.ONLY_FIRST_REPLICA
        return super().add_weight(*arguments, **settings)


class GlobalBatchNormalization(ReplicaBatchNormalization):
    """BatchNorm over the rows of all replicas, so that they compute what one device would with the whole batch.

    Unlike Keras's own its moving variance has the fused kernel's n / (n - 1), and a mean that is large beside the deviation
    costs no digits once the moving mean is near it. In the forward pass it takes one all-reduce of two numbers a channel, in the
    backward pass another.
    """

    def call(self, inputs: tf.Tensor, training: bool = False) -> tf.Tensor:
        if not training:
            return super().call(inputs, training=False)
        x = tf.cast(inputs, tf.float32)
        axes = constant(*range(x.shape.rank - 1))
        # Of x itself, the mean square less the squared mean would lose digits.
        deviations = x - self.moving_mean.value()
        moments = tf.stack([tf.reduce_mean(deviations, axes), tf.reduce_mean(tf.square(deviations), axes)])
        first, second = tf.unstack(all_reduce(moments))
        variance = tf.maximum(second - tf.square(first), constant(0.0))
        rows = x.shape[:-1].num_elements() * tf.distribute.get_replica_context().num_replicas_in_sync
        unbiased = variance * constant(rows / max(rows - 1, 1)) if self.fused else variance
        for moving, change in ((self.moving_mean, first), (self.moving_variance, unbiased - self.moving_variance)):
            moving.assign_add(change * constant(1 - self.momentum), read_value=False)
        gamma, beta = (tf.cast(weight, tf.float32) for weight in (self.gamma, self.beta))
        inverse = tf.math.rsqrt(variance + constant(self.epsilon))
        return tf.cast(normalise(deviations, gamma, beta, first, inverse, axes, rows), inputs.dtype)


def normalise(x: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor, mean: tf.Tensor, inverse: tf.Tensor, axes: tf.Tensor, rows: int
              ) -> tf.Tensor:
    """Within a replica: gamma * (x - mean) * inverse + beta, differentiated as BatchNorm (arXiv:1502.03167, section 3).

    x: (..., channels); the next four: (channels,). mean, inverse: mean and 1 / deviation of x over all replicas and `axes`, so many
    rows, of which the gradient with respect to x takes account. All float32. gamma's and beta's gradients are those of the own rows.
    """
    def gradients(dy: tf.Tensor) -> Tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        normalised = centred * inverse
        own = [tf.reduce_sum(dy * normalised, axes), tf.reduce_sum(dy, axes)]  # of gamma and beta
        along, shift = tf.unstack(all_reduce(tf.stack(own), tf.distribute.ReduceOp.SUM) / constant(float(rows)))
        return (dy - shift - normalised * along) * scale, own[0], own[1]

    with record.stop_recording():
        centred = x - mean
        scale = inverse * gamma
        y = centred * scale + beta
    # As tf.custom_gradient would, but without its walk through the graph in search of variables.
    record.record_operation("BatchNorm", [y], [x, gamma, beta], gradients)
    return y


def constant(*values: float) -> tf.Tensor:
    """Within a replica: a number, or several, made once in a graph. BatchNorm's own of each time would be a tenth of all operators."""
    graph = tf.compat.v1.get_default_graph()
    if getattr(OWN, "graph", None) is not graph:  # the graph that this replica's thread is tracing
        OWN.graph, OWN.constants = graph, {}
    key = type(values[0]), values  # 0 is an axis, 0.0 is none
    if key not in OWN.constants:
        OWN.constants[key] = tf.constant(values if len(values) > 1 else values[0])
    return OWN.constants[key]


def all_reduce(tensors: Any, op: Any = tf.distribute.ReduceOp.MEAN) -> Any:
    """Within a replica: the mean or sum over the replicas of a tensor, or of each of a list, without a gradient.

    ReplicaContext.all_reduce adds a gradient to each, for which it walks through the graph of all other replicas. For the many
    of BatchNorm this took minutes.
    """
    def reduce(strategy: Any, *values: Any) -> Any:
        return strategy.extended.batch_reduce_to(op, [(value, value) for value in values])

    flat = tf.distribute.get_replica_context().merge_call(reduce, args=tf.nest.flatten(tensors))
    return tf.nest.pack_sequence_as(tensors, flat)


class Replicas(Device):
    """Devices that share each global batch, each with a copy of the networks, all of which take the same steps."""

    iterator = None  # type: Any  # the last that iterate() gave

    def __init__(self, kind: str, strategy: Any, options: Any, workers: int, worker_id: int) -> None:
        super().__init__(kind, options.loss_scale)
        self.strategy = strategy
        self.workers, self.worker_id = workers, worker_id
        self.replicas = strategy.num_replicas_in_sync
        self.batch_norm = GlobalBatchNormalization if options.sync_batch_norm else ReplicaBatchNormalization
        self._gather = tf.function(self._sum_over_workers)  # type: Any

    @property
    def restores(self) -> bool:
        return self.is_chief

    @property
    def _local(self) -> int:
        """Devices of this worker."""
        return self.replicas // self.workers

    def scope(self) -> ContextManager[Any]:
        return self.strategy.scope()

    def describe(self) -> str:
        return super().describe() + (" on %d workers" % self.workers if self.workers > 1 else "")

    # The step

    @property
    def compiled(self) -> str:
        return "loop of %d devices, some seconds each," % self._local if self._local > 1 else "loop"

    def run(self, function: Callable[..., Any], args: Tuple[Any, ...]) -> Any:
        def on_replica(*args: Any) -> Any:
            return tuple(all_reduce(list(function(*args))))

        collecting = gc.isenabled()
        gc.disable()  # tracing makes what stays: to look for garbage in it would take a sixth of the time
        try:
            return tuple(map(self._first, self.strategy.run(on_replica, args)))
        finally:
            if collecting:
                gc.enable()

    def mean(self, tensor: tf.Tensor) -> tf.Tensor:
        return all_reduce(tensor)

    def update(self, variables: Sequence[tf.Variable], function: Callable[..., Any], *arguments: Any) -> None:
        self.strategy.extended.update(variables[0], lambda first, *own: function(*own), args=(variables,) + arguments, group=False)

    def _first(self, value: Any) -> tf.Tensor:
        """This worker's first replica's part of what `strategy.run` gave."""
        return self.strategy.experimental_local_results(value)[0]

    def _apply(self, optimizer: Any, gradients: List[tf.Tensor], weights: Sequence[tf.Variable]) -> None:
        optimizer.apply_gradients(zip(all_reduce(gradients), weights), experimental_aggregate_gradients=False)

    def iterate(self, batches: tf.data.Dataset) -> Iterator[Any]:
        if self._local > 1:
            batches = batches.map(lambda *parts: tuple(
                tf.reshape(part, [self._local, part.shape[0] // self._local] + part.shape[1:]) for part in parts)).unbatch()
        # Of a data set without end tf.distribute knows that no worker runs out of batches before the others, about which they
        # would have to agree at each step. What comes after the last batch is not asked for.
        # The last iterator is kept, and the end of the process does not wait for it: tf.data tunes what tf.distribute puts around
        # the batches, in a thread that sleeps up to a minute, and to delete an iterator waits for that.
        Replicas.iterator = iter(self.strategy.distribute_datasets_from_function(lambda context: batches.repeat()))
        return Replicas.iterator

    # Several workers

    def steps_a_call(self, steps: int, seconds_a_step: Optional[float]) -> int:
        return super().steps_a_call(steps, max(self.gather(seconds_a_step or 0)) or None)  # clocks differ, calls must not

    def gather(self, number: float) -> List[float]:
        if self.workers == 1:
            return [number]
        return [float(n) for n in self._gather(tf.one_hot(self.worker_id, self.workers, tf.constant(number, tf.float64)))]

    def wait_for_all(self) -> None:
        super().wait_for_all()
        # A worker that left now might still owe another its part of the sum, which that one would take for its death. So all
        # wait once more: all had come by then, and an error says only that one has left.
        try:
            super().wait_for_all()
        except LOST as error:
            logging.info("A worker has left already: %s", error)

    def broadcast(self, variables: Sequence[tf.Variable]) -> None:
        if self.workers == 1:
            return
        for dtype in sorted({variable.dtype for variable in variables}, key=str):
            same = [variable for variable in variables if variable.dtype == dtype]
            values = [variable.numpy() if self.is_chief else tf.zeros(variable.shape, dtype) for variable in same]
            for variable, value in zip(same, tf.function(self._sum_over_workers)(values)):
                if not self.is_chief:
                    variable.assign(value)

    def _sum_over_workers(self, values: Any) -> Any:
        """Sums over the workers of a tensor, or of each of a list."""
        first = self.worker_id * self._local  # of this worker's replicas, which all have the same

        def on_replica() -> Any:
            own = tf.equal(tf.distribute.get_replica_context().replica_id_in_sync_group, first)
            return all_reduce(tf.nest.map_structure(lambda value: tf.where(own, value, tf.zeros_like(value)), values),
                              tf.distribute.ReduceOp.SUM)

        return tf.nest.map_structure(self._first, self.strategy.run(on_replica))

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        try:
            yield
        except LOST as error:
            if self.workers == 1:
                raise
            logging.info("%s", error)
            raise UserError("Another worker of this job has ended, failed or cannot be reached, so worker %d ends too. Start all "
                            "workers again with the same commands: they go on from the newest checkpoint." % self.worker_id)


def open_replicas(kind: str, gpus: Sequence[Any], options: Any, alone: bool) -> Optional[Replicas]:
    """The devices that --num_devices and TF_CONFIG ask for as one; None if that is a single device.

    gpus: all that TensorFlow sees here, none for the CPU. alone: there must be no other worker. UserError for what is not there
    or makes no sense.
    """
    workers, worker_id = _cluster()
    if workers > 1 and alone:
        raise UserError("TF_CONFIG lists %d workers, but this command is for one alone; unset TF_CONFIG for it." % workers)
    number = options.num_devices
    if workers * number == 1:
        return None
    if options.jit_compile:
        raise UserError("--jit_compile goes with one device: XLA does not compile what several exchange.")
    if gpus and number > len(gpus):
        raise UserError("--num_devices %d, but TensorFlow sees %d GPUs." % (number, len(gpus)))
    if workers > 1:
        if not gpus and number > 1:
            raise UserError("--num_devices %d: on CPU each worker of TF_CONFIG is one device; start more workers." % number)
        if gpus:
            tf.config.set_visible_devices(gpus[:number], "GPU")
        try:
            strategy = tf.distribute.MultiWorkerMirroredStrategy()  # waits for the others
        except LOST as error:
            logging.info("%s", error)
            if "start gRPC server" in str(error):
                raise UserError("Worker %d cannot listen at its port in TF_CONFIG, which another program may use; choose another."
                                % worker_id)
            raise UserError("Not all %d workers of TF_CONFIG came, so worker %d ends. Start all of them, within an hour."
                            % (workers, worker_id))
    else:
        if not gpus:
            cpu = tf.config.list_physical_devices("CPU")[0]
            tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration() for _ in range(number)])
            # To optimise the graph takes as long as to make it. It pays on long runs, for which logical devices are not meant.
            tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})
        strategy = tf.distribute.MirroredStrategy(["%s:%d" % (kind.upper(), i) for i in range(number)],
                                                  None if gpus else tf.distribute.ReductionToOneDevice())
    pool = getattr(getattr(strategy.extended, "_collective_ops", None), "_pool", None)
    if pool is not None:  # TensorFlow 2.6 leaves its threads to the interpreter's end, where that may print a traceback
        atexit.register(pool.close)
    if worker_id > 0:
        logging.set_verbosity(logging.ERROR)
    return Replicas(kind, strategy, options, workers, worker_id)


def _cluster() -> Tuple[int, int]:
    """(workers, this one's number), from TF_CONFIG; (1, 0) without it. UserError if it makes no sense."""
    text = os.environ.get("TF_CONFIG", "")
    if not text.strip():
        return 1, 0

    def need(right: Any, told: str) -> None:
        if not right:
            raise UserError("TF_CONFIG %s; %s." % (" ".join(told.split()), EXAMPLE))

    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        need(False, "is not JSON (%s)" % error)
    cluster, task = (config.get(part) if isinstance(config, dict) else None for part in ("cluster", "task"))  # type: Any, Any
    wrong = "lacks a part or has it wrong (%s)"
    need(isinstance(cluster, dict) and isinstance(task, dict), wrong % "there are not both a cluster and a task")
    need(config.get("rpc_layer", "grpc") == "grpc", wrong % "rpc_layer can be grpc only")
    for job, hosts in cluster.items():
        need(isinstance(hosts, list), wrong % ("%.60s is %.60r, not a list of addresses" % (job, hosts)))
        for host in hosts:
            address = ADDRESS.fullmatch(host) if isinstance(host, str) else None
            need(address and 0 < int(address.group(1)) < 1 << 16, wrong % ("%.60s has %.60r, which is not host:port" % (job, host)))
    hosts = sum(cluster.values(), [])
    need(len(set(hosts)) == len(hosts), wrong % "an address is there twice")
    job, index = task.get("type"), task.get("index")
    need(isinstance(job, str) and type(index) in (int, str) and re.fullmatch("[0-9]{1,9}", str(index)),
         wrong % ("the task's type is %.60r and its index %.60r" % (job, index)))
    need(set(cluster) <= {"chief", "worker"} and len(cluster.get("chief", [])) <= 1,
         "has the jobs %.60s; there may be workers, and one chief" % ", ".join(sorted(cluster)))
    tasks = [(job, i) for job in ("chief", "worker") for i in range(len(cluster.get(job, [])))]
    own = task["type"], int(index)
    need(own in tasks, "says that this is %.60s %s, of %d workers that it lists" % (own + (len(tasks),)))
    return len(tasks), tasks.index(own)

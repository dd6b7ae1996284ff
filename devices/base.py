"""What every kind of device shares, and all that the other modules know of devices.

Where variables live, how a step runs on every replica, how the loss is scaled and gradients are averaged, which rows of a
batch are made here, who writes files. A single CPU or GPU is a `Device` as it stands; the other kinds build on it.
"""
import contextlib
from typing import Any, Callable, ContextManager, Iterator, List, Optional, Sequence, Tuple

import tensorflow as tf

from commands import UserError
from models import keras

SECONDS_A_CALL = 2.0  # that a call of the training loop takes at most, or one step if that takes longer


class Device:
    """A CPU or GPU; the base of the NPU's, and of several CPUs or GPUs as one.

    loss_scale: as the flag. jit_compile: whether XLA compiles the train step.

    kind: 'cpu', 'gpu' or 'npu'. workers, worker_id: processes that train together, and which one this is.
    replicas: devices that share each global batch, over all workers. half: what is computed in where the precision mode
    allows it, 'float16', 'bfloat16' or None. advice: a line that the user should see once, or None. batch_norm,
    convolution: the networks' layers, classes whose weights are those of Keras's BatchNormalization and Conv2D.
    """

    def __init__(self, kind: str, loss_scale: str = "auto", jit_compile: bool = False) -> None:
        self.kind = kind
        self._wanted_loss_scale = loss_scale
        self._jit_compile = jit_compile
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

    @property
    def compiled(self) -> str:
        """What of the training is compiled at its first step, and how long that takes, to tell one who waits."""
        return "step by XLA, minutes on a CPU," if self._jit_compile else "loop"

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The training loop as a graph."""
        return tf.function(function)

    def compile_step(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """What the loop calls at each step, on tensors only: as it is, or compiled by XLA, which takes no iterators."""
        return tf.function(function, autograph=False, jit_compile=True) if self._jit_compile else function

    def run(self, function: Callable[..., Any], args: Tuple[Any, ...]) -> Any:
        """Run `function` on every replica, each with its rows, and give the mean of its results, a tuple of scalars."""
        return function(*args)

    def mean(self, tensor: tf.Tensor) -> tf.Tensor:
        """Within what `run` runs: the mean over the replicas. On NPU, where BatchNorm is each device's own as well, its own."""
        return tensor

    def update(self, variables: Sequence[tf.Variable], function: Callable[..., Any], *arguments: Any) -> None:
        """Call function(variables, *arguments), which assigns to them, on each replica with its copies of all variables.

        arguments: variables, tensors, or lists of them.
        """
        function(variables, *arguments)

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
        value = self._wanted_loss_scale
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

    def apply_gradients(self, optimizer: Any, gradients: List[tf.Tensor], weights: Sequence[tf.Variable]) -> None:
        """One optimiser step on the mean over all replicas of the gradients of a loss as `scale_loss` gave it."""
        with self.keep_float32():
            if hasattr(optimizer, "get_unscaled_gradients"):
                gradients = optimizer.get_unscaled_gradients(gradients)
            self._apply(optimizer, gradients, weights)

    def _apply(self, optimizer: Any, gradients: List[tf.Tensor], weights: Sequence[tf.Variable]) -> None:
        optimizer.apply_gradients(zip(gradients, weights))

    def scale_loss(self, optimizer: Any, loss: tf.Tensor) -> tf.Tensor:
        """The loss to differentiate: times the loss scale, where there is one."""
        return optimizer.get_scaled_loss(loss) if hasattr(optimizer, "get_scaled_loss") else loss

    def loss_scale(self, optimizer: Any) -> tf.Tensor:
        """The loss scale as it stands, a float32 scalar; 0 where the loss is not scaled."""
        return tf.convert_to_tensor(optimizer.loss_scale) if hasattr(optimizer, "get_scaled_loss") else tf.constant(0.0)

    def skipped(self, optimizer: Any, before: tf.Tensor) -> tf.Tensor:
        """Whether the optimiser has left out the step just taken, because its gradients overflowed: 1 or 0, a float32 scalar.

        before: the loss scale that the step began with.
        """
        if not getattr(optimizer, "dynamic", False):  # at a fixed scale Keras applies what comes, and the weights are looked at
            return tf.constant(0.0)
        # The count of good steps begins anew after a skipped one, and where the scale rises.
        anew = tf.equal(optimizer.dynamic_counter, 0)
        return tf.cast(tf.logical_and(anew, optimizer.loss_scale <= before), tf.float32)

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
        """Every worker's number, in their order, for all to decide alike."""
        return [number]

    def wait_for_all(self) -> None:
        """Return once every worker has come here; after that none needs another."""
        self.gather(0)

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

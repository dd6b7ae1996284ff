"""The optimisers, as Keras 2 has them, so that loss scaling and tf.distribute know how to deal with them."""
from typing import Any, Callable, Union

import tensorflow as tf

from models import keras

legacy = getattr(keras.optimizers, "legacy", keras.optimizers)


class AdamW(legacy.Adam):
    """Adam with decoupled weight decay (arXiv:1711.05101) on weights of rank 2 and more, which are the kernels:

        w <- w - learning_rate * weight_decay * w, then Adam's own step, whose gradient knows nothing of it.
    """

    def __init__(self, weight_decay: float, **settings: Any) -> None:
        super().__init__(name="Adam", **settings)
        self._weight_decay = weight_decay

    def _prepare_local(self, var_device: str, var_dtype: Any, apply_state: Any) -> None:
        super()._prepare_local(var_device, var_dtype, apply_state)
        state = apply_state[(var_device, var_dtype)]
        state["decay"] = state["lr_t"] * self._weight_decay

    def _resource_apply_dense(self, grad: tf.Tensor, var: tf.Variable, apply_state: Any = None) -> Any:
        if self._weight_decay and var.shape.rank > 1:
            decay = apply_state[(var.device, var.dtype.base_dtype)]["decay"]
            with tf.control_dependencies([var.assign_sub(decay * var)]):
                return super()._resource_apply_dense(grad, var, apply_state)
        return super()._resource_apply_dense(grad, var, apply_state)


class SGD(legacy.SGD):
    """Stochastic gradient descent with momentum and coupled weight decay, as PyTorch's SGD, but no decay of ranks below 2:

        v <- momentum * v + gradient + weight_decay * w
        w <- w - learning_rate * v

    Keras's own takes the learning rate into v, which differs as soon as the rate changes.
    """

    def __init__(self, weight_decay: float, name: str = "SGD", **settings: Any) -> None:
        super().__init__(name=name, **settings)
        self._weight_decay = weight_decay

    def _direction(self, grad: tf.Tensor, var: tf.Variable) -> tf.Tensor:
        """What v takes in for a kernel."""
        return grad + self._weight_decay * var if self._weight_decay else grad

    def _resource_apply_dense(self, grad: tf.Tensor, var: tf.Variable, apply_state: Any = None) -> Any:
        grad = self._direction(grad, var) if var.shape.rank > 1 else grad
        if not self._momentum:  # there is no v then
            return super()._resource_apply_dense(grad, var, apply_state)
        state = apply_state[(var.device, var.dtype.base_dtype)]
        return tf.raw_ops.ResourceApplyMomentum(
            var=var.handle, accum=self.get_slot(var, "momentum").handle, lr=state["lr_t"], grad=grad, momentum=state["momentum"],
            use_locking=self._use_locking)


class LARS(SGD):
    """Layer-wise adaptive rate scaling (arXiv:1708.03888) as DeepMind trains BYOL by it: `SGD`, in which v takes in, for a kernel,

        trust * |w| / |g| * g, where g = gradient + weight_decay * w; g itself if one of the norms is 0.

    Biases and BatchNorm's weights are neither scaled nor decayed. As there, and unlike in the LARS paper and SimCLR, the learning rate
    is not taken into v.
    """

    def __init__(self, weight_decay: float, trust: float = 1e-3, **settings: Any) -> None:
        super().__init__(weight_decay, name="LARS", **settings)
        self._trust = trust

    def _direction(self, grad: tf.Tensor, var: tf.Variable) -> tf.Tensor:
        grad = super()._direction(grad, var)
        weight_norm, norm = (tf.sqrt(tf.reduce_sum(tf.square(x))) for x in (var, grad))
        return grad * tf.where((weight_norm > 0) & (norm > 0), self._trust * weight_norm / norm, 1.0)


NAMES = ("adam", "sgd", "lars")


def make(name: str, learning_rate: Union[float, Callable[[], tf.Tensor]], momentum: float = 0.9, weight_decay: float = 0.0,
         trust: float = 1e-3) -> Any:
    """The optimiser of this name, one of NAMES.

    learning_rate: a number, or a function that gives it at each step. momentum: Adam's beta_1. weight_decay: of kernels; times the
    learning rate it is taken off the weights, by Adam directly, else by way of the gradient. trust: LARS's coefficient.
    ValueError for another name.
    """
    if name == "adam":
        return AdamW(weight_decay, learning_rate=learning_rate, beta_1=momentum)
    if name == "sgd":
        return SGD(weight_decay, learning_rate=learning_rate, momentum=momentum)
    if name == "lars":
        return LARS(weight_decay, trust, learning_rate=learning_rate, momentum=momentum)
    raise ValueError("no optimizer %r; choose one of %s" % (name, ", ".join(NAMES)))

"""The optimisers, as Keras 2 has them, so that loss scaling and tf.distribute know how to deal with them."""
from typing import Any

import tensorflow as tf

from models import keras


class AdamW(getattr(keras.optimizers, "legacy", keras.optimizers).Adam):  # type: ignore[misc]
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

"""That the stand-in is as strict as the real adapter was seen to be. Run by tests/test_npu.py in a process of its own."""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
import npu_device as npu  # noqa: E402
import tensorflow as tf  # noqa: E402
from tensorflow.python.eager import context  # noqa: E402

import commands  # noqa: E402, F401


def refused(kind, text, action, *args):
    try:
        action(*args)
    except kind as error:
        assert text in str(error), error
    else:
        raise AssertionError("not refused: " + text)


options = npu.global_options()
refused(ValueError, "NpuConfig has no option auto_tune_mode, all options [", setattr, options, "auto_tune_mode", "RL,GA")
refused(ValueError, "'fast' not in optional list [", setattr, options, "precision_mode", "fast")
refused(TypeError, "Expected bool, got str", setattr, options, "hcom_parallel", "True")
refused(TypeError, "Expected bool, got int", setattr, options, "hcom_parallel", 1)
options.dump_config.enable_dump, options.dump_config.dump_path = True, "nowhere"
refused(RuntimeError, "nowhere does not exist", npu.open)
options.dump_config.dump_path = "."
early = tf.Variable(1.0)
refused(RuntimeError, "made before open()", npu.open)
del early
tf.random.set_seed(1)
first = tf.random.normal([])
tf.random.set_seed(1)
handle = npu.open()
assert float(tf.random.normal([])) != float(first)  # the seed is lost
assert npu.open() is handle
refused(RuntimeError, "Failed create npu instance on device 1", npu.open, 1)
refused(RuntimeError, "comes too late", setattr, options, "precision_mode", "force_fp32")
refused(RuntimeError, "", tf.config.threading.set_intra_op_parallelism_threads, 1)
compiled_before = tf.function(lambda x: x + 1, jit_compile=True)
handle.as_default()
with tf.device("/GPU:3"):
    assert "GPU" not in tf.constant(1).device
assert not tf.function(lambda x: x + 1, jit_compile=True)._jit_compile and compiled_before._jit_compile


class Learner(tf.Module):
    def __init__(self):
        super().__init__()
        self.weight = tf.Variable(0.0)
        self.step = tf.function(self._step)
        self.loop = tf.function(self._loop)
        self.returning = tf.function(self._returning)

    def _step(self, x):
        self.weight.assign_add(tf.reduce_sum(x))

    def _loop(self, iterator, n):
        for _ in tf.range(n):
            self.step(next(iterator))

    def _returning(self, iterator, n):
        self._loop(iterator, n)
        return self.weight.read_value()


learner = Learner()
data = tf.data.Dataset.from_tensor_slices(tf.ones([12, 3])).batch(2, drop_remainder=True)
npu.set_npu_loop_size(2)
learner.loop(iter(data), tf.constant(2))
assert float(learner.weight) == 12
inside = learner.loop.get_concrete_function(iter(data), tf.constant(2)).graph.as_graph_def().library.function
assert not any("step" in function.signature.name for function in inside), "nested functions are inlined"
refused(RuntimeError, "wrong number of steps", learner.loop, iter(data), tf.constant(3))
refused(TypeError, "the loop size is an int", npu.set_npu_loop_size, 0)
refused(RuntimeError, "returned", learner.returning, iter(data), tf.constant(2))
ragged = tf.data.Dataset.from_tensor_slices(tf.ones([5, 3])).batch(2)
refused(RuntimeError, "not known in advance", tf.function(learner._loop), iter(ragged), tf.constant(2))
with context.device("CPU:0"):
    on_host = iter(data)
    refused(RuntimeError, "variables was called on the host", learner.step, tf.ones([2, 3]))
refused(RuntimeError, "made on the host", learner.loop, on_host, tf.constant(2))
with context.device("CPU:0"), handle.scope():
    learner.loop(iter(data), tf.constant(2))


@tf.function
def kept(x):
    with npu.keep_dtype_scope():
        return x * 2


assert any(node.attr["_keep_dtype"].i for node in kept.get_concrete_function(tf.constant(1.0)).graph.as_graph_def().node)
print("as strict as it should be")

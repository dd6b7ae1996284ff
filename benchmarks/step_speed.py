"""How fast a train step is: against the largest matrix product of the same precision, and against the same step in PyTorch."""
import contextlib
from typing import Any, Callable, Dict, List, Optional

from benchmarks import table, workers
from benchmarks.scale import Scale

MODULE = "benchmarks.step_speed"
# By the names of npu_config's precision modes: float32, and bfloat16 or float16, whichever the device has.
GOALS = {"must_keep_origin_dtype": 0.97, "allow_mix_precision": 0.93}
OVER_PYTORCH = 1.05
LARGE_BATCH = 0.9


def measure(scale: Scale, settings: Dict[str, Any], verbose: bool, torch_python: str, results: Dict[str, Any]) -> List[table.Row]:
    """The step, the matrix product and PyTorch's step in turns, in each precision that the device has.

    results: gets what was measured, by precision and batch size, such as float32-128, for other measurements and the JSON.
    """
    rows = []
    for mode, goal in GOALS.items():
        try:
            around = None  # type: Any
            for batch, rounds in ((scale.batch, scale.step_rounds), (scale.large_batch, scale.large_rounds)):
                got = take_turns(scale, settings, batch, mode, rounds, verbose, torch_python if batch == scale.batch else None)
                results["%s-%d" % (got["precision"], batch)] = got
                rows += _rows(scale, got, goal, around)
                around = got
        except workers.Failed as error:
            rows.append(table.Row("step", "train step, " + mode, "not measured: %s" % error))
    return rows


def take_turns(scale: Scale, settings: Dict[str, Any], batch: int, mode: str, rounds: int, verbose: bool,
               torch_python: Optional[str] = None, product: bool = True) -> Dict[str, Any]:
    """Seconds of a step, of a matrix product if wanted, and of PyTorch's step if there is an interpreter for it, in turns."""
    with contextlib.ExitStack() as stack:
        more = dict(settings, width=scale.width, batch=batch, precision_mode=mode, matrix=scale.matrix)
        ours = stack.enter_context(workers.Worker(MODULE, more, verbose=verbose))
        got = ours.ask("about")
        first = ours.ask("warm_up")
        takers = {"step": lambda: ours.ask("step", seconds=scale.turn)}  # type: Dict[str, Callable[[], float]]
        if product:
            ours.ask("product", seconds=0)
            takers["matrix"] = lambda: ours.ask("product", seconds=scale.turn)
        if torch_python:
            peer = stack.enter_context(workers.Worker("benchmarks.pytorch_step", more, torch_python, verbose))
            got["pytorch"] = peer.ask("warm_up")
            if "parameters" in got["pytorch"]:
                takers.update(step=lambda: _settled(ours, scale.turn), pytorch_step=lambda: _settled(peer, scale.turn))
        seconds = workers.in_turns(rounds, takers) if rounds else {"step": [first]}  # the first step, once traced
        got.update(seconds=seconds, memory=ours.ask("memory"),
                   images_per_second=[batch / each for each in seconds["step"]],
                   gflops=[got["flop"] / each / 1e9 for each in seconds["step"]],
                   limit=[2e-9 * scale.matrix ** 3 / each for each in seconds.get("matrix", [])])
    return got


def _settled(worker: workers.Worker, seconds: float) -> float:
    """Seconds of a step as in a run, one after the other: the first one after another process had the cores takes 1 to 4 % longer."""
    worker.ask("step", seconds=0)
    return float(worker.ask("step", seconds=seconds))


def _rows(scale: Scale, got: Dict[str, Any], goal: float, smaller: Optional[Dict[str, Any]]) -> List[table.Row]:
    """smaller: what was measured at the smaller batch, if this is the larger."""
    name = "train step, %s, batch %d" % (got["precision"], got["batch"])
    shown = "%.4g images/s, %s GFLOP/s" % (table.figure(got["images_per_second"]).median,
                                           table.number(table.figure(got["gflops"]).median))
    ratio = table.ratios(got["gflops"], got["limit"])
    row = table.Row("step", name, shown, "matrix product of side %d: %s GFLOP/s" % (
        scale.matrix, table.number(table.figure(got["limit"]).median)), ratio)
    if smaller is None:
        row = row._replace(at_least=goal, note="%.4g GFLOP an image, 2 for a multiply-add: what the step's convolutions and matrix "
                           "products do, counted from their shapes." % (got["flop"] / got["batch"] / 1e9))
        return [row, _against_pytorch(name, shown, got)]
    before = table.ratios(smaller["gflops"], smaller["limit"]).median
    relative = table.ratios(got["gflops"], [limit * before for limit in got["limit"]])
    return [row, table.Row("step", "the same share of the product", table.number(ratio.median), "batch %d: %s" % (
        smaller["batch"], table.number(before)), relative, at_least=LARGE_BATCH)]


def _against_pytorch(name: str, shown: str, got: Dict[str, Any]) -> table.Row:
    """The row of the same step in PyTorch, or what is missing for it."""
    peer = got["pytorch"]
    if "parameters" not in peer:
        return table.Row("step", name, shown, "PyTorch: " + peer["missing"])
    if peer["parameters"] != got["parameters"]:
        raise workers.Failed("PyTorch's networks have %s parameters, ours %s" % (peer["parameters"], got["parameters"]))
    theirs = table.figure([got["batch"] / seconds for seconds in got["seconds"]["pytorch_step"]]).median
    return table.Row("step", name, shown, "PyTorch %s, channels-last: %.4g images/s" % (peer["version"], theirs),
                     table.ratios(got["seconds"]["pytorch_step"], got["seconds"]["step"]), at_least=OVER_PYTORCH,
                     note="The same networks with as many parameters, two views, Adam with decoupled decay, moving average.")


def prepare(settings: Dict[str, Any]) -> Dict[str, Callable[..., Any]]:
    """The child's jobs: one learner and its step, and the matrix product."""
    import commands  # noqa: F401  before TensorFlow, whose start it quiets

    # isort: split

    import tensorflow as tf

    import models
    import npu_config
    import pretraining
    from benchmarks import flops

    batch = settings["batch"]
    config = pretraining.Config(device=settings["device"], width_multiplier=settings["width"], batch_size=batch,
                                precision_mode=settings["precision_mode"])
    device = npu_config.open_device(config)
    device.set_seed(0)
    learner = pretraining.Byol(config, device, 10 ** 6, loop_size=64)
    with device.host():
        views = [tf.random.stateless_uniform((batch, 32, 32, 3), (0, view)) for view in range(2)]
        ready = tf.data.Dataset.from_tensors(tuple(views)).repeat().prefetch(2)
    iterator = device.iterate(ready)

    def step(n: int) -> None:
        learner.train_loop(iterator, tf.constant(n))
        learner.recent.numpy()  # as a run does: it waits for the device

    def warm_up() -> float:
        learner.train_loop.get_concrete_function(iterator, tf.constant(1))
        return workers.seconds_each(step, 0)

    dtype = device.half or "float32"
    side = settings["matrix"]

    @tf.function
    def products(a: tf.Tensor, x: tf.Tensor, n: tf.Tensor) -> tf.Tensor:
        for _ in tf.range(n):
            x = tf.matmul(a, x)  # each needs the one before, so none is left out
        return tf.reduce_mean(tf.cast(x, tf.float32))

    def product(seconds: float) -> float:
        # Made anew each time, so that they take no memory while the step has its turn.
        a, x = (tf.random.stateless_normal((side, side), (0, i)) for i in range(2))
        a, x = tf.cast(a / side ** 0.5, dtype), tf.cast(x, dtype)  # of such a size that no product grows out of its range
        products(a, x, tf.constant(0)).numpy()  # waits until they are there
        return workers.seconds_each(lambda n: products(a, x, tf.constant(n)).numpy(), seconds)

    def about() -> Dict[str, Any]:
        networks = learner.f_online, learner.g_online, learner.q_online
        return {"precision": dtype, "device": device.describe(), "batch": batch, "flop": batch * flops.step(*networks),
                "parameters": [models.count_parameters(network) for network in networks], "advice": device.advice}

    def memory() -> int:
        if device.kind == "gpu":
            return int(tf.config.experimental.get_memory_info("GPU:0")["peak"])
        return workers.peak_memory()

    return {"about": about, "memory": memory, "warm_up": warm_up,
            "step": lambda seconds: workers.seconds_each(step, seconds),
            "product": product}


if __name__ == "__main__":
    workers.serve(prepare)

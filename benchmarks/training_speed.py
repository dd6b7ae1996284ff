"""Whole training, from the data to the log line, against the bare step on batches that are ready; and a checkpoint's cost."""
import time
from typing import Any, Callable, Dict, List

from benchmarks import table, workers
from benchmarks.scale import Scale

MODULE = "benchmarks.training_speed"
STEPS_A_DAY = 10 ** 5  # of the runs here: more than they take
CHECKPOINTS = 3
EPOCH = 50000  # images


def measure(scale: Scale, settings: Dict[str, Any], verbose: bool) -> List[table.Row]:
    """At full width by ratio, with a narrow encoder by milliseconds a step, where the step is short enough to show them."""
    rows = []
    for width, log_every in ((scale.width, scale.log_every), (scale.narrow, 10 * scale.log_every)):
        more = dict(settings, width=width, batch=scale.batch, log_every=log_every)
        with workers.Worker(MODULE, more, verbose=verbose) as worker:
            got = worker.ask("train", rounds=scale.rounds)
            name = "whole training, %s, batch %d, width %g" % (got["precision"], scale.batch, width)
            whole, bare = (table.figure([scale.batch / seconds for seconds in got[side]]) for side in ("whole", "bare"))
            shown = ["%.4g images/s" % side.median for side in (whole, bare)]
            if width == scale.width:
                rows.append(table.Row("training", name, shown[0], "the bare step on ready batches: " + shown[1],
                                      table.ratios(got["bare"], got["whole"]), at_least=0.97,
                                      note="pretraining.Run with data, history, log line and curves, a log line every %d steps "
                                           "(a run: 10); evaluation and checkpoints apart." % log_every))
                seconds = worker.ask("checkpoints")
                epoch = EPOCH / whole.median
                rows.append(table.Row("training", "a checkpoint, with losses and metrics", "%.2f s" % table.figure(seconds).median,
                                      "an epoch of 50,000 images: %.0f s" % epoch,
                                      table.figure([100 * second / epoch for second in seconds]), " %", at_most=1))
            else:
                around = [1e3 * (ours - theirs) for ours, theirs in zip(got["whole"], got["bare"])]
                rows.append(table.Row("training", name, shown[0], "the bare step on ready batches: " + shown[1],
                                      table.figure(around), " ms a step",
                                      note="What data, history, log line and curves add to a step; one every %d steps is logged. "
                                           "Views are made on the cores that also take the step." % log_every))
    return rows


def prepare(settings: Dict[str, Any]) -> Dict[str, Callable[..., Any]]:
    """The child's jobs: a run of pretraining.py, that gives the bare step its turn after each log line."""
    import commands  # noqa: F401  before TensorFlow, whose start it quiets

    # isort: split

    import tensorflow as tf

    import npu_config
    import pretraining
    import progress
    from benchmarks import inputs

    data = inputs.data(settings["data_dir"])
    batch, log_every = settings["batch"], settings["log_every"]
    config = pretraining.Config(device=settings["device"], width_multiplier=settings["width"], batch_size=batch, knn_every=0,
                                precision_mode=fast_precision(settings["device"]), output_dir=workers.scratch(), log_every=log_every,
                                num_epochs=STEPS_A_DAY * batch // len(data.train_images) + 1)
    device = npu_config.open_device(config)
    device.set_seed(0)
    run = pretraining.runs.Run(config, device, data, progress.Progress(shown=False))
    learner = pretraining.Byol(config, device, run.total_steps, run.loop_size)
    run.resume(learner)

    def train(rounds: int) -> Dict[str, Any]:
        """Seconds a step of whole training and of the bare step, in turns; the first turn of each warms up."""
        with device.host():
            views = tuple(tf.random.stateless_uniform((batch, 32, 32, 3), (0, view)) for view in range(2))
            ready = tf.data.Dataset.from_tensors(views).repeat().prefetch(2)
        iterator = device.iterate(ready)
        took = {"whole": [], "bare": []}  # type: Dict[str, List[float]]
        since = [time.perf_counter()]

        def bare_step() -> None:
            done, seconds = 0, None
            while done < log_every:  # in calls as long as those of the run
                began = time.perf_counter()
                n = device.steps_a_call(log_every - done, seconds)
                learner.train_loop(iterator, tf.constant(n))
                learner.recent.numpy()
                done += n
                seconds = (time.perf_counter() - began) / n

        def say(text: str) -> None:
            if not text.startswith("[Epoch"):
                return
            now = time.perf_counter()
            took["whole"].append((now - since[0]) / log_every)
            bare_step()
            since[0] = time.perf_counter()
            took["bare"].append((since[0] - now) / log_every)

        run.say = say
        run.last_step = (rounds + 1) * log_every
        pretraining.take_steps(learner, run, device, data)
        traces = learner.train_loop.experimental_get_tracing_count()
        if traces != 1:
            raise RuntimeError("The loop was traced %d times, so the bare step is not the same." % traces)
        return {"whole": took["whole"][1:], "bare": took["bare"][1:], "precision": device.half or "float32"}

    def checkpoints() -> List[float]:
        seconds = []
        for _ in range(CHECKPOINTS):
            began = time.perf_counter()
            run._save()
            seconds.append(time.perf_counter() - began)
        return seconds

    return {"train": train, "checkpoints": checkpoints}


def fast_precision(device: str) -> str:
    """The precision mode in which this machine's step is fastest, so that what is around it weighs most."""
    import tensorflow as tf

    from devices import host

    on_gpu = device != "cpu" and tf.config.list_physical_devices("GPU")
    fast = host.BFLOAT16_ON_CPU and host.processor_has_bfloat16()
    return "allow_mix_precision" if on_gpu or fast else "must_keep_origin_dtype"


if __name__ == "__main__":
    workers.serve(prepare)

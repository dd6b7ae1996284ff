"""From the start of the process `python pretraining.py` to the end of its first step, and what that time goes to."""
import sys
import tempfile
import time
from typing import Any, Callable, Dict, List

from benchmarks import table, workers
from benchmarks.scale import Scale

MODULE = "benchmarks.start_time"
PARTS = ("import", "device", "data", "build", "pipeline", "trace", "first step")
AT_MOST, TRACE_AT_MOST = 12, 5  # seconds


def measure(scale: Scale, settings: Dict[str, Any], verbose: bool) -> List[table.Row]:
    """A fresh process each round."""
    rounds = []
    for _ in range(scale.rounds - 1):
        with workers.Worker(MODULE, dict(settings, width=scale.width, batch=scale.start_batch), verbose=verbose) as worker:
            rounds.append(worker.ask("start", began=worker.began))
    parts = {part: table.figure([got[part] for got in rounds]) for part in PARTS}
    told = ", ".join("%s %.1f" % (part, parts[part].median) for part in PARTS)
    name = "process start to first finished step, float32, batch %d" % scale.start_batch
    return [table.Row("start", name, told, "", table.figure([sum(got[part] for part in PARTS) for got in rounds]), " s",
                      at_most=AT_MOST, note="In seconds. import: until all modules are there; build: networks, optimiser, sheet of "
                      "views; pipeline: tf.data; trace: the loop's graph; first step: TensorFlow's rewriting of the graph, XLA's "
                      "compiling of the views, the step itself."),
            table.Row("start", "of which tracing the training loop", "%.1f s" % parts["trace"].median, "", parts["trace"], " s",
                      at_most=TRACE_AT_MOST)]


def prepare(settings: Dict[str, Any]) -> Dict[str, Callable[..., Any]]:
    """The child's job: the true main of pretraining.py, with a look at the clock around its parts."""

    def start(began: float) -> Dict[str, float]:
        """began: time.time() just before this process was started. Gives the seconds of each part."""
        import pretraining

        clock = Clock(began)
        clock.end("import")
        clock.around(pretraining.datasets, "load", before="device", after="data")
        clock.around(pretraining.runs.Run, "resume", after="build")
        compile_ = pretraining.Device.compile
        pretraining.Device.compile = lambda self, function: FirstStep(compile_(self, function), clock)
        with tempfile.TemporaryDirectory() as folder:
            source = ["--data_dir=" + settings["data_dir"]] if settings["data_dir"] else ["--dataset=shapes"]
            sys.argv = ["pretraining.py", "--output_dir=" + folder, "--device=" + settings["device"],
                        "--batch_size=%d" % settings["batch"], "--width_multiplier=%g" % settings["width"],
                        "--precision_mode=must_keep_origin_dtype"] + source
            pretraining.commands.define_flags(pretraining.Config)
            try:
                pretraining.commands.run(pretraining.main)
            except SystemExit as status:
                if not clock.stopped:
                    raise RuntimeError("pretraining.py ended before its first step: %s" % status.code)
        return clock.parts

    return {"start": start}


class Clock:
    """Shares the time since `began` out among parts."""

    def __init__(self, began: float) -> None:
        self.last = began
        self.parts = {part: 0. for part in PARTS}
        self.stopped = False

    def end(self, part: str) -> None:
        """All that has passed since the last end was this part's."""
        now = time.time()
        self.parts[part] += now - self.last
        self.last = now

    def around(self, owner: Any, name: str, before: str = "", after: str = "") -> None:
        """End the part `before` when the function owner.name is called, and `after` when it returns."""
        function = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            if before:
                self.end(before)
            result = function(*args, **kwargs)
            self.end(after)
            return result

        setattr(owner, name, timed)


class FirstStep:
    """The compiled loop, traced and then called once; after that the process ends, as by an exit in the program."""

    def __init__(self, function: Any, clock: Clock) -> None:
        self.function, self.clock = function, clock

    def __call__(self, *args: Any) -> None:
        self.clock.end("pipeline")
        self.function.get_concrete_function(*args)
        self.clock.end("trace")
        self.function(*args)
        self.function.python_function.__self__.recent.numpy()
        self.clock.end("first step")
        self.clock.stopped = True
        raise SystemExit(0)


if __name__ == "__main__":
    workers.serve(prepare)

"""How fast two views of each image are made: augmentation.py in its pipeline, against a call for each image and a parallel map."""
from typing import Any, Callable, Dict, List

from benchmarks import table, workers
from benchmarks.scale import Scale

MODULE = "benchmarks.augmentation_speed"
BATCH = 512


def measure(scale: Scale, settings: Dict[str, Any], verbose: bool) -> List[table.Row]:
    """Images a second of the three ways, in turns."""
    with workers.Worker(MODULE, dict(settings, seconds=scale.short_turn), verbose=verbose) as worker:
        worker.ask("warm_up")
        got = workers.in_turns(scale.rounds + 1, {name: lambda name=name: worker.ask("images_per_second", way=name)
                                                  for name in ("whole batches", "calls", "map")})
    whole, calls, mapped = (table.figure(got[name]) for name in ("whole batches", "calls", "map"))
    ours = table.number(whole.median) + " images/s"
    return [table.Row("augmentation", "two views of each image, whole batches", ours,
                      "a call for each image, the reference's way: %s images/s" % table.number(calls.median),
                      table.ratios(got["whole batches"], got["calls"]), at_least=30,
                      note="Both sides compute the same views for the same drawn parameters; tests/test_benchmarks.py checks it."),
            table.Row("augmentation", "the same", ours,
                      "a parallel map over single images: %s images/s" % table.number(mapped.median),
                      table.ratios(got["whole batches"], got["map"]), at_least=4)]


def prepare(settings: Dict[str, Any]) -> Dict[str, Callable[..., Any]]:
    """The child's jobs."""
    import commands  # noqa: F401  before TensorFlow, whose start it quiets

    # isort: split

    import tensorflow as tf

    import datasets
    from benchmarks import inputs, per_image_views

    with tf.device("CPU:0"):  # views are made by the host, whatever the device is
        images = inputs.images(settings["data_dir"])
        whole = iter(datasets.pretraining_batches(images, BATCH, 0, 0, 10 ** 6))
        mapped = iter(per_image_views.parallel_map(images, BATCH))
        few = tf.constant(images[:BATCH])

    def take(iterator: Any, n: int) -> None:
        for _ in range(n):
            next(iterator)

    def call(n: int) -> None:
        for _ in range(n):
            with tf.device("CPU:0"):
                per_image_views.called_for_each(few)[1].numpy()

    ways = {"whole batches": lambda n: take(whole, n), "map": lambda n: take(mapped, n), "calls": call}

    def images_per_second(way: str) -> float:
        if way != "calls":
            ways[way](6)  # which were made while another had its turn
        return BATCH / workers.seconds_each(ways[way], settings["seconds"], most=8)

    def warm_up() -> None:
        for run in ways.values():
            run(2)

    return {"images_per_second": images_per_second, "warm_up": warm_up}


if __name__ == "__main__":
    workers.serve(prepare)

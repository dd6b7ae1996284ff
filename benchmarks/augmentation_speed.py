"""How fast two views of each image are made: augmentation.py in its pipeline, against a call for each image and a parallel map."""
from typing import Any, Callable, Dict, List, Optional

from benchmarks import table, workers
from benchmarks.scale import Scale

MODULE = "benchmarks.augmentation_speed"
BATCH = 512
LARGER = ((96, 128), (224, 32))  # sides of larger images in pixels, and batches of them


def measure(scale: Scale, settings: Dict[str, Any], verbose: bool) -> List[table.Row]:
    """Images a second of the three ways, in turns: of CIFAR-10's, with goals, then of larger images."""
    rows = _at(scale, settings, verbose, 32, BATCH, "two views of each image, whole batches", 30, 4)
    for size, batch in LARGER:
        rows += _at(scale, settings, verbose, size, batch, "two views of each image of %d pixels, batch %d" % (size, batch))
    return rows


def _at(scale: Scale, settings: Dict[str, Any], verbose: bool, size: int, batch: int, name: str, over_calls: Optional[float] = None,
        over_map: Optional[float] = None) -> List[table.Row]:
    settings = dict(settings, seconds=scale.short_turn, size=size, batch=batch)
    with workers.Worker(MODULE, settings, verbose=verbose) as worker:
        worker.ask("warm_up")
        got = workers.in_turns(scale.rounds + 1, {name: lambda name=name: worker.ask("images_per_second", way=name)
                                                  for name in ("whole batches", "calls", "map")})
    whole, calls, mapped = (table.figure(got[name]) for name in ("whole batches", "calls", "map"))
    ours = table.number(whole.median) + " images/s"
    return [table.Row("augmentation", name, ours,
                      "a call for each image, the reference's way: %s images/s" % table.number(calls.median),
                      table.ratios(got["whole batches"], got["calls"]), at_least=over_calls,
                      note="Both sides compute the same views for the same drawn parameters; tests/test_benchmarks.py checks it."),
            table.Row("augmentation", "the same", ours,
                      "a parallel map over single images: %s images/s" % table.number(mapped.median),
                      table.ratios(got["whole batches"], got["map"]), at_least=over_map)]


def prepare(settings: Dict[str, Any]) -> Dict[str, Callable[..., Any]]:
    """The child's jobs."""
    import commands  # noqa: F401  before TensorFlow, whose start it quiets

    # isort: split

    import tensorflow as tf

    import datasets
    from benchmarks import inputs, per_image_views
    from sources import shapes

    with tf.device("CPU:0"):  # views are made by the host, whatever the device is
        size, batch = settings["size"], settings["batch"]
        images = inputs.images(settings["data_dir"]) if size == 32 else shapes.make(2 * batch, (0, 0), size)[0]
        whole = iter(datasets.pretraining_batches(images, batch, 0, 0, 10 ** 6))
        mapped = iter(per_image_views.parallel_map(images, batch))
        few = tf.constant(images[:batch])

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
        return batch / workers.seconds_each(ways[way], settings["seconds"], most=8)

    def warm_up() -> None:
        for run in ways.values():
            run(2)

    return {"images_per_second": images_per_second, "warm_up": warm_up}


if __name__ == "__main__":
    workers.serve(prepare)

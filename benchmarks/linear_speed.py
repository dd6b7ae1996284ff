"""Linear evaluation on cached features, against the forward passes alone that the features take."""
import time
from typing import Any, Callable, Dict, List

from benchmarks import table, workers
from benchmarks.scale import Scale

MODULE = "benchmarks.linear_speed"
BATCH = 500  # as evaluation.features
AT_MOST = 1.3


def measure(scale: Scale, settings: Dict[str, Any], verbose: bool) -> List[table.Row]:
    """The whole command between two halves of the forward passes, so that neither side has the quieter machine."""
    rounds = max(1, scale.large_rounds - 1)
    with workers.Worker(MODULE, dict(settings, width=scale.linear_width, images=scale.images), verbose=verbose) as worker:
        worker.ask("forward", share=0.02)
        got = [(worker.ask("forward", share=0.5), worker.ask("linear"), worker.ask("forward", share=0.5)) for _ in range(rounds)]
    whole, alone = [each[1]["seconds"] for each in got], [each[0] + each[2] for each in got]
    images, head = got[0][1]["images"], table.figure([each[1]["head"] for each in got]).median
    name = "linear evaluation, cached features of %d images, width %g" % (images, scale.linear_width)
    return [table.Row("linear", name, "%.1f s, of which the head %.1f" % (table.figure(whole).median, head),
                      "their forward passes alone: %.1f s" % table.figure(alone).median, table.ratios(whole, alone), at_most=AT_MOST,
                      note="From the encoder's weights to the accuracy, 50 epochs of the head; the start of Python, the import of "
                      "TensorFlow and the reading of the data are left out.")]


def prepare(settings: Dict[str, Any]) -> Dict[str, Callable[..., Any]]:
    """The child's jobs: the true main of linearevaluation.py, and the encoder alone on ready batches."""

    # isort: split

    import tensorflow as tf

    import classifiers
    import evaluation
    import linearevaluation
    import models
    from benchmarks import inputs

    data = inputs.data(settings["data_dir"])
    if settings["images"]:
        train, test = slice(settings["images"]), slice(settings["images"] // 5)
        data = data._replace(train_images=data.train_images[train], train_labels=data.train_labels[train],
                             test_images=data.test_images[test], test_labels=data.test_labels[test])
    total = len(data.train_images) + len(data.test_images)
    config = linearevaluation.Config(device=settings["device"], width_multiplier=settings["width"], encoder_weights="none",
                                     cached_features=True, output_dir=workers.scratch(), quiet=True)
    took = {"head": 0.0}
    evaluation.load_data = lambda *_, **__: data
    train_head = classifiers.Classifier.train

    def timed_train(*args: Any) -> None:
        began = time.perf_counter()
        train_head(*args)
        took["head"] = time.perf_counter() - began

    classifiers.Classifier.train = timed_train  # type: ignore[method-assign]
    device, encoder, _ = evaluation.start(config)

    @tf.function
    def passes(images: tf.Tensor) -> tf.Tensor:
        return encoder(images, training=False)

    def forward(share: float) -> float:
        """Seconds of the forward passes of this share of all images."""
        batches = tf.random.stateless_uniform((BATCH, 32, 32, 3), (0, 0))
        began = time.perf_counter()
        for _ in range(max(1, round(share * total / BATCH))):
            result = passes(batches)
        result.numpy()
        return time.perf_counter() - began

    def linear() -> Dict[str, float]:
        began = time.perf_counter()
        linearevaluation.evaluate(config)
        return {"seconds": time.perf_counter() - began, "head": took["head"], "images": total,
                "parameters": models.count_parameters(encoder)}

    return {"forward": forward, "linear": linear}


if __name__ == "__main__":
    workers.serve(prepare)

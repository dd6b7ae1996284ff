"""The benchmarks: that they count, compare and judge rightly. What they measure is not tested here, since a machine may be busy."""
import json
import os

import numpy as np
import pytest
import tensorflow as tf

import augmentation
import commands
import datasets
import models
import npu_config
import pretraining
from benchmarks import data_speed, flops, growth, inputs, per_image_views, pytorch_step, run, step_speed, table, workers
from benchmarks.scale import FULL, QUICK


def make_learner(batch=8, **settings):
    config = pretraining.Config(device="cpu", width_multiplier=1 / 16, batch_size=batch, **settings)
    device = npu_config.open_device(config)
    return pretraining.Byol(config, device, total_steps=10, loop_size=4)


def graphs_of(function):
    """A concrete function's graph and those of all functions that it calls, at any depth."""
    graph = function.graph
    return [graph.as_graph_def().node] + [part.node_def for part in graph.as_graph_def().library.function]


@pytest.fixture(scope="module")
def traced():
    """A learner and the training loop's graph, over the pipeline of pretraining."""
    learner = make_learner()
    images = np.zeros((16, 32, 32, 3), np.uint8)
    batches = datasets.pretraining_batches(images, 8, 0, 0, 10)
    return learner, learner.train_loop.get_concrete_function(iter(batches), tf.constant(2)), batches


# What is counted

def body(function):
    """The function graph of the loop's body."""
    loop = next(op for op in function.graph.get_operations() if op.type in ("While", "StatelessWhile"))
    return function.graph._get_function(loop.get_attr("body").name).graph


def test_flop_is_that_of_the_paper_and_issue_figure():
    encoder = models.ResNet18()
    assert flops.forward(encoder) == pytest.approx(1.1116e9, rel=1e-3)  # which was taken with the biases
    g, q = models.ProjectionHead(), models.ProjectionHead()
    g.build((None, 512))
    q.build((None, 128))
    assert flops.step(encoder, g, q) == pytest.approx(8 * 1.1116e9, rel=2e-3)
    # By hand: the stem, then per stage side^2 * 9 * inputs * outputs for each convolution, and the 1x1 shortcuts.
    by_hand = 32 ** 2 * 27 * 64 + 4 * 32 ** 2 * 9 * 64 ** 2
    for side, filters in ((16, 128), (8, 256), (4, 512)):
        by_hand += side ** 2 * (9 * filters // 2 * filters + 3 * 9 * filters ** 2 + filters // 2 * filters)
    assert flops.forward(encoder) == 2 * by_hand


def test_flop_is_what_the_loops_graph_does(traced):
    learner, function, _ = traced
    total = 0
    for op in body(function).get_operations():
        if not op.outputs or not op.outputs[0].consumers():
            continue  # the gradient with respect to the images, which is pruned
        if op.type.startswith("Conv2D"):
            kernel, pixels = op.inputs[1], op.outputs[0]
            if op.type == "Conv2DBackpropInput":
                pixels = op.inputs[2]
            elif op.type == "Conv2DBackpropFilter":
                kernel, pixels = op.outputs[0], op.inputs[2]
            total += 2 * int(np.prod(pixels.shape[:3])) * kernel.shape.num_elements()
        elif op.type == "MatMul":
            a = op.inputs[0].shape
            rows, inner = (a[1], a[0]) if op.get_attr("transpose_a") else (a[0], a[1])
            total += 2 * rows * inner * op.outputs[0].shape[1]
    assert total == 8 * flops.step(learner.f_online, learner.g_online, learner.q_online)


def test_pytorch_networks_have_as_many_parameters():
    pytest.importorskip("torch")
    for width in (1, 1 / 8):
        f, g, q = pytorch_step.networks(width)
        ours = models.ResNet18(width)
        head, predictor = models.ProjectionHead(), models.ProjectionHead()
        head.build((None, ours.features))
        predictor.build((None, 128))
        assert [pytorch_step.parameters(n) for n in (f, g, q)] == [models.count_parameters(n) for n in (ours, head, predictor)]


# What is compared

def test_views_of_single_images_equal_those_of_the_whole_batch():
    images = np.random.RandomState(0).randint(0, 256, (24, 32, 32, 3)).astype(np.uint8)
    crops, colors = augmentation.sample_crops(24, (1, 2)), augmentation.sample_colors(24, (1, 2))
    apply = tf.function(per_image_views.apply)
    alone = [apply(tf.constant(image), *(x[i] for x in crops), *(x[i] for x in colors)) for i, image in enumerate(images)]
    whole = augmentation.augment_images_pretraining(images, (1, 2))
    np.testing.assert_allclose(np.stack(alone), whole, atol=3e-5)


def test_single_images_are_drawn_from_the_same_ranges():
    crops = np.array([[int(x) for x in per_image_views.draw_crop(32)] for _ in range(300)])
    top, left, height, width, flip = crops.T
    assert (top >= 0).all() and (left >= 0).all() and (top + height <= 32).all() and (left + width <= 32).all()
    longer, shorter = np.maximum(height, width), np.minimum(height, width)
    assert longer.min() >= 13 and longer.max() <= 32 and (shorter >= np.floor(0.67 * longer)).all() and 0.15 < flip.mean() < 0.35
    colors = np.array([[float(x) for x in per_image_views.draw_colors()] for _ in range(300)]).T
    for values, low, high in zip(colors, (-0.4, 0.6, 0.6, -0.1), (0.4, 1.4, 1.4, 0.1)):
        assert low <= values.min() < values.max() <= high and values.max() - values.min() > 0.8 * (high - low)
    assert 0.7 < colors[4].mean() < 0.9 and 0.1 < colors[5].mean() < 0.3


def test_the_parallel_map_and_the_calls_give_pairs_of_batches():
    tf.random.set_seed(0)  # with a seed, too, the two views are drawn apart
    images = np.random.RandomState(0).randint(0, 256, (8, 32, 32, 3)).astype(np.uint8)
    mapped = next(iter(per_image_views.parallel_map(images, 4)))
    for first, second in (mapped, per_image_views.called_for_each(tf.constant(images[:4]))):
        assert first.shape == second.shape == (4, 32, 32, 3) and not np.array_equal(first, second)


def test_data_is_cut_into_files_that_are_read_as_cifar(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "TRAIN", 80)
    monkeypatch.setattr(inputs, "TEST", 16)
    monkeypatch.setattr(inputs, "DRAWN", 40)
    paths = data_speed._files(str(tmp_path), None, FULL)
    expected = inputs.data(None)
    for path, count in ((paths["folder"], 80), (paths["archive"], 80), (paths["2"], 40), (paths["8"], 10)):
        data = datasets.load("cifar10", path)
        np.testing.assert_array_equal(data.train_images, expected.train_images[:count])
        np.testing.assert_array_equal(data.train_labels, expected.train_labels[:count])
        assert len(data.test_images) == 16 * count // 80


# How it is judged

def rows():
    return [table.Row("step", "a | b", "1", "2", table.Figure(0.98, 0.9, 1, 3), at_least=0.97, note="Once."),
            table.Row("step", "c", "1", "2", table.Figure(0.96, 0.9, 1, 3), at_least=0.97, note="Once."),
            table.Row("start", "d", "1", "", table.Figure(12.0, 12.0, 12.0, 1), " s", at_most=12, note="Twice."),
            table.Row("start", "e", "1", "", table.Figure(12.1, 12.0, 13.0, 2), " s", at_most=12),
            table.Row("start", "f", "1", "", table.Figure(5, 5, 5, 1)),
            table.Row("start", "g", "not measured", at_most=1)]


def test_verdicts():
    assert [table.verdict(row) for row in rows()] == ["met", "missed", "met", "missed", "", "failed"]
    assert table.figure([3, 1, 2, 10]) == (2.5, 1, 10, 4)
    assert table.ratios([2, 9, 8], [1, 3, 4]) == (8 / 3, 2, 3, 3)
    with pytest.raises(ValueError):
        table.figure([])


def test_table_and_json_appear_whole_or_not_at_all(tmp_path, monkeypatch):
    path = str(tmp_path / "benchmark")
    text = table.write(path, rows(), ["On this."], {"date": "today"})
    lines = text.splitlines()
    assert (tmp_path / "benchmark.md").read_text() == text and lines[0] == table.BEGIN and lines[-1] == table.END
    assert "| a / b [1] | 1 | 2 | 0.98 (0.9 to 1) | at least 0.97 | met |" in lines
    assert "| d [2] | 1 |  | 12 s | at most 12 s | met |" in lines
    assert [line.rstrip() for line in lines[-3:-1]] == ["[1] Once.", "[2] Twice."]
    content = json.loads((tmp_path / "benchmark.json").read_text())
    assert content["date"] == "today" and content["rows"][1]["verdict"] == "missed"
    assert content["rows"][1]["figure"] == {"median": 0.96, "low": 0.9, "high": 1, "rounds": 3}

    def full(number):
        raise OSError(28, "No space left on device")

    before = sorted(os.listdir(str(tmp_path)))
    monkeypatch.setattr(commands.os, "fsync", full)
    with pytest.raises(commands.UserError, match="whole"):
        table.write(path, [], [], {})
    assert sorted(os.listdir(str(tmp_path))) == before and (tmp_path / "benchmark.md").read_text() == text


def test_step_rows_take_the_ratios_of_medians():
    got = {"precision": "float32", "batch": 128, "flop": 128e9, "gflops": [90., 99.], "limit": [100., 100.],
           "images_per_second": [9., 10.], "parameters": [1, 2, 3], "seconds": {"step": [2., 4.], "pytorch_step": [3., 4.]},
           "pytorch": {"version": "9", "parameters": [1, 2, 3]}}
    product, peer = step_speed._rows(FULL, got, 0.97, None)
    assert product.figure == pytest.approx((0.945, 0.9, 0.99, 2)) and table.verdict(product) == "missed"
    assert peer.figure == pytest.approx((3.5 / 3, 1, 1.5, 2)) and table.verdict(peer) == "met"
    larger = dict(got, batch=512, gflops=[45.], limit=[50.])
    _, relative = step_speed._rows(FULL, larger, 0.97, got)
    assert relative.figure[:3] == pytest.approx([0.9 / 0.945] * 3) and relative.at_least == 0.9
    got["pytorch"]["parameters"] = [1, 2, 4]
    with pytest.raises(workers.Failed, match="parameters"):
        step_speed._rows(FULL, got, 0.97, None)
    got["pytorch"] = {"missing": "not installed (pip install torch)"}
    assert step_speed._rows(FULL, got, 0.97, None)[1].against == "PyTorch: not installed (pip install torch)"


def test_a_batch_that_the_memory_cannot_hold_is_not_tried(monkeypatch):
    def take_turns(scale, settings, batch, *_, **__):
        assert batch <= 512
        return {"memory": batch * 1e7, "images_per_second": [20.]}

    monkeypatch.setattr(step_speed, "take_turns", take_turns)
    monkeypatch.setattr(growth, "available_memory", lambda: 8e9)
    found = growth.measure(FULL, {"device": "cpu"}, False, {"float32-512": take_turns(None, None, 512)})
    assert [table.verdict(row) for row in found] == ["", "", "met", ""]
    assert found[-1].measured == "not tried: it would take about 12 GB of memory"


# Children

def test_children_answer_and_tell_why_they_failed(tmp_path, monkeypatch):
    (tmp_path / "child.py").write_text(
        "import os\nfrom benchmarks import workers\n\n\ndef prepare(settings):\n    print('not an answer')\n"
        "    return {'add': lambda a, b: a + b + settings['c'], 'die': lambda: os._exit(3), 'fail': lambda: 1 / 0}\n\n\n"
        "workers.serve(prepare)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with workers.Worker("child", {"c": 5}) as worker:
        assert [worker.ask("add", a=1, b=2), worker.ask("add", a=0, b=0)] == [8, 5]
        with pytest.raises(workers.Failed, match="ZeroDivisionError: division by zero"):
            worker.ask("fail")
        with pytest.raises(workers.Failed, match="ended with status 3"):
            worker.ask("die")


def test_turns_alternate_and_rates_count_all_calls(monkeypatch):
    calls = []
    got = workers.in_turns(2, {name: lambda name=name: calls.append(name) or len(calls) for name in "ab"})
    assert calls == ["a", "b", "a", "b"] and got == {"a": [1, 3], "b": [2, 4]}
    now, done = [0.0], []

    def work(n):
        done.append(n)
        now[0] += n

    monkeypatch.setattr(workers.time, "perf_counter", lambda: now[0])
    assert workers.seconds_each(work, 10, most=4) == 1 and done == [1, 4, 4]
    assert workers.peak_memory() > 50e6


def test_measurements_can_be_chosen():
    assert run._names("step, data") == ["step", "data"] and run._names(None) == list(run.NAMES)
    with pytest.raises(commands.UserError, match="no measurement 'steps'"):
        run._names("steps")
    assert FULL.batch == 128 and QUICK.width < 1


@pytest.mark.parametrize("settings, words", [
    ({"torch_python": "/nowhere"}, "/nowhere cannot be run"), ({"only": "x"}, "no measurement"), ({"data_dir": "."}, "no CIFAR-10"),
    ({"device": "gpu"}, "no GPU")])
def test_settings_that_cannot_be_used_are_refused(settings, words, tmp_path, monkeypatch):
    if "device" in settings and tf.config.list_physical_devices("GPU"):
        pytest.skip("there is a GPU")
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    settings = {name: str(tmp_path) if value == "." else value for name, value in settings.items()}
    monkeypatch.setattr(commands, "from_flags", lambda config: config(output_dir=str(tmp_path), **settings))
    with pytest.raises(commands.UserError, match=words):
        run.main()


# That the graph is fit for devices which cannot be measured here

HOST_TRIPS = ("PyFunc", "EagerPyFunc", "PyFuncStateless", "Print", "PrintV2", "Assert", "StringFormat", "WriteSummary")


def test_the_loop_is_traced_once_whatever_its_length_and_its_batches_come_from(traced):
    learner, _, batches = traced
    count = learner.train_loop.experimental_get_tracing_count()
    iterator = iter(batches)
    for n in (1, 3, 2):
        learner.train_loop(iterator, tf.constant(n))
    views = tf.zeros((8, 32, 32, 3))
    learner.train_loop(iter(tf.data.Dataset.from_tensors((views, views)).repeat()), tf.constant(1))
    assert learner.train_loop.experimental_get_tracing_count() == count == 1 and int(learner.step) == 7


@pytest.mark.parametrize("settings", [{}, {"precision_mode": "allow_mix_precision"}])
def test_nothing_in_the_loop_returns_to_the_host(traced, settings):
    function = traced[1]
    if settings:
        if not hasattr(models.keras.utils, "set_random_seed"):
            pytest.skip("this TensorFlow has no bfloat16 convolutions on the CPU")
        try:
            learner = make_learner(**settings)
            views = tf.data.Dataset.from_tensors((tf.zeros((8, 32, 32, 3)),) * 2)
            function = learner.train_loop.get_concrete_function(iter(views), tf.constant(2))
        finally:
            models.keras.mixed_precision.set_global_policy("float32")
    types = {node.op for nodes in graphs_of(function) for node in nodes}
    assert "FusedBatchNormV3" in types and not types.intersection(HOST_TRIPS)


def test_batches_are_prefetched_last(traced):
    batches = traced[2]
    assert "Prefetch" in type(batches).__name__

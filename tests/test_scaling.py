"""Several devices: two and four logical CPUs in one process, two workers over loopback, and workers that end or die.

The encoder has one block and the images 8 x 8 pixels, because each process has to make its graph anew; all else is
the command as it is. What needs several devices runs in processes of its own: this file is then the command.
"""
import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import tensorflow as tf
from command import BLOCKS, TINY, begin_tiny, completed, run, steps_done, wait_for
from conftest import ROOT
from tensorflow.python.ops import op_selector

import evaluation
import models
import npu_config
import pretraining
from commands import UserError
from devices import replicas
from models import keras

STEPS = 4
SECONDS_TO_NOTICE = 60  # that docs/scaling.md states for the death of a process


def begin(images, folder, *flags, **options):
    return begin_tiny(images, folder, "--log_every=1", "--save_checkpoints_steps=1", "--keep_checkpoint_max=100", *flags,
                      **options)


def complete(images, folder, *flags):
    return completed(begin(images, folder, *flags))


def begin_workers(images, folder, number, *flags):
    """Start workers on this machine; only the chief's --output_dir is `folder`, the others' must never come to be."""
    sockets = [socket.socket() for _ in range(number)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    hosts = ["127.0.0.1:%d" % each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    processes = []
    for i in range(number):
        config = json.dumps({"cluster": {"worker": hosts}, "task": {"type": "worker", "index": i}})
        processes.append(begin(images, folder if i == 0 else "%s-%d" % (folder, i), *flags, env={"TF_CONFIG": config}))
    return processes


def losses(folder):
    return (folder / "losses.txt").read_text()


def assert_close(folder, reference):
    """Every loss, and every number of the training state after each step: weights, moving statistics, Adam's slots."""
    expected, found = (np.loadtxt(str(each / "losses.txt"))[:STEPS] for each in (reference, folder))
    np.testing.assert_allclose(found, expected, rtol=2e-6)
    for step in range(1, STEPS + 1):
        state, twin = (tf.train.load_checkpoint(str(each / "checkpoints" / ("ckpt-%d" % step))) for each in (reference, folder))
        names = [name for name, dtype in state.get_variable_to_dtype_map().items() if dtype == tf.float32]
        assert len(names) > 100 and set(twin.get_variable_to_shape_map()) == set(state.get_variable_to_shape_map())
        for name in names:
            # The gradient of a bias before BatchNorm is nothing but rounding, which Adam divides by its own size.
            bias = name.startswith(("f_online", "g_online/hidden")) and "/bias/.ATTRIBUTES" in name
            np.testing.assert_allclose(twin.get_tensor(name), state.get_tensor(name), rtol=1e-4, atol=1e-4 if bias else 2e-6,
                                       err_msg="%s after step %d" % (name, step))


@pytest.fixture(scope="module")
def one(tiny_images, tmp_path_factory):
    """What one device leaves."""
    folder = tmp_path_factory.mktemp("one")
    complete(tiny_images, folder, "--max_steps=%d" % STEPS)
    return folder


def test_four_and_two_devices_compute_and_resume_what_one_does(tiny_images, one, tmp_path):
    complete(tiny_images, tmp_path, "--num_devices=4", "--max_steps=2")
    assert json.loads((tmp_path / "result.json").read_text())["device"] == "CPU in float32, 4 replicas"
    assert "Resuming from step 2" in complete(tiny_images, tmp_path, "--max_steps=3")
    assert "Resuming from step 3" in complete(tiny_images, tmp_path, "--num_devices=2", "--max_steps=%d" % STEPS)
    assert_close(tmp_path, one)
    logs = [json.loads((folder / "metrics.json").read_text())["log"] for folder in (tmp_path, one)]
    np.testing.assert_allclose([row["spread"] for row in logs[0]], [row["spread"] for row in logs[1]], rtol=1e-5)


@pytest.fixture(scope="module")
def two(tiny_images, one, tmp_path_factory):
    """What two workers leave that are never stopped."""
    folder = tmp_path_factory.mktemp("two") / "run"
    workers = begin_workers(tiny_images, folder, 2, "--max_steps=10")
    said = [worker.communicate(timeout=400) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], said
    assert said[1] == ("", "") and "[Epoch 3/6 Batch 2/4] Loss=" in said[0][0]
    assert not os.path.exists("%s-1" % folder)
    return folder


def test_two_workers_compute_what_one_does(one, two):
    assert_close(two, one)


def test_a_worker_that_dies_ends_the_others_and_all_go_on_exactly(tiny_images, two, tmp_path):
    folder = tmp_path / "run"
    workers = begin_workers(tiny_images, folder, 2)
    assert wait_for(lambda: (folder / "checkpoints").is_dir() and steps_done(folder) >= 3, workers[0])
    workers[1].send_signal(signal.SIGKILL)
    began = time.time()
    error = workers[0].communicate(timeout=400)[1]
    assert time.time() - began < SECONDS_TO_NOTICE
    assert workers[0].returncode == 1
    lines = [line for line in error.splitlines() if line.startswith("pretraining.py: ")]
    assert len(lines) == 1 and "Another worker of this job has ended" in lines[0] and "Traceback" not in error
    reached = steps_done(folder)
    assert reached < 24

    workers = begin_workers(tiny_images, folder, 2)
    assert wait_for(lambda: steps_done(folder) >= reached + 2, workers[0])
    workers[1].send_signal(signal.SIGTERM)
    said = [worker.communicate(timeout=400) for worker in workers]
    assert [worker.returncode for worker in workers] == [143, 143], said
    assert "Resuming from step %d of 24" % reached in said[0][0]
    assert "Stopped by SIGTERM at step %d" % steps_done(folder) in said[0][0]
    found, expected = losses(folder).splitlines(), losses(two).splitlines()
    assert len(found) == steps_done(folder) > reached + 1
    assert found[:len(expected)] == expected[:len(found)]


@pytest.mark.parametrize("lost_at", [1, 2, None])
def test_a_worker_that_leaves_after_all_have_come_is_not_taken_for_dead(lost_at):
    calls = []

    def gather(number):
        calls.append(number)
        if len(calls) == lost_at:
            raise tf.errors.UnavailableError(None, None, "Socket closed")
        return [number, number]

    device = object.__new__(replicas.Replicas)
    device.workers, device.worker_id, device.gather = 2, 0, gather
    with pytest.raises(UserError) if lost_at == 1 else contextlib.nullcontext(), device.together():
        device.wait_for_all()
    assert len(calls) == (1 if lost_at == 1 else 2)


def test_waiting_for_a_missing_worker_ends_at_a_signal(tiny_images, tmp_path):
    # TensorFlow 2.21 catches SIGTERM itself while it waits.
    number = signal.SIGTERM if tf.__version__.startswith("2.6.") else signal.SIGINT
    with socket.socket() as other, socket.socket() as own:
        for each in (other, own):
            each.bind(("127.0.0.1", 0))
        hosts = ["127.0.0.1:%d" % each.getsockname()[1] for each in (own, other)]
    config = json.dumps({"cluster": {"worker": hosts}, "task": {"type": "worker", "index": 0}})
    worker = begin(tiny_images, tmp_path, env={"TF_CONFIG": config})

    def listens():
        with socket.socket() as caller:
            return caller.connect_ex(("127.0.0.1", int(hosts[0].split(":")[1]))) == 0

    assert wait_for(listens, worker)
    time.sleep(1)  # from listening to waiting
    worker.send_signal(number)
    _, error = worker.communicate(timeout=60)
    assert worker.returncode == -number and "Traceback" not in error


def test_what_concerns_all_workers_ends_them_all(tiny_images, tmp_path):
    workers = begin_workers(tiny_images, tmp_path / "run", 2, "--learning_rate=1e38")
    said = [worker.communicate(timeout=400) for worker in workers]
    assert [worker.returncode for worker in workers] == [1, 1]
    assert all("The loss of step" in error.splitlines()[-1] for _, error in said), said


# What is computed and sent, in a process that has two devices

def on_two_devices(name):
    status, out, error = run("tests/test_scaling.py", name, forked=True, blocks=BLOCKS)
    assert status == 0, error
    return out


def test_batch_norm_is_that_of_the_whole_batch():
    on_two_devices("check_batch_norm")


def check_batch_norm():
    device = npu_config.open_device(npu_config.Options(device="cpu", num_devices=2))
    halves = npu_config.Options(device="cpu", num_devices=2, sync_batch_norm=False)
    for shape, mean, half in (((8, 3, 3, 5), 300, False), ((8, 6), 2, False), ((8, 3, 3, 5), 2, True)):
        x = (np.random.RandomState(1).randn(*shape) * [0.1, 1, 2, 3, 4, 5][:shape[-1]] + mean).astype(np.float32)
        w = np.random.RandomState(2).randn(*shape).astype(np.float32)
        if half:
            x = x.astype(np.float16).astype(np.float32)
        policy = "mixed_float16" if half else "float32"
        near = mean if mean > 100 else 0  # as it is after some steps
        whole = applied(keras.layers.BatchNormalization(dtype=policy), x, w, None, near=near)
        both = applied(device.batch_norm, x, w, device, policy, near)
        for name, a, b in zip(("y", "dx", "dgamma", "dbeta", "mean", "variance"), both, whole):
            np.testing.assert_allclose(a, b, rtol=4e-3 if half else 1e-4, atol=2e-2 if half else 1e-3 if near else 1e-4, err_msg=name)
        if half:
            continue
        first = applied(keras.layers.BatchNormalization(), x[:4], w[:4], None)
        own = applied(replicas.Replicas("cpu", device.strategy, halves, 1, 0).batch_norm, x, w, device)
        np.testing.assert_allclose(own[0][:4], first[0], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(own[4], first[4], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(own[5], first[5], rtol=1e-5, atol=1e-6)


def applied(layer, x, w, device, policy="float32", near=0):
    """Two training steps' output, gradients of sum(w * output), and the moving statistics."""
    def step(x, w):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = tf.cast(layer(x, training=True), tf.float32)
            loss = tf.reduce_sum(y * w)
        return [y] + tape.gradient(loss, [x, layer.gamma, layer.beta])

    if device is None:
        layer.build(x.shape)
        both = tf.function(step)
    else:
        with device.scope():
            layer = layer(dtype=policy)
            layer.build(x.shape)
        parts = [device.strategy.experimental_distribute_values_from_function(
            lambda context, array=array: tf.constant(np.split(array, 2)[context.replica_id_in_sync_group])) for array in (x, w)]
        distributed = tf.function(lambda: device.strategy.run(step, parts))

        def both(x, w):
            y, dx, dgamma, dbeta = [device.strategy.experimental_local_results(value) for value in distributed()]
            return tf.concat(y, 0), tf.concat(dx, 0), tf.add_n(dgamma), tf.add_n(dbeta)
    layer.moving_mean.assign(tf.fill(layer.moving_mean.shape, float(near)))
    for _ in range(2):
        results = both(tf.constant(x), tf.constant(w))
    return [result.numpy() for result in results] + [layer.moving_mean.numpy(), layer.moving_variance.numpy()]


def test_every_device_starts_with_targets_as_the_online_networks():
    on_two_devices("check_targets")


def check_targets():
    device = npu_config.open_device(npu_config.Options(device="cpu", num_devices=2))
    models.ENCODERS["resnet18"] = models.ResNet18
    for given in (dict(width_multiplier=1 / 16), dict(encoder_weights="cifar10-narrow")):
        config = pretraining.consistent(pretraining.Config(device="cpu", batch_size=8, target_start="online", **given))
        learner = pretraining.Byol(config, device, total_steps=10, loop_size=1)
        pairs = zip(learner.f_target.weights + learner.g_target.weights, learner.f_online.weights + learner.g_online.weights)
        for target, online in pairs:
            for part in (0, 1):
                np.testing.assert_array_equal(target.values[part], online.values[0])


def test_a_step_sends_what_the_documentation_says():
    collectives = json.loads(on_two_devices("count_collectives").splitlines()[-1])
    assert sorted(collectives["counted"]) == sorted(collectives["computed"])


def count_collectives():
    """Print how many numbers each all-reduce of a step has, in the graph that workers trace, and as docs/scaling.md computes it."""
    tf.config.set_logical_device_configuration(tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2)
    strategy = tf.distribute.MultiWorkerMirroredStrategy._from_local_devices(["CPU:0", "CPU:1"])
    config = pretraining.Config(device="cpu", width_multiplier=1 / 16, batch_size=8)
    learner = pretraining.Byol(config, replicas.Replicas("cpu", strategy, config, 1, 0), total_steps=10, loop_size=1)
    views = tf.data.Dataset.from_tensors((tf.zeros([8, 8, 8, 3]),) * 2)
    iterator = learner._device.iterate(views)
    graph = tf.function(lambda: learner.train_step_pretraining(*next(iterator))).get_concrete_function().graph
    sizes = [op.inputs[0].shape.num_elements() for op in graph.get_operations() if op.type.startswith("CollectiveReduce")]
    channels = {name: [layer.gamma.shape[0] for layer in getattr(learner, name)._flatten_layers()
                       if isinstance(layer, keras.layers.BatchNormalization)] for name in ("f_online", "g_online", "q_online")}
    online = channels["f_online"] + channels["g_online"] + channels["q_online"]
    target = channels["f_online"] + channels["g_online"]
    norms = [2 * c for c in 4 * online + 2 * target]  # two views: online forward and backward, target forward
    gradients = sum(weight.shape.num_elements() for weight in learner.online_weights)
    print(json.dumps({"counted": sizes[::2], "computed": norms + [gradients, 128, 128, 2], "all": len(sizes)}))


def test_the_graph_of_two_devices_is_made_in_little_more_than_twice_the_time():
    figures = json.loads(on_two_devices("measure_graphs").splitlines()[-1])
    assert figures["two"] < 2 * 2 * figures["one"]  # operations; BatchNorm over all devices takes more of them than Keras's
    # TensorFlow's own all-reduce walks through the graphs of all devices, over 50,000 operations for this small encoder.
    assert figures["walked"] < figures["one"]


def measure_graphs():
    """Print how many operations a step has on one and on two devices, and how many TensorFlow walked over to make the latter."""
    several = npu_config.open_device(npu_config.Options(device="cpu", num_devices=2))
    walked, walk = [], op_selector.get_backward_walk_ops

    def noted(*arguments, **settings):
        walked.extend(walk(*arguments, **settings))
        return walked

    op_selector.get_backward_walk_ops = noted
    counts = []
    for device in (npu_config.Device("cpu"), several):
        config = pretraining.Config(device="cpu", width_multiplier=1 / 16, batch_size=8)
        learner = pretraining.Byol(config, device, total_steps=10, loop_size=1)
        iterator = device.iterate(tf.data.Dataset.from_tensors((tf.zeros([8, 8, 8, 3]),) * 2))
        assert replicas.Replicas.iterator is (iterator if device is several else None)  # kept: its end may wait for a minute
        graph = tf.function(lambda: learner.train_step_pretraining(*next(iterator))).get_concrete_function().graph
        counts.append(len(graph.get_operations()))
    print(json.dumps({"one": counts[0], "two": counts[1], "walked": len(walked)}))


# Flags and TF_CONFIG

@pytest.mark.parametrize("text, told", [
    ("{", "is not JSON"), ("[]", "lacks a part"), ("{}", "lacks a part"), ('{"cluster": {"worker": []}, "task": {}}', "lacks a part"),
    ('{"cluster": {"worker": 3}, "task": {"type": "worker", "index": 0}}', "lacks a part"),
    ('{"cluster": {"worker": []}, "task": {"type": "worker", "index": 0}}', "this is worker 0, of 0 workers"),
    ('{"cluster": {"worker": ["a:1", "b:1"]}, "task": {"type": "worker", "index": 2}}', "this is worker 2, of 2 workers"),
    ('{"cluster": {"worker": ["a:1", "b:1"]}, "task": {"type": "worker", "index": "x"}}', "lacks a part"),
    ('{"cluster": {"worker": ["a:1"], "ps": ["b:1"]}, "task": {"type": "ps", "index": 0}}', "the jobs ps, worker")])
def test_a_wrong_tf_config_is_told(monkeypatch, text, told):
    monkeypatch.setenv("TF_CONFIG", text)
    with pytest.raises(UserError, match="TF_CONFIG .*" + told) as error:
        npu_config.open_device(npu_config.Options(device="cpu"))
    assert "\n" not in str(error.value)


WRONG = [None, True, -1, 1.5, float("nan"), 10 ** 30, "", "a", "a b:1", "a:", ":1", "a:0", "a:65536", "a:1:2", "http://a:1", "a:1\n",
         "x" * 5000, [1], [[]], [None], ["a"], ["a:1", "a:1"], {}, {"a": 1}, {"0": "a:1"},
         {"x" * 5000: ["a:1"]}, {"x" * 5000: 1}, {"x" * 5000: [1]}]


@pytest.mark.parametrize("part", ["", "cluster", "cluster worker", "cluster worker 1", "cluster chief", "cluster ps", "task",
                                  "task type", "task index", "rpc_layer"])
def test_no_wrong_part_of_a_tf_config_gets_by(monkeypatch, part):
    for value in WRONG:
        config = {"cluster": {"worker": ["b:1", "c:2"]}, "task": {"type": "worker", "index": 1}, "": None}
        place, names = config, [int(name) if name.isdigit() else name for name in part.split(" ")]
        for name in names[:-1]:
            place = place[name]
        place[names[-1]] = value
        monkeypatch.setenv("TF_CONFIG", json.dumps(config if part else value))
        with pytest.raises(UserError, match="^TF_CONFIG .*such as {") as error:
            replicas._cluster()
        assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_whatever_is_done_to_a_tf_config_it_is_refused_in_one_line_or_makes_sense(monkeypatch):
    """MUTATED: how many, each changed in one to three places (60000: by hand)."""
    chance = random.Random(int(os.environ.get("SEED", "0")))
    right = '{"cluster": {"chief": ["10.0.0.1:2222"], "worker": ["[::1]:5", "h-2.x:80"]}, "task": {"type": "chief", "index": 0}}'
    pieces = [json.dumps(value) for value in WRONG] + [
        "9" * 5000, "1e999", "[" * 3000, '"\\ud800"', "\0", "'", "\\", ",", ":", "}", "\u0661"]
    taken = 0
    for _ in range(int(os.environ.get("MUTATED", "500"))):
        text = right
        for _ in range(chance.randrange(1, 4)):
            spans = [found.span() for found in re.finditer(r'"[^"]*"|\d+|\[[^\]]*\]|\{[^}]*\}', text)] + [
                (i, min(len(text), i + chance.randrange(12))) for i in (chance.randrange(len(text) + 1),)]
            begin, end = chance.choice(spans)
            text = text[:begin] + chance.choice(pieces + ["", text[begin:end] * 2]) + text[end:]
        monkeypatch.setattr(os, "environ", {"TF_CONFIG": text})
        try:
            workers, own = replicas._cluster()
            assert 0 <= own < workers and (workers > 1 or text != right)
            taken += 1
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 400, text
        monkeypatch.undo()
    assert taken  # so that not all were nonsense


@pytest.mark.parametrize("text", ["[" * 100000, "\0", '{"cluster": {"worker": ["a:1", "b:1"]}, "task": {"type": "worker"}}',
                                  '{"cluster": {"worker": ["a:1", "b:1"]}, "task": {"index": 0}}', "\ud800", "host1:1,host2:1"])
def test_what_is_no_tf_config_is_told(monkeypatch, text):
    monkeypatch.setattr(os, "environ", {"TF_CONFIG": text})
    with pytest.raises(UserError, match="^TF_CONFIG .*such as {") as error:
        replicas._cluster()
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_a_port_in_use_is_told(tiny_images, tmp_path):
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        hosts = ["127.0.0.1:%d" % other.getsockname()[1], "127.0.0.1:1"]
        config = json.dumps({"cluster": {"worker": hosts}, "task": {"type": "worker", "index": 0}})
        process = begin(tiny_images, tmp_path, env={"TF_CONFIG": config})
        error = process.communicate(timeout=100)[1]
    assert process.returncode == 1 and "Worker 0 cannot listen at its port" in error.splitlines()[-1] and "Traceback" not in error


def test_a_cluster_is_read(monkeypatch):
    monkeypatch.setenv("TF_CONFIG", '{"cluster": {"worker": ["[::1]:5", "10.0.0.2:2222"]}, "task": {"type": "worker", "index": "1"}}')
    assert replicas._cluster() == (2, 1)
    task = '"task": {"type": "worker", "index": 1}'
    monkeypatch.setenv("TF_CONFIG", '{"cluster": {"chief": ["a:1"], "worker": ["b:1", "c:1"]}, %s}' % task)
    assert replicas._cluster() == (3, 2)
    monkeypatch.setenv("TF_CONFIG", '{"cluster": {"worker": ["a:1"]}, "task": {"type": "worker", "index": 0}}')
    assert replicas._cluster() == (1, 0) and npu_config.open_device(npu_config.Options(device="cpu")).replicas == 1


def test_commands_for_one_ask_to_have_tf_config_unset(monkeypatch, tmp_path):
    monkeypatch.setenv("TF_CONFIG", '{"cluster": {"worker": ["a:1", "b:1"]}, "task": {"type": "worker", "index": 0}}')
    with pytest.raises(UserError, match="TF_CONFIG lists 2 workers, but .*; unset TF_CONFIG"):
        evaluation.start(evaluation.Config(encoder_weights="none", device="cpu", output_dir=str(tmp_path)))


@pytest.mark.parametrize("settings, told", [(dict(jit_compile=True), "--jit_compile goes with one device"),
                                            (dict(num_devices=3), "of TF_CONFIG is one device")])
def test_settings_that_do_not_go_together(monkeypatch, settings, told):
    monkeypatch.setenv("TF_CONFIG", '{"cluster": {"worker": ["a:1", "b:1"]}, "task": {"type": "worker", "index": 0}}')
    with pytest.raises(UserError, match=told):
        npu_config.open_device(npu_config.Options(device="cpu", **settings))


def test_a_batch_that_does_not_come_out_even(tiny_images, tmp_path):
    status, _, error = run("pretraining.py", *TINY + ["--data_dir=%s" % tiny_images, "--output_dir=%s" % tmp_path, "--num_devices=3"],
                           forked=True)
    assert status == 1 and error == "pretraining.py: --batch_size 16 is not a multiple of the 3 devices that share it.\n"


# scripts/train_workers.sh, with a stand-in for Python that notes how it was called

STAND_IN = """#!/usr/bin/env bash
[[ $1 == */pretraining.py ]] || exec %s "$@"
index=$(sed 's/.*"index": *\\([0-9]*\\).*/\\1/' <<<"$TF_CONFIG")
echo "$TF_CONFIG $*" >>calls
echo "worker $index speaks"
trap 'echo "worker $index is ended" >>calls; exit 143' TERM
if [ "$index" = "$FAILS" ]; then exit 3; fi
for ((i = 0; i < SECONDS_TO_RUN * 10; i++)); do sleep 0.1; done
"""


def train_workers(folder, *arguments, **environment):
    stand_in = folder / "python"
    stand_in.write_text(STAND_IN % sys.executable)
    stand_in.chmod(0o755)
    settings = dict(os.environ, PYTHON=str(stand_in), FAILS="none", SECONDS_TO_RUN="0")
    settings.update(environment)
    result = subprocess.run([os.path.join(ROOT, "scripts", "train_workers.sh")] + list(arguments), cwd=str(folder), timeout=60,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True, env=settings)
    calls = (folder / "calls").read_text().splitlines() if (folder / "calls").exists() else []
    return result.returncode, result.stdout, result.stderr, calls


def test_train_workers_starts_each_with_its_index(tmp_path):
    status, out, error, calls = train_workers(tmp_path, "3", "--output_dir=a b", "--quiet")
    assert (status, error) == (0, "") and out == "worker 0 speaks\n"
    configs = [json.loads(call[:call.index("}}") + 2]) for call in calls]
    assert sorted(config["task"]["index"] for config in configs) == [0, 1, 2]
    hosts = configs[0]["cluster"]["worker"]
    assert len(set(hosts)) == 3 and all(config["cluster"]["worker"] == hosts for config in configs)
    assert all(call.endswith("pretraining.py --output_dir=a b --quiet") for call in calls)


def test_train_workers_ends_the_rest_if_one_fails(tmp_path):
    status, out, error, calls = train_workers(tmp_path, "2", FAILS="1", SECONDS_TO_RUN="50")
    assert status == 3 and "worker 1 failed" in error and "worker 0 is ended" in calls


@pytest.mark.parametrize("arguments", [[], ["0"], ["two"], ["--num_epochs=3"]])
def test_train_workers_wants_a_number(tmp_path, arguments):
    status, _, error, calls = train_workers(tmp_path, *arguments)
    assert status == 1 and "number of workers" in error and not calls


if __name__ == "__main__":
    globals()[sys.argv[1]]()

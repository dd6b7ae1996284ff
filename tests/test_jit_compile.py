"""--jit_compile: the steps of pretraining, fine-tuning and linear evaluation, compiled by XLA once, tell what others tell."""
import json
import os
import re

import numpy as np
import pytest
import tensorflow as tf
from command import BLOCKS, TINY, begin_tiny, completed, encoder_of, run

import datasets
import models
import npu_config
import pretraining
from devices import host

WITH_BFLOAT16 = ["must_keep_origin_dtype"] + ["allow_mix_precision"] * host.BFLOAT16_ON_CPU


@pytest.fixture(scope="module")
def learners():
    """Two that differ in nothing but XLA, with dynamic loss scaling, and the views of eight steps for each."""
    encoder = models.ENCODERS["resnet18"]
    models.ENCODERS["resnet18"] = encoder_of(BLOCKS)
    views = tf.random.stateless_uniform((8, 2, 8, 8, 8, 3), [1, 2])
    made = []
    for jit_compile in (False, True):
        config = pretraining.Config(device="cpu", width_multiplier=1 / 16, batch_size=8, loss_scale="dynamic", jit_compile=jit_compile)
        device = npu_config.open_device(config)
        device.set_seed(1)
        learner = pretraining.Byol(config, device, total_steps=10, loop_size=4)
        made.append((learner, iter(datasets.map_elements(tf.data.Dataset.range(8), lambda i: (views[i, 0], views[i, 1])))))
    models.ENCODERS["resnet18"] = encoder
    return made


def assert_same(learners):
    plain, compiled = (learner for learner, _ in learners)
    np.testing.assert_allclose(compiled.recent, plain.recent, rtol=1e-4)
    assert int(compiled.step) == int(plain.step) and int(compiled.optimizer.iterations) == int(plain.optimizer.iterations)
    assert float(compiled.optimizer.loss_scale) == float(plain.optimizer.loss_scale)
    for mine, other in zip(compiled.variables, plain.variables):
        # Where a gradient is 0 but for rounding, as a bias before BatchNorm has it, Adam's step is the rate times noise.
        np.testing.assert_allclose(mine, other, rtol=1e-3, atol=2e-4 if "bias" in mine.name else 2e-5, err_msg=mine.name)


def test_steps_are_those_without_xla_traced_once(learners):
    for n in (1, 2):
        for learner, iterator in learners:
            learner.train_loop(iterator, tf.constant(n))
        assert_same(learners)
    compiled = learners[1][0]
    assert int(compiled.step) == 3 and np.all(compiled.recent.numpy()[:2, 1:] > 0)
    assert [f.experimental_get_tracing_count() for f in (compiled.train_loop, compiled._step)] == [1, 1]


def test_the_loss_scale_grows_and_falls(learners):
    for learner, iterator in learners:
        scale = learner.optimizer._loss_scale
        scale.current_loss_scale.assign(2.0 ** 10)
        scale.counter.assign(learner.optimizer.dynamic_growth_steps - 1)
        learner.train_loop(iterator, tf.constant(1))
    assert_same(learners)
    assert float(learners[1][0].optimizer.loss_scale) == 2.0 ** 11
    kernel = learners[1][0].online_weights[0].numpy()
    for learner, iterator in learners:
        learner.optimizer._loss_scale.current_loss_scale.assign(2.0 ** 127)
        learner.train_loop(iterator, tf.constant(1))
    assert_same(learners)
    assert float(learners[1][0].optimizer.loss_scale) == 2.0 ** 126
    np.testing.assert_array_equal(learners[1][0].online_weights[0], kernel)


@pytest.mark.parametrize("mode", WITH_BFLOAT16)
def test_pretraining_compiles_its_step_once(tiny_images, tmp_path, mode):
    flags = ["--precision_mode=" + mode, "--max_steps=6", "--log_every=2"]
    dump = {"XLA_FLAGS": "%s --xla_dump_to=%s --xla_dump_hlo_as_text" % (os.environ["XLA_FLAGS"], tmp_path / "dump")}
    completed(begin_tiny(tiny_images, tmp_path / "jit", "--jit_compile", *flags, env=dump))
    completed(begin_tiny(tiny_images, tmp_path / "plain", *flags))
    mine, other = (np.loadtxt(str(tmp_path / name / "losses.txt")) for name in ("jit", "plain"))
    assert len(mine) == 6
    # XLA rounds to bfloat16 less often, how much less is the processor's, and the weights go apart by that.
    exact = mode == "must_keep_origin_dtype"
    np.testing.assert_allclose(mine[0], other[0], rtol=1e-4 if exact else 3e-4)
    np.testing.assert_allclose(mine, other, rtol=1e-4 if exact else 1e-3)
    dumped = [name for name in os.listdir(str(tmp_path / "dump")) if "train_step_pretraining" in name]
    assert len({re.search(r"module_(\d+)", name).group(1) for name in dumped}) == 1


@pytest.mark.parametrize("command, more", [("finetuning", ()), ("finetuning", ("--freeze",)), ("linearevaluation", ()),
                                           ("linearevaluation", ("--cached_features",))])
def test_classifiers_learn_the_same(tiny_images, tmp_path, command, more):
    found = []
    for folder, flags in (("jit", ["--jit_compile"]), ("plain", [])):
        arguments = TINY[:-1] + ["--num_epochs=2", "--encoder_weights=none", "--data_dir=%s" % tiny_images]
        status, _, error = run(command + ".py", *arguments + flags + list(more) + ["--output_dir=%s" % (tmp_path / folder)],
                               forked=True, blocks=BLOCKS)
        assert status == 0, error
        found.append(json.loads((tmp_path / folder / ("result_%s.json" % command)).read_text()))
    assert found[0]["steps"] == 8 and found[0]["loss"] == pytest.approx(found[1]["loss"], rel=1e-4)

"""ResNet-50 with ImageNet's stem through all commands: pretraining.py, then the three that take its weight file."""
import glob
import os

import numpy as np
from command import pretrain

import embed
import finetuning
import linearevaluation


def test_all_commands_take_the_stem(tiny_images, tmp_path):
    flags = ["--dataset=folder", "--data_dir=%s" % tiny_images, "--image_size=8", "--batch_size=16", "--encoder=resnet50",
             "--stem=imagenet", "--max_steps=1", "--cache_dir=%s" % (tmp_path / "cache")]
    status, out, error = pretrain(tmp_path / "run", *flags, forked=True)
    assert status == 0 and "Shape of h: (256, 128)" in out, error
    path, = glob.glob(str(tmp_path / "run" / "*.h5"))
    settings = dict(encoder="resnet50", encoder_weights=path, width_multiplier=1 / 16, dataset="folder", data_dir=str(tiny_images),
                    image_size=8, device="cpu", output_dir=str(tmp_path), cache_dir=str(tmp_path / "cache"), quiet=True)
    stores = os.listdir(str(tmp_path / "cache"))
    features = embed.embed(embed.Config(split="test", stem="imagenet", **settings))["features"]
    assert features.shape == (4, 128)
    told_by_the_file = embed.embed(embed.Config(split="test", **settings))["features"]
    np.testing.assert_array_equal(features, told_by_the_file)
    linear = linearevaluation.Config(stem="imagenet", cached_features=True, max_steps=2, **settings)
    tuned = finetuning.Config(stem="imagenet", max_steps=1, **settings)
    for figures in (linearevaluation.evaluate(linear), finetuning.finetune(tuned)):
        assert 0 <= figures["test_accuracy"] <= 1
    assert os.listdir(str(tmp_path / "cache")) == stores  # all shared the images that the first decoded

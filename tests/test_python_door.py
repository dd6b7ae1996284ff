"""What the commands do, called from Python: from a script of one's own, and from a notebook's kernel."""
import subprocess
import sys

import pytest
from command import BLOCKS
from conftest import ROOT

SCRIPT = """
import os, signal, sys
sys.path.insert(0, {root!r})
before = [signal.getsignal(number) for number in range(1, 32)]
import embed, finetuning, linearevaluation, models, pretraining
from commands import UserError

models.ENCODERS["resnet18"] = lambda width, name="resnet18", **more: models.ResNet({blocks}, width, name, **more)
data = dict(dataset="folder", data_dir={images!r}, image_size=8, device="cpu", width_multiplier=1 / 16, quiet=True)
result = pretraining.train(pretraining.Config(batch_size=16, num_epochs=2, output_dir={out!r}, **data))
assert result.step == 8 and os.path.basename(result.weights) == "f_online_2.h5" and len(result.history.losses) == 8
assert 0 <= result.knn <= 1 and result.history.knn[-1]["accuracy"] == result.knn
found = dict(data, encoder_weights=result.weights, output_dir={out!r})
linear = linearevaluation.evaluate(linearevaluation.Config(batch_size=16, num_epochs=1, knn=True, **found))
assert linear["knn"] == result.knn and 0 <= linear["test_accuracy"] <= 1
assert finetuning.finetune(finetuning.Config(batch_size=16, max_steps=2, **found))["steps"] == 2
content = embed.embed(embed.Config(**found))
assert content["features"].shape == (68, 8)
for call, word in ((lambda: pretraining.train(pretraining.Config(output_dir={out!r}, **dict(data, batch_size=7))), "other settings"),
                   (lambda: pretraining.train(pretraining.Config(learning_rate=float("nan"))), "learning_rate is nan"),
                   (lambda: linearevaluation.evaluate(linearevaluation.Config(**dict(found, encoder_weights="no.h5"))), "no.h5"),
                   (lambda: finetuning.finetune(finetuning.Config(**dict(found, label_fraction=2.0))), "label_fraction is 2"),
                   (lambda: embed.embed(embed.Config(**dict(found, split="none"))), "split is 'none'")):
    try:
        call()
    except UserError as error:
        assert word in str(error), error
    else:
        raise AssertionError(word)
assert [signal.getsignal(number) for number in range(1, 32)] == before
print("all of it")
"""


def script(images, out):
    return SCRIPT.format(root=ROOT, blocks=BLOCKS, images=str(images), out=str(out))


def test_a_script_of_ones_own(tiny_images, tmp_path):
    path = tmp_path / "own.py"
    path.write_text(script(tiny_images, tmp_path / "run"))
    done = subprocess.run([sys.executable, str(path)], cwd=str(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          universal_newlines=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "all of it"
    assert (tmp_path / "run" / "embeddings.npz").exists() and not (tmp_path / "checkpoints").exists()


def test_ctrl_c_in_a_script_saves_and_is_a_keyboard_interrupt(tiny_images, tmp_path):
    path = tmp_path / "own.py"
    path.write_text("""
import os, signal, sys
sys.path.insert(0, {root!r})
import models, pretraining, runs
models.ENCODERS["resnet18"] = lambda width, name="resnet18", **more: models.ResNet({blocks}, width, name, **more)
took = runs.Run.took
runs.Run.took = lambda self, *rest: (took(self, *rest), self.step >= 3 and os.kill(os.getpid(), signal.SIGINT))
try:
    pretraining.train(pretraining.Config(dataset="folder", data_dir={images!r}, image_size=8, device="cpu", width_multiplier=1 / 16,
                                         batch_size=16, output_dir={out!r}, iterations_per_loop=1))
except KeyboardInterrupt as stopped:
    assert stopped.args == (signal.SIGINT,)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    print("went on")
""".format(root=ROOT, blocks=BLOCKS, images=str(tiny_images), out=str(tmp_path / "run")))
    done = subprocess.run([sys.executable, str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True)
    assert done.returncode == 0 and "Stopped by SIGINT at step 3;" in done.stdout, done.stderr
    assert done.stdout.splitlines()[-1] == "went on" and len((tmp_path / "run" / "losses.txt").read_text().splitlines()) == 3


def test_a_notebooks_kernel(tiny_images, tmp_path):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(script(tiny_images, tmp_path / "run")),
                                           nbformat.v4.new_code_cell("print(content['features'].shape, result.knn == linear['knn'])")])
    nbclient.NotebookClient(book, timeout=300, resources={"metadata": {"path": str(tmp_path)}},
                            kernel_name="python3").execute()
    assert book.cells[0].outputs[-1].text.endswith("all of it\n") and book.cells[1].outputs[0].text == "(68, 8) True\n"


def test_options_of_a_session_that_has_begun():
    """Another training in the same process, where TensorFlow runs already, with other options of the device."""
    code = """
import sys
sys.path.insert(0, {root!r})
import tensorflow as tf
tf.zeros([1]).numpy()
import npu_config
npu_config.open_device(npu_config.Options(device="cpu"))
try:
    npu_config.open_device(npu_config.Options(device="cpu", num_devices=2))
except npu_config.UserError as error:
    print(error)
""".format(root=ROOT)
    out = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, universal_newlines=True, check=True).stdout
    assert out.count("\n") == 1 and "anew" in out and "--num_devices" in out

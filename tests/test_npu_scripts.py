"""The shell scripts in ModelZoo's manner: what they parse and pass on, and how they fail. Commands are replaced by a recorder, but
in the last test; whole runs through the scripts are in test_npu_runs.py."""
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from command import steps_done, wait_for

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SCRIPTS = ("train_performance_1p.sh", "train_full_1p.sh", "train_full_8p.sh")
# Stands for Python: records how it was called, and leaves and prints what the commands would.
RECORDER = """#!{python}
import json, os, re, sys, time
out, script = os.environ["RECORD"], os.path.basename(sys.argv[1])
with open(os.path.join(out, "calls.jsonl"), "a") as file:
    seen = {{name: os.environ.get(name) for name in ("RANK_ID", "RANK_SIZE", "RANK_TABLE_FILE", "ASCEND_DEVICE_ID")}}
    file.write(json.dumps(dict(script=script, arguments=sys.argv[2:], environment=seen)) + "\\n")
if os.environ.get("FAIL", "no") in (script, os.environ.get("RANK_ID")):
    print("out of order")
    sys.exit(7)
if os.environ.get("FAIL", "").isdigit():
    time.sleep(60)  # as a process that waits for the failed one
run = re.search("--output_dir=([^\\n]*)", "\\n".join(sys.argv)).group(1)
os.makedirs(run, exist_ok=True)
if script == "pretraining.py":
    open(os.path.join(run, "f_online_9.h5"), "w").close()
    open(os.path.join(run, "f_online_10.h5"), "w").close()
    open(os.path.join(run, "losses.txt"), "w").write("2.5\\n1.25\\n")
    for speed in os.environ.get("SPEEDS", "10.0 100.0 300.0").split():
        print("[Epoch 1/1 Batch 10/97] Loss=1.00723. Time=%.2f, %s images/s, spread 0.07, 0:00:01 left" % (5120 / float(speed), speed))
else:
    print("[Epoch 50/50 Batch 97/97] loss 0.81234, 3.00 s")
    print("Test Accuracy: 0.8692")
"""


class Script:
    def __init__(self, folder):
        self.folder = folder
        python = folder / "python"
        python.write_text(RECORDER.format(python=sys.executable))
        python.chmod(0o755)
        (folder / "table.json").write_text("{}")

    def __call__(self, name, *arguments, **variables):
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("RANK_", "CM_", "ASCEND_"))}
        environment = dict(clean, PYTHON=str(self.folder / "python"), RECORD=str(self.folder), STOP_SECONDS="1", **variables)
        return subprocess.run([os.path.join(ROOT, "scripts", name), *arguments], cwd=str(self.folder), env=environment,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True)

    def train(self, name, *arguments, **variables):
        if name == "train_full_8p.sh":
            arguments = ("--rank_table_file", str(self.folder / "table.json"), "--rank_size=2") + arguments
        return self(name, "--output_path", str(self.folder / "out"), *arguments, **variables)

    def calls(self):
        with open(str(self.folder / "calls.jsonl")) as file:
            return [json.loads(line) for line in file]

    def result(self, case):
        with open(str(self.folder / "out" / ("BYOL_for_TensorFlow2_bs512_%s.log" % case))) as file:
            return dict(line.rstrip("\n").split(" = ") for line in file)


@pytest.fixture
def script(tmp_path):
    return Script(tmp_path)


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_lists_exactly_what_is_parsed(script, name):
    for flag in ("-h", "--help"):
        done = script(name, flag)
        assert done.returncode == 0 and done.stderr == ""
    listed = re.findall(r"^  --(\w+) +\S.*\(default: (.*)\)$", done.stdout, re.M)
    assert len(listed) == done.stdout.count("\n  --")
    names = [flag for flag, _ in listed]
    for flag in ("data_path", "precision_mode", "over_dump", "data_dump_flag", "data_dump_step", "profiling", "use_mixlist",
                 "mixlist_file", "fusion_off_flag", "fusion_off_file", "auto_tune", "batch_size", "train_epochs"):
        assert flag in names
    values = {"data_path": str(script.folder), "output_path": str(script.folder / "out"), "rank_size": "1",
              "rank_table_file": str(script.folder / "table.json"), "batch_size": "64", "ckpt_path": str(script.folder / "ckpt")}
    values.update({name: str(script.folder / name) for name in ("over_dump_path", "data_dump_path", "profiling_dump_path")})
    given = ["--%s=%s" % (flag, values.get(flag, default)) for flag, default in listed if values.get(flag, default) != "none"]
    assert script(name, *given).returncode == 0
    assert script(name, *[word for flag in given for word in flag.split("=")]).returncode == 0
    halves = len(script.calls()) // 2
    assert [call["arguments"] for call in script.calls()[:halves]] == [call["arguments"] for call in script.calls()[halves:]]


def test_flags_reach_pretraining_under_its_own_names(script):
    done = script.train("train_full_1p.sh", "--data_path", str(script.folder), "--precision_mode=force_fp32", "--over_dump=True",
                        "--data_dump_step", "0|5", "--batch_size=512", "--train_epochs=10", "--eval_epochs=3", "--", "--seed=7")
    assert done.returncode == 0, done.stderr
    pretraining, linear = script.calls()
    for flag in ("--data_path=%s" % script.folder, "--precision_mode=force_fp32", "--over_dump=True", "--data_dump_step=0|5",
                 "--over_dump_path=%s" % (script.folder / "out" / "overflow_dump"), "--batch_size=512", "--num_epochs=10",
                 "--output_dir=%s" % (script.folder / "out" / "run"), "--auto_tune=False", "--seed=7"):
        assert flag in pretraining["arguments"]
    assert not any(flag.startswith("--encoder_weights") for flag in pretraining["arguments"])
    assert linear["script"] == "linearevaluation.py"
    for flag in ("--data_path=%s" % script.folder, "--precision_mode=force_fp32", "--num_epochs=3",
                 "--encoder_weights=%s" % (script.folder / "out" / "run" / "f_online_10.h5")):
        assert flag in linear["arguments"]


def test_other_spellings_and_paths_of_modelzoo(script):
    paths = {name: str(script.folder / name) for name in ("over_dump_path", "data_dump_path", "profiling_dump_path")}
    done = script.train("train_full_1p.sh", "--num_epochs=3", "--autotune=True", "--ckpt_path=%s" % (script.folder / "ckpt"),
                        *["--%s=%s" % path for path in paths.items()])
    assert done.returncode == 0, done.stderr
    pretraining, linear = (call["arguments"] for call in script.calls())
    given = ["--%s=%s" % path for path in paths.items()] + ["--output_dir=%s" % (script.folder / "ckpt")]
    assert set(given + ["--num_epochs=3", "--auto_tune=True"]) <= set(pretraining)
    assert "--encoder_weights=%s" % (script.folder / "ckpt" / "f_online_10.h5") in linear
    assert not (script.folder / "out" / "run").exists()
    done = script("train_full_1p.sh", "--num_epochs")
    assert done.returncode == 1 and done.stderr == "train_full_1p.sh: --num_epochs needs a value; see --help.\n"


def test_the_performance_script_takes_20_batches_or_all_and_overwrites_its_own_runs_only(script):
    for flags in ([], ["--perf=1"], ["--ckpt_path=%s" % (script.folder / "ckpt")]):
        assert script.train("train_performance_1p.sh", *flags).returncode == 0
    given, whole, named = (call["arguments"] for call in script.calls())
    assert "--perf=0" in given and "--perf=1" in whole and "--overwrite" in given and "--overwrite" in whole
    assert "--noresume" in named and "--overwrite" not in named


@pytest.mark.parametrize("name", SCRIPTS)
def test_modelzoos_way_of_reading_the_log_gives_the_same_figures(script, name):
    done = script.train(name, SPEEDS="80 256.0 256.0")
    log = (script.folder / "out" / "train_0.log").read_text().splitlines()
    # The last Time in whole seconds, for 10 batches; the word after the last Loss=; what follows Test Accuracy.
    seconds = [line for line in log if "Time" in line][-1].split("Time=")[1].split(".")[0]
    assert 512 * 10 / int(seconds) == 256
    assert [line for line in log if "Loss" in line][-1].split("Loss=")[1].split(" ")[0] == "1.25"
    full = "full" in name
    assert [line.split("Test Accuracy: ")[1] for line in log if "Test Accuracy" in line] == ["0.8692"] * full
    result = script.result({SCRIPTS[0]: "1p_perf", SCRIPTS[1]: "1p_acc", SCRIPTS[2]: "2p_acc"}[name])
    assert result["ActualFPS"] == "256.00" and result["ActualLoss"] == "1.25"
    final = ["Final Performance images/sec : 256.00", "Final Train Accuracy : %s" % ("0.8692" if full else "none"),
             "E2E Training Duration sec : %s" % result["E2ETrainingTime"].split()[0]]
    printed = done.stdout.splitlines()
    first = printed.index(final[0])
    assert printed[first:first + 3] == final == log[-3:]


def test_every_flag_that_is_passed_on_exists(script):
    import commands  # noqa: F401
    import pretraining

    script.train("train_performance_1p.sh")
    known = {field for field in pretraining.Config.__dataclass_fields__} | {"data_path", "model_dir"}
    for argument in script.calls()[0]["arguments"]:
        name = argument[2:].split("=")[0]
        assert name in known or name[:2] == "no" and name[2:] in known


def test_the_result_log(script):
    done = script.train("train_full_1p.sh")
    log = script.result("1p_acc")
    assert log["ActualFPS"] == "150.00"  # 2 lines of equally many steps at 100 and 300 images/s; the first line is left out
    assert log["TrainingTime"] == "3413.333 ms/step"  # 512 / 150 s
    assert log["TrainAccuracy"] == "0.8692" and log["ActualLoss"] == "1.25" and log["RankSize"] == "1"
    assert re.match(r"\d+\.\d\d s$", log["E2ETrainingTime"])
    assert done.stdout.endswith("E2ETrainingTime = %s\n" % log["E2ETrainingTime"])
    assert (script.folder / "out" / "train_BYOL_for_TensorFlow2_bs512_1p_acc_loss.txt").read_text() == "2.5\n1.25\n"


def test_a_single_line_gives_the_speed_if_there_are_no_more(script):
    assert script.train("train_performance_1p.sh", SPEEDS="12.5").returncode == 0
    log = script.result("1p_perf")
    assert log["ActualFPS"] == "12.50" and log["TrainAccuracy"] == "none"
    done = script.train("train_performance_1p.sh", SPEEDS="")
    assert done.returncode == 1 and "no line with a speed" in done.stderr


def test_a_run_on_one_device_is_alone_and_its_device_is_0_by_default(script):
    script.train("train_performance_1p.sh", RANK_SIZE="8", RANK_ID="3", RANK_TABLE_FILE="/table.json")
    script.train("train_performance_1p.sh", ASCEND_DEVICE_ID="5")
    environments = [call["environment"] for call in script.calls()]
    assert environments[0] == {"RANK_ID": None, "RANK_SIZE": None, "RANK_TABLE_FILE": None, "ASCEND_DEVICE_ID": "0"}
    assert environments[1]["ASCEND_DEVICE_ID"] == "5"
    assert (script.folder / "out" / "train_0.log").exists() and (script.folder / "out" / "train_5.log").exists()


def test_eight_devices_have_a_process_each(script):
    done = script(SCRIPTS[2], "--output_path", str(script.folder / "out"), "--rank_table_file", str(script.folder / "table.json"))
    assert done.returncode == 0, done.stderr
    ranks = [call["environment"] for call in script.calls() if call["script"] == "pretraining.py"]
    assert sorted(rank["RANK_ID"] for rank in ranks) == sorted(rank["ASCEND_DEVICE_ID"] for rank in ranks) == list("01234567")
    assert {rank["RANK_SIZE"] for rank in ranks} == {"8"} and {rank["RANK_TABLE_FILE"] for rank in ranks} == {
        str(script.folder / "table.json")}
    linear, = (call["environment"] for call in script.calls() if call["script"] == "linearevaluation.py")
    assert linear["RANK_SIZE"] is None and linear["ASCEND_DEVICE_ID"] == "0"
    assert script.result("8p_acc")["RankSize"] == "8"


@pytest.mark.parametrize("name, arguments, text", [
    (SCRIPTS[0], ["--epochs=3"], "unknown flag --epochs; see --help."),
    (SCRIPTS[0], ["3"], "unexpected argument 3; see --help."),
    (SCRIPTS[1], ["--batch_size"], "--batch_size needs a value; see --help."),
    (SCRIPTS[1], ["--data_path=/nowhere"], "--data_path: there is no /nowhere."),
    (SCRIPTS[2], ["--rank_size=3"], "--rank_size is '3'; it is 1, 2, 4 or 8."),
    (SCRIPTS[2], [], "--rank_table_file (or RANK_TABLE_FILE): there is no file ''."),
])
def test_wrong_arguments_end_in_one_line(script, name, arguments, text):
    done = script(name, *arguments)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "%s: %s\n" % (name, text))


@pytest.mark.parametrize("name, failing", [
    (SCRIPTS[0], "pretraining.py"), (SCRIPTS[1], "pretraining.py"), (SCRIPTS[1], "linearevaluation.py"),
    (SCRIPTS[2], "1"), (SCRIPTS[2], "linearevaluation.py")])
def test_a_failing_run_fails_and_leaves_no_result(script, name, failing):
    case = {SCRIPTS[0]: "1p_perf", SCRIPTS[1]: "1p_acc", SCRIPTS[2]: "2p_acc"}[name]
    assert script.train(name).returncode == 0
    assert script.result(case)
    began = time.time()
    done = script.train(name, FAIL=failing)
    assert done.returncode == 7 and "out of order" in done.stdout + done.stderr
    assert "fail" in done.stderr.splitlines()[-1] and time.time() - began < 30  # the process that waits is ended
    with pytest.raises(IOError):
        script.result(case)


def test_ending_the_script_ends_its_processes(script):
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("RANK_", "CM_", "ASCEND_"))}
    command = [os.path.join(ROOT, "scripts", SCRIPTS[2]), "--rank_size=2", "--rank_table_file", str(script.folder / "table.json"),
               "--output_path", str(script.folder / "out")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=dict(
        clean, PYTHON=str(script.folder / "python"), RECORD=str(script.folder), FAIL="99", STOP_SECONDS="5"))
    while not (script.folder / "calls.jsonl").exists() or len(script.calls()) < 2:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143
    running = subprocess.run(["pgrep", "-f", str(script.folder)], stdout=subprocess.PIPE, universal_newlines=True).stdout
    assert running == ""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_a_script_and_all_below_it_loses_no_step(tmp_path, number):
    """As a terminal's Ctrl-C goes to all of them, tee included, through which the training prints."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("RANK_", "CM_", "ASCEND_"))}
    log = tmp_path / "train_0.log"
    script = subprocess.Popen(
        [os.path.join(ROOT, "scripts", "train_full_1p.sh"), "--output_path=%s" % tmp_path, "--dataset=shapes", "--device=cpu",
         "--width_multiplier=0.0625", "--batch_size=16", "--", "--log_every=1", "--max_steps=5000"], start_new_session=True,
        env=dict(clean, PYTHON=sys.executable), stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True)
    assert wait_for(lambda: log.exists() and "Batch 20/" in log.read_text(), script)
    os.killpg(script.pid, number)
    error = script.communicate(timeout=100)[1]
    assert wait_for(lambda: "Stopped by" in log.read_text(), subprocess.Popen(["sleep", "20"]))  # bash does not wait at SIGTERM
    last = log.read_text().splitlines()[-1]
    reached = int(last.split()[5].rstrip(";"))
    assert last.startswith("Stopped by %s at step" % number.name) and reached >= 20
    assert steps_done(tmp_path / "run") == reached == log.read_text().count("[Epoch")
    assert script.returncode in (-number, 128 + number) and "Traceback" not in error

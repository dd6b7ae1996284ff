"""ascend.py against a strict stand-in for the adapter npu_device; runs of whole commands are in test_npu_runs.py."""
import importlib.util
import json
import os
import subprocess
import sys

import pytest
import tensorflow as tf
from command import FAKE_NPU

import npu_config
from commands import UserError
from devices import ascend

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CLUSTER = ("RANK_SIZE", "RANK_ID", "RANK_TABLE_FILE", "CM_WORKER_SIZE", "CM_CHIEF_IP", "ASCEND_DEVICE_ID")


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in CLUSTER:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("JOB_ID", "test")


def load_adapter(monkeypatch, **variables):
    """The stand-in as the module npu_device of this process; open() must not be called, for it would not be undone."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    spec = importlib.util.spec_from_file_location("npu_device", os.path.join(FAKE_NPU, "npu_device", "__init__.py"))
    adapter = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(adapter)
    monkeypatch.setitem(sys.modules, "npu_device", adapter)
    return adapter


def options_set(monkeypatch, mode="allow_mix_precision", version="", **settings):
    adapter = load_adapter(monkeypatch, FAKE_NPU_VERSION=version)
    ascend._set_options(adapter.global_options(), npu_config.Options(**settings), mode)
    return adapter._read_options()


def run_python(*arguments, **variables):
    environment = dict(os.environ, PYTHONPATH=FAKE_NPU, **variables)
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, universal_newlines=True)


def test_the_stand_in_is_strict(tmp_path):
    done = run_python(os.path.join(FAKE_NPU, "behaviour.py"))
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "as strict as it should be", done.stderr


@pytest.mark.parametrize("version", ["", "2022"])
def test_only_what_is_relied_on_is_set(monkeypatch, version):
    assert options_set(monkeypatch, version=version) == {
        "precision_mode": "allow_mix_precision", "graph_run_mode": 1, "hcom_parallel": False}


@pytest.mark.parametrize("mode", ascend.MODES)
def test_the_adapter_knows_each_mode(monkeypatch, mode):
    assert options_set(monkeypatch, mode)["precision_mode"] == mode


def test_the_flags_of_modelzoo_reach_the_adapter(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("ops_info.json", "fusion_switch.cfg"):
        (tmp_path / name).write_text("{}")
    found = options_set(monkeypatch, use_mixlist=True, fusion_off_flag=True, data_dump_flag=True, data_dump_step="0|5",
                        profiling=True, hcom_parallel=True)
    profile = json.loads(found.pop("profiling_options"))
    assert profile["output"] == str(tmp_path / "profiling")
    assert found == {
        "precision_mode": "allow_mix_precision", "graph_run_mode": 1, "hcom_parallel": True, "enable_profiling": True,
        "modify_mixlist": str(tmp_path / "ops_info.json"), "fusion_switch_file": str(tmp_path / "fusion_switch.cfg"),
        "enable_dump": True, "dump_path": str(tmp_path / "data_dump"), "dump_step": "0|5", "dump_mode": "all"}
    assert options_set(monkeypatch, over_dump=True, over_dump_path="new/folder")["dump_path"] == str(tmp_path / "new" / "folder")
    assert options_set(monkeypatch, data_dump_flag=True, data_dump_path="a/b")["dump_path"] == str(tmp_path / "a" / "b")
    profile = json.loads(options_set(monkeypatch, profiling=True, profiling_dump_path="c/d")["profiling_options"])
    assert profile["output"] == str(tmp_path / "c" / "d")
    assert (tmp_path / "new" / "folder").is_dir()  # _read_options would have refused as well


@pytest.mark.parametrize("settings, mode, text", [
    (dict(use_mixlist=True), "force_fp32", "--use_mixlist goes with"),
    (dict(use_mixlist=True, mixlist_file="nowhere.json"), "allow_mix_precision", "there is no file nowhere.json"),
    (dict(fusion_off_flag=True, fusion_off_file="nowhere.cfg"), "allow_mix_precision", "there is no file nowhere.cfg"),
    (dict(over_dump=True, data_dump_flag=True), "allow_mix_precision", "cannot be used together"),
])
def test_wrong_flags_are_told(monkeypatch, settings, mode, text):
    with pytest.raises(UserError, match=text):
        options_set(monkeypatch, mode, **settings)


@pytest.mark.parametrize("settings, text", [
    (dict(precision_mode="allow_mix_precision_bf16"), "an Ascend 910 trains in one of"),
    (dict(precision_mode="force_fp16"), "an Ascend 910 trains in one of"),
    (dict(num_devices=2), "on NPU each process has one device"),
])
def test_what_an_npu_cannot_do_is_refused_even_by_auto(monkeypatch, settings, text):
    load_adapter(monkeypatch)
    for device in ("npu", "auto"):
        with pytest.raises(UserError, match=text):
            npu_config.open_device(npu_config.Options(device=device, **settings))


@pytest.mark.parametrize("variables, text", [
    (dict(ASCEND_DEVICE_ID="npu0"), "ASCEND_DEVICE_ID is 'npu0'"),
    (dict(RANK_SIZE="2", CM_WORKER_SIZE="2"), "are both set"),
    (dict(RANK_SIZE="two"), "RANK_SIZE is 'two'"),
    (dict(RANK_SIZE="0"), "RANK_SIZE is '0'"),
    (dict(RANK_SIZE="8"), "either RANK_TABLE_FILE and RANK_ID, or CM_CHIEF_IP"),
    (dict(CM_WORKER_SIZE="8"), "either RANK_TABLE_FILE and RANK_ID, or CM_CHIEF_IP"),
    (dict(RANK_SIZE="8", RANK_TABLE_FILE=__file__, CM_CHIEF_IP="10.0.0.1"), "set one of the two groups"),
    (dict(RANK_SIZE="8", RANK_TABLE_FILE="nowhere.json"), "there is no file nowhere.json"),
    (dict(RANK_SIZE="8", RANK_TABLE_FILE=__file__), "RANK_ID is ''; with RANK_SIZE 8 it is a number from 0 to 7"),
    (dict(RANK_SIZE="8", RANK_TABLE_FILE=__file__, RANK_ID="8"), "RANK_ID is '8'"),
    (dict(RANK_SIZE="8", RANK_TABLE_FILE=__file__, RANK_ID="0", BYOL_RANK_TIMEOUT="long"), "BYOL_RANK_TIMEOUT is 'long'"),
    (dict(RANK_SIZE="8", RANK_TABLE_FILE=__file__, RANK_ID="0", BYOL_RANK_TIMEOUT="0"), "BYOL_RANK_TIMEOUT is '0'"),
])
def test_a_wrong_environment_is_told_before_the_adapter_is_imported(monkeypatch, variables, text):
    monkeypatch.setitem(sys.modules, "npu_device", None)  # importing it would be another error
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=text):
        npu_config.open_device(npu_config.Options(device="npu"))


def test_without_the_adapter_the_command_ends_in_one_line(tmp_path):
    command = [sys.executable, "pretraining.py", "--device=npu", "--dataset=shapes", "--output_dir", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True)
    assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1
    for word in ("pretraining.py: ", tf.__version__, "No module named 'npu_device'", "TensorFlow 2.6.5", "npu_device-2.6.5",
                 "set_env.sh"):
        assert word in done.stderr
    assert not (tmp_path / "run").exists()


def test_auto_goes_on_without_an_npu_that_cannot_be_had(monkeypatch, tmp_path, caplog):
    (tmp_path / "npu_device.py").write_text("raise ImportError('libge_runner.so: cannot open shared object file')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert npu_config.open_device(npu_config.Options()).kind in ("cpu", "gpu")
    assert "Going on without the NPU" in caplog.text and "libge_runner.so" in caplog.text and "set_env.sh" in caplog.text
    with pytest.raises(UserError, match="libge_runner.so"):
        npu_config.open_device(npu_config.Options(device="npu"))


def test_a_device_that_does_not_open_is_told(monkeypatch):
    load_adapter(monkeypatch, FAKE_NPU_BROKEN="error code 0x1000\nsecond line")
    with pytest.raises(UserError, match="device 0 : error code 0x1000 second line.*npu-smi info"):
        npu_config.open_device(npu_config.Options(device="npu"))


def test_an_option_that_an_adapter_lacks_is_told(monkeypatch):
    adapter = load_adapter(monkeypatch)
    del adapter._OPTIONS["hcom_parallel"]
    adapter._global_options = adapter._new_options()
    with pytest.raises(UserError, match="NpuConfig has no option hcom_parallel"):
        npu_config.open_device(npu_config.Options(device="npu"))


@pytest.mark.parametrize("version, fits", [("2.5.0", False), (".".join(tf.__version__.split(".")[:2]) + ".0", True), ("0.1", True)])
def test_a_wheel_for_another_tensorflow_is_told(monkeypatch, tmp_path, version, fits):
    pytest.importorskip("importlib.metadata", reason="Python 3.7 cannot tell a wheel's version")
    information = tmp_path / ("npu_device-%s.dist-info" % version)
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: npu_device\nVersion: %s\n" % version)
    monkeypatch.syspath_prepend(str(tmp_path))
    load_adapter(monkeypatch, FAKE_NPU_BROKEN="not really there")
    told = "not really there" if fits else "npu_device 2.5.0 does not fit TensorFlow %s: install TensorFlow 2.6.5" % tf.__version__
    with pytest.raises(UserError, match=told):
        npu_config.open_device(npu_config.Options(device="npu"))


def test_flags_of_the_npu_warn_where_there_is_none(caplog):
    npu_config.open_device(npu_config.Options(device="cpu", over_dump=True, auto_tune=True))
    assert "--over_dump has no effect without an NPU" in caplog.text and "--auto_tune has no effect" in caplog.text


class FakeHandle:
    workers_num, worker_id = 4, 2


class FakeHccl:
    def __init__(self):
        self.broadcasts = []

    def broadcast(self, values, root_rank):
        self.broadcasts.append([value.dtype.name for value in values])
        for value in values:
            value.assign(tf.ones_like(value) * 7)

    def all_reduce(self, values, reduction):
        return [value * 2 for value in values]


def device(mode="allow_mix_precision", **settings):
    class Adapter:
        distribute = FakeHccl()

    return ascend.NpuDevice(Adapter, FakeHandle, mode, **settings)


def test_each_rank_makes_its_rows():
    assert device().rows(512) == (256, 128)
    assert not device().is_chief and not device().restores
    with pytest.raises(UserError, match="--batch_size 510 is not a multiple of the 4 devices"):
        device().rows(510)


def test_counters_are_broadcast_as_a_type_that_hccl_takes():
    variables = [tf.Variable([1.0, 2.0]), tf.Variable(3, dtype=tf.int64)]
    npu = device()
    npu.broadcast(variables)
    assert npu.npu.distribute.broadcasts == [["float32", "int32"]]
    assert variables[0].numpy().tolist() == [7, 7] and variables[1].dtype == tf.int64 and int(variables[1]) == 7


def test_ranks_gather_each_others_numbers_to_the_bit():
    numbers = [0.1, 2.0 ** 32 - 1, -1e300, 0.0]
    sent = []

    def all_reduce(values, reduction):
        value, = values
        assert reduction == "sum" and value.dtype == tf.int32  # HCCL takes no float64
        sent.append(tf.numpy_function(lambda own: (rows.append(own), sum(rows))[1], [value], tf.int32))
        return sent[-1:]

    rows = []
    for rank, number in enumerate(numbers):
        npu = device()
        npu.worker_id, npu.npu.distribute.all_reduce = rank, all_reduce
        gathered = npu.gather(number)
    assert gathered == numbers
    assert npu.gather(0) == numbers and len(sent) == 4  # one graph a rank, whatever is sent


def test_results_are_the_mean_of_all_ranks():
    loss, spread = device().run(lambda x: (x, x + 1), (tf.constant(1.0),))
    assert float(loss) == 2 and float(spread) == 4


@pytest.mark.parametrize("mode, flag, expected", [
    ("allow_mix_precision", "auto", "dynamic"), ("allow_fp32_to_fp16", "auto", "dynamic"), ("force_fp32", "auto", "dynamic"),
    ("must_keep_origin_dtype", "auto", None), ("allow_mix_precision", "none", None), ("must_keep_origin_dtype", "1024", 1024.0)])
def test_loss_scale(mode, flag, expected):
    assert device(mode, loss_scale=flag)._loss_scale() == expected


@pytest.mark.parametrize("flag", ["0", "-1", "inf", "nan", "much"])
def test_wrong_loss_scales_are_told(flag):
    with pytest.raises(UserError, match="--loss_scale is %s" % flag):
        device(loss_scale=flag)._loss_scale()

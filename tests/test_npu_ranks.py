"""Several ranks, through the stand-in for the NPU's adapter: they stop after the same step, and none waits for ever for another."""
import re
import signal
import time

import pytest
from command import FAKE_NPU, begin_tiny, wait_for


class Ranks:
    """Two ranks of a run of 4 steps an epoch, a log line each 4. flags, variables: of rank 1 only."""

    def __init__(self, images, folder, ranks=2, flags=(), seconds="300"):
        (folder / "hccl").mkdir()
        (folder / "table.json").write_text("{}")
        self.processes = []
        for rank in range(ranks):
            environment = dict(PYTHONPATH=FAKE_NPU, RANK_SIZE="2", RANK_ID=str(rank), RANK_TABLE_FILE=str(folder / "table.json"),
                               ASCEND_DEVICE_ID=str(rank), FAKE_HCCL=str(folder / "hccl"), BYOL_RANK_TIMEOUT=seconds)
            self.processes.append(begin_tiny(images, folder / "out", "--device=npu", "--num_epochs=5000", "--log_every=4",
                                             *(flags if rank else ()), env=environment))
        self.folder = folder

    def wait_for_a_checkpoint(self):
        assert wait_for(lambda: (self.folder / "out" / "losses.txt").exists(), self.processes[0])

    def end(self):
        """(exit status, stdout, stderr) of each."""
        try:
            return [(process.returncode,) + parts for process, parts in
                    [(process, process.communicate(timeout=150)) for process in self.processes]]
        finally:
            for process in self.processes:
                if process.poll() is None:
                    process.send_signal(signal.SIGKILL)
                    process.communicate()


@pytest.mark.parametrize("to", [[1], [0], [1, 0]])
def test_a_signal_to_any_rank_ends_all_of_them_after_the_same_step(tiny_images, tmp_path, to):
    ranks = Ranks(tiny_images, tmp_path)
    ranks.wait_for_a_checkpoint()
    for rank in to:
        ranks.processes[rank].send_signal(signal.SIGTERM)
        time.sleep(0.05)
    (status, out, error), (other, _, other_error) = ranks.end()
    ended = {143, -signal.SIGTERM}  # the latter if a rank that was already stopped by the other's signal got its own
    assert status in ended and other in ended and (error, other_error) == ("", "")
    step = int(re.search(r"^Stopped by SIGTERM at step (\d+);", out, re.M).group(1))
    assert step % 4 == 0 and (tmp_path / "out" / "checkpoints" / ("ckpt-%d.index" % step)).exists()


def test_ranks_of_different_flags_do_not_begin(tiny_images, tmp_path):
    ranks = Ranks(tiny_images, tmp_path, flags=["--learning_rate=0.5"]).end()
    for status, _, error in ranks:
        assert (status, error) == (1, "pretraining.py: The workers were not all started with the same flags and data; give each the "
                                      "same.\n")


ALONE = ("pretraining.py: Rank 0 has waited %s seconds for the other ranks, of which one has ended, failed or hangs, so it ends too. "
         "Start all ranks again with the same commands: they go on from the newest checkpoint. BYOL_RANK_TIMEOUT sets the seconds.\n")


def test_a_rank_that_is_alone_from_the_start_ends(tiny_images, tmp_path):
    (status, _, error), = Ranks(tiny_images, tmp_path, ranks=1, seconds="2").end()
    assert (status, error) == (1, ALONE % 2)


def test_a_rank_whose_neighbour_is_killed_ends(tiny_images, tmp_path):
    ranks = Ranks(tiny_images, tmp_path, seconds="45")
    ranks.wait_for_a_checkpoint()
    ranks.processes[1].send_signal(signal.SIGKILL)
    (status, _, error), _ = ranks.end()
    assert (status, error) == (1, ALONE % 45)

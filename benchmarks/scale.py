"""How much each measurement does: in full, and with --quick, which only shows that all of it works."""
from typing import NamedTuple, Optional, Tuple


class Scale(NamedTuple):
    """Widths, batch sizes, rounds and seconds. Steps are few: one at batch 512 takes 20 s on two cores in float32."""
    width: float  # of the encoder in the step, the whole training and the start
    narrow: float  # of the encoder that shows the costs around the step
    linear_width: float  # of the encoder in linear evaluation
    batch: int  # of the step, as the goals name it
    large_batch: int
    growth: Tuple[int, ...]  # batches whose memory and speed are taken besides those two; the last if the memory allows
    start_batch: int
    matrix: int  # side of the matrices
    rounds: int
    step_rounds: int  # of the step: its goals are nearer to what it gives than the machine's noise
    large_rounds: int
    turn: float  # seconds of a turn of the step at least; one step at least
    short_turn: float
    log_every: int  # steps between log lines, in the training at full width; few, since a turn is one log line
    images: Optional[int]  # of the data set; None: all


FULL = Scale(width=1, narrow=1 / 16, linear_width=0.25, batch=128, large_batch=512, growth=(64, 1024), start_batch=64,
             matrix=4096, rounds=6, step_rounds=9, large_rounds=3, turn=6, short_turn=1, log_every=2, images=None)
QUICK = Scale(width=1 / 8, narrow=1 / 16, linear_width=1 / 16, batch=16, large_batch=64, growth=(128,), start_batch=8,
              matrix=1024, rounds=2, step_rounds=2, large_rounds=1, turn=0.3, short_turn=0.2, log_every=4, images=2000)

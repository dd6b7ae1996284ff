"""Peak memory and speed of the step as the batch grows, each batch size in a process of its own."""
from typing import Any, Dict, List

from benchmarks import step_speed, table, workers
from benchmarks.scale import Scale

MODE = "must_keep_origin_dtype"
LIMIT = 7e9  # bytes, at the large batch
MARGIN = 1.2


def measure(scale: Scale, settings: Dict[str, Any], verbose: bool, results: Dict[str, Any]) -> List[table.Row]:
    """results: of step_speed.measure, which has measured two of the batch sizes already; those missing are measured here."""
    got = {}  # type: Dict[int, Dict[str, Any]]
    a_row = 0.0  # bytes for an image of a batch, as far as known
    for batch in sorted(scale.growth + (scale.batch, scale.large_batch)):
        wanted = MARGIN * a_row * batch
        if wanted > available_memory() and settings["device"] == "cpu":
            got[batch] = {"missing": "not tried: it would take about %.0f GB of memory" % (wanted / 1e9)}
            continue
        done = results.get("float32-%d" % batch)
        try:
            rounds = int(batch <= scale.large_batch)  # of a larger one, only the first step
            got[batch] = done or step_speed.take_turns(scale, settings, batch, MODE, rounds, verbose, product=False)
            a_row = got[batch]["memory"] / batch
        except workers.Failed as error:
            got[batch] = {"missing": str(error)}
    rows = []
    first = got[min(got)]
    for batch, part in sorted(got.items()):
        name = "step, float32, batch %d" % batch
        if "missing" in part:
            rows.append(table.Row("growth", name, part["missing"]))
            continue
        speed = table.figure(part["images_per_second"]).median
        row = table.Row("growth", name, "%.4g images/s" % speed, "", table.figure([part["memory"] / 1e9]), " GB of memory")
        if batch == scale.large_batch:
            row = row._replace(at_most=LIMIT / 1e9)
        if part is not first and "missing" not in first:
            row = row._replace(against="batch %d: %.4g images/s" % (min(got), table.figure(first["images_per_second"]).median))
        rows.append(row)
    return rows


def available_memory() -> float:
    """Bytes that a new process can have; infinite where the system does not tell."""
    try:
        with open("/proc/meminfo") as file:
            return int(next(line for line in file if line.startswith("MemAvailable")).split()[1]) * 1024
    except (OSError, StopIteration):
        return float("inf")

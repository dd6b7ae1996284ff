"""Child processes that measure: asked by a line of JSON on stdin, they answer by a line of JSON.

What is measured runs in a process of its own where the state of a process matters (threads, memory, precision, what was
compiled), and the parent asks one child after the other, so that only one computes at a time. Standard library only: PyTorch's
child may run in an environment without TensorFlow.
"""
import atexit
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from typing import Any, Callable, Dict, List, Optional

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


class Failed(Exception):
    """A child could not measure. Its text is one line that tells why."""


class Worker:
    """A child that runs `python -m module` and serves the jobs of that module; use it in a with statement.

    settings: given to the child's `prepare`, must be fit for JSON. python: its interpreter. verbose: show what it says.
    """

    def __init__(self, module: str, settings: Dict[str, Any], python: Optional[str] = None, verbose: bool = False) -> None:
        self._errors = tempfile.TemporaryFile()
        path = os.pathsep.join([ROOT] + [part for part in [os.environ.get("PYTHONPATH")] if part])
        self.began = time.time()
        self._process = subprocess.Popen(
            [python or sys.executable, "-m", module, json.dumps(settings)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=None if verbose else self._errors, universal_newlines=True, env=dict(os.environ, PYTHONPATH=path))

    def ask(self, job: str, **arguments: Any) -> Any:
        """What the job `job` of the child gives, called with these arguments. Failed if it raises or the child is gone."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        try:
            stdin.write(json.dumps([job, arguments]) + "\n")
            stdin.flush()
            line = stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise Failed(self._last_words())
        answer = json.loads(line)
        if "error" in answer:
            raise Failed(answer["error"])
        return answer["result"]

    def _last_words(self) -> str:
        status = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        how = "was killed by signal %d" % -status if status < 0 else "ended with status %d" % status
        return "its process %s%s" % (how, ": " + lines[-1][:200] if lines else "")

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: Any) -> None:
        if self._process.stdin is not None:
            try:
                self._process.stdin.close()
            except BrokenPipeError:
                pass
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._errors.close()


def serve(prepare: Callable[[Dict[str, Any]], Dict[str, Callable[..., Any]]]) -> None:
    """The child's side: answer until stdin ends. prepare: settings -> the jobs by name, called at the first question."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the measured program prints must not get between the answers
    jobs = None  # type: Optional[Dict[str, Callable[..., Any]]]
    for line in iter(sys.stdin.readline, ""):
        try:
            jobs = prepare(json.loads(sys.argv[1])) if jobs is None else jobs
            job, arguments = json.loads(line)
            answer = {"result": jobs[job](**arguments)}
        except Exception as error:  # whatever it is, the parent reports it and goes on with its other rows
            traceback.print_exc()
            text = str(error).strip()
            answer = {"error": "%s: %s" % (type(error).__name__, text.split("\n")[0][:200]) if text else type(error).__name__}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def seconds_each(run: Callable[[int], Any], seconds: float, most: int = 64) -> float:
    """Call run(n), which does a thing n times and waits for it, until `seconds` have passed: seconds that one of them takes."""
    done, n = 0, 1
    began = time.perf_counter()
    while True:
        run(n)
        done += n
        passed = time.perf_counter() - began
        if passed >= 0.9 * seconds:
            return passed / done
        n = max(1, min(most, round((seconds - passed) / passed * done)))


def in_turns(rounds: int, takers: Dict[str, Callable[[], float]]) -> Dict[str, List[float]]:
    """Call each taker once a round, one after the other, and give what each gave in all rounds."""
    results = {name: [] for name in takers}  # type: Dict[str, List[float]]
    for _ in range(rounds):
        for name, take in takers.items():
            results[name].append(take())
    return results


def scratch() -> str:
    """A folder that is removed when the process ends."""
    folder = tempfile.mkdtemp(prefix="benchmark-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def peak_memory() -> int:
    """The most memory that this process has held so far, in bytes."""
    try:
        with open("/proc/self/status") as file:  # resource's figure can be that of the parent, which a fork hands down
            return int(next(line for line in file if line.startswith("VmHWM")).split()[1]) << 10
    except (OSError, StopIteration):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << (0 if sys.platform == "darwin" else 10)

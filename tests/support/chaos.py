"""Runs under random faults, each restarted until it has finished, as a scheduler would do.

``python -m tests.support.chaos --runs 200 --seed 1`` prints a table of the injected faults and
their effects. The faults of a run are a function of its seed alone, so a failure can be repeated.
Their timing is not: it depends on the speed of the machine.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.forked import run, start_ranks
from tests.support.hosts import Hosts
from tests.support.hosts import why_not as why_no_hosts
from tests.support.runs import checkpoints, free_port
from train.checkpoint.store import CheckpointStore
from train.data.ledger import read_steps
from train.parity.compare import curve, largest_difference

OPTIONS = [
    "length.steps=60", "checkpoint.every_steps=4", "checkpoint.keep_last=9", "model.hidden=256",
    "evaluate.every_steps=15", "ema.decay=0.9", "batch.micro_batch_size=1", "task.sleep=0.003",
    "watchdog.timeout=3", "watchdog.first_timeout=15", "stop.deadline=8", "stop.margin=1",
]  # fmt: skip
PLACEMENTS = [
    (1, "auto"), (2, "ddp"), (3, "ddp"), (4, "ddp"), (2, "fsdp2"), (2, "zero1"), (2, "zero2"),
    (2, "zero3"),
]  # fmt: skip
FAULTS = [
    "kill a rank", "kill all ranks", "SIGTERM to a rank", "SIGTERM to all ranks",
    "freeze a rank", "flip a bit", "fill the disk", "cut the network", "kill the agent",
]  # fmt: skip
# The exit codes that a process may have after any fault: done, try again, stopped, or the signal
# itself. Never 70 (a bug), 76 (refused) or an abort.
ALLOWED = {0, 75, 143, -signal.SIGKILL, -signal.SIGTERM}
GRACE = 12.0  # seconds between the end of one rank and SIGTERM to the others
PATIENCE = 180.0  # seconds before an attempt counts as hanging
MOST_ATTEMPTS = 12


class ChaosError(AssertionError):
    """A violated invariant; the text names it and the faults before it."""


@dataclass
class Attempt:
    """One start of the run: the placement, the fault and the exit codes."""

    ranks: int
    strategy: str
    fault: str
    codes: list[int | None] = field(default_factory=list)
    moment: float = 0.0
    """Seconds after the start, when the fault was injected."""
    saved: int = 0
    """Newest committed step afterwards."""

    def __str__(self) -> str:
        codes = ",".join("?" if code is None else str(code) for code in self.codes)
        at = f" at {self.moment:.1f} s" if self.fault != "none" else ""
        return f"{self.strategy} x{self.ranks}: {self.fault}{at} -> {codes} @{self.saved}"


def undisturbed(directory):
    """The run without faults that all others must equal."""
    run("fit", directory, *OPTIONS, "task.sleep=0")
    return directory


def why_not(fault):
    """Why a fault cannot be injected on this machine, or None."""
    if fault == "cut the network":
        return why_no_hosts()
    if fault == "fill the disk":
        try:
            with tempfile.TemporaryDirectory() as path, _disk(Path(path)):
                return None
        except (OSError, subprocess.CalledProcessError) as error:
            return f"no file system can be mounted ({error})"
    return None


class Chaos:
    """One run under faults drawn from a seed."""

    def __init__(self, seed, directory, faults, expected):
        self.chance = random.Random(seed)
        self.seed, self.directory, self.expected = seed, Path(directory), expected
        self.faults = faults
        self.attempts: list[Attempt] = []
        self.damaged: set[int] = set()

    def __str__(self):
        return f"seed {self.seed}: " + "; ".join(str(attempt) for attempt in self.attempts)

    def run(self):
        """Restarts the run until it has finished. Raises ChaosError if an invariant is violated."""
        with ExitStack() as stack:
            # The first fault follows from the seed, so that consecutive seeds cover all faults.
            planned = [self.faults[self.seed % len(self.faults)]]
            planned += self.chance.choices(self.faults, k=self.chance.randint(0, 2))
            if "fill the disk" in planned:
                self.directory.mkdir(parents=True, exist_ok=True)
                stack.enter_context(_disk(self.directory))
            while not (self.directory / "finished.json").exists():
                self._check(len(self.attempts) < MOST_ATTEMPTS, "the run does not finish")
                before = self._whole()
                fault = planned.pop(0) if planned else "none"
                attempt = self._place(fault)
                self.attempts.append(attempt)
                attempt.codes = self._start(attempt)
                self._free()
                after = self._whole()
                attempt.saved = max(after, default=0)
                self._check(set(attempt.codes) <= ALLOWED, "an exit code that is not allowed")
                self._check(
                    max(after, default=0) >= max(before, default=0), "a committed step was lost"
                )
                if fault == "flip a bit":
                    self._flip()
            self._compare()
        return self

    def _check(self, holds, what):
        if not holds:
            raise ChaosError(f"{what}; {self}; see {self.directory}")

    def _whole(self):
        return [step for step in checkpoints(self.directory) if step not in self.damaged]

    # -- faults ------------------------------------------------------------------------------

    def _place(self, fault):
        ranks, strategy = self.chance.choice(PLACEMENTS)
        if fault == "cut the network":
            ranks = 2
        if fault == "freeze a rank":
            ranks = max(ranks, 2)  # only a supervisor notices when a single rank is frozen
        if ranks > 1 and strategy == "auto":
            strategy = "ddp"
        return Attempt(ranks, strategy, fault)

    def _start(self, attempt):
        """Starts the run, injects the fault, and returns the exit codes."""
        options = [*OPTIONS, f"strategy={attempt.strategy}"]
        # Half of the faults come at a random time, mostly in start-up; the others after ``more``
        # commits.
        by_clock, more = self.chance.random() < 0.5, self.chance.randint(1, 5)
        delay = self.chance.random() * (2.5 if by_clock else 0.3)
        victim = self.chance.randrange(attempt.ranks)
        if attempt.fault == "kill the agent":
            return self._with_agent(attempt, options, more, delay)
        with ExitStack() as stack:
            hosts = None
            if attempt.fault == "cut the network":
                hosts = stack.enter_context(closing(Hosts()))
            processes = start_ranks(attempt.ranks, "fit", self.directory, *options, hosts=hosts)
            started = time.monotonic()
            if not by_clock:
                wait_until = max(self._whole(), default=0) + 4 * more
                while max(self._whole(), default=0) < wait_until and _running(processes):
                    time.sleep(0.005)
            _sleep(delay, processes)
            attempt.moment = time.monotonic() - started
            self._inject(attempt.fault, processes, victim, hosts)
            return self._see_out(processes)

    def _inject(self, fault, processes, victim, hosts):
        numbers = {"kill": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "freeze": signal.SIGSTOP}
        numbers["flip"] = signal.SIGKILL  # so that the run resumes from the damaged checkpoint
        if number := numbers.get(fault.split()[0]):
            all_of_them = fault.endswith("all ranks") or fault == "flip a bit"
            for process in processes if all_of_them else [processes[victim]]:
                _signal(process, number)
        elif fault == "fill the disk":
            file = (self.directory / "filler").open("wb", buffering=0)
            with file, suppress(OSError):
                while True:
                    file.write(b"\0" * 4096)
        elif fault == "cut the network":
            hosts.cut()

    def _see_out(self, processes):
        """Waits as a scheduler does: when one process ends, the others get a grace period."""
        deadline = time.monotonic() + PATIENCE
        first_end = None
        while _running(processes) and time.monotonic() < deadline:
            if first_end is None and len(_running(processes)) < len(processes):
                first_end = time.monotonic()
            if first_end and time.monotonic() > first_end + GRACE:
                break
            time.sleep(0.01)
        hangs = first_end is None and bool(_running(processes))
        for number in (signal.SIGTERM, signal.SIGKILL):
            for process in _running(processes):
                _signal(process, number)
            wait = time.monotonic() + GRACE
            while _running(processes) and time.monotonic() < wait:
                time.sleep(0.01)
        self._check(not hangs, f"no process ended within {PATIENCE:g} s")
        done = [process.wait() for process in processes]
        self.said = [result.stderr for result in done]
        codes = [result.returncode for result in done]
        if not set(codes) <= ALLOWED:
            print("\n".join(self.said), file=sys.stderr)
        return codes

    def _with_agent(self, attempt, options, more, delay):
        """Starts the run with torchrun and kills the agent, which orphans its workers."""
        agent = subprocess.Popen(
            _torchrun(attempt.ranks, self.directory, options),
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        started, wanted = time.monotonic(), max(self._whole(), default=0) + 4 * more
        while max(self._whole(), default=0) < wanted and agent.poll() is None:
            self._check(time.monotonic() < started + PATIENCE, "the agent makes no progress")
            time.sleep(0.01)
        time.sleep(delay)
        attempt.moment = time.monotonic() - started
        workers = _children(agent.pid)
        agent.kill()
        codes = [agent.wait()]
        # In a container all processes end with the first one; here they are killed explicitly.
        for pid in workers:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        while any(Path(f"/proc/{pid}").exists() for pid in workers):
            time.sleep(0.01)
        return codes

    def _flip(self):
        whole = self._whole()
        if not whole or (self.directory / "finished.json").exists():
            return
        step = whole[-1]
        path = CheckpointStore(self.directory / "checkpoints").path(step)
        files = sorted(p for p in path.iterdir() if p.stat().st_size)
        chosen = self.chance.choice(files)
        data = bytearray(chosen.read_bytes())
        data[self.chance.randrange(len(data))] ^= 1 << self.chance.randrange(8)
        chosen.write_bytes(data)
        self.damaged.add(step)

    def _free(self):
        (self.directory / "filler").unlink(missing_ok=True)

    # -- invariants at the end ---------------------------------------------------------------

    def _compare(self):
        verified = run("verify", self.directory, *OPTIONS)
        self._check("all well" in verified.stdout, f"verify printed {verified.stdout}")
        self._check(
            read_steps(self.directory / "ledger.bin") == read_steps(self.expected / "ledger.bin"),
            "different samples were used",
        )
        for key in ("train/loss", "train/gradient_norm", "train/learning_rate", "eval/loss"):
            mine, theirs = curve(self.directory, key), curve(self.expected, key)
            self._check(list(mine) == list(theirs), f"{key} has different steps")
            apart = largest_difference(theirs, mine)
            self._check(apart <= 1e-4, f"{key} differs by {apart:.2g}")


def _running(processes):
    return [process for process in processes if process.poll() is None]


def _sleep(seconds, processes):
    until = time.monotonic() + seconds
    while time.monotonic() < until and _running(processes):
        time.sleep(0.005)


def _signal(process, number):
    with suppress(ProcessLookupError):  # it has just ended
        process.signal(number)


def _torchrun(ranks, directory, options):
    from tests.support.runs import TINY

    return [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks),
        "--master-addr", "127.0.0.1", "--master-port", str(free_port()), "--max-restarts", "3",
        "-m", "train", "fit", *TINY, f"run.dir={directory}", *options,
    ]  # fmt: skip


def _children(pid):
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except OSError:
        return []
    direct = [int(word) for word in text.split()]
    return direct + [further for child in direct for further in _children(child)]


class _disk:  # noqa: N801  a context manager that reads as a function
    """A tmpfs mounted over a directory."""

    def __init__(self, path):
        self.path = path

    def __enter__(self):
        words = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(self.path)]
        subprocess.run(words, check=True, capture_output=True)

    def __exit__(self, *_):
        kept = Path(f"{self.path}.kept")
        shutil.copytree(self.path, kept)
        subprocess.run(["umount", "--lazy", str(self.path)], check=True)
        shutil.rmtree(self.path)
        kept.rename(self.path)


def run_many(seeds, directory, at_once=3, report=lambda _: None):
    """Runs all seeds, some in parallel; returns the failures."""
    expected = undisturbed(Path(directory) / "undisturbed")
    faults = [fault for fault in FAULTS if why_not(fault) is None]

    def one(seed):
        chaos = Chaos(seed, Path(directory) / f"seed-{seed}", faults, expected)
        started, failure = time.monotonic(), None
        try:
            chaos.run()
        except Exception as error:
            failure = error
        report(f"{'FAILED' if failure else 'ok'} {time.monotonic() - started:5.1f} s  {chaos}")
        return failure

    with ThreadPoolExecutor(at_once) as pool:
        return [failure for failure in pool.map(one, seeds) if failure]


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    arguments = parser.parse_args()
    for fault in FAULTS:
        if reason := why_not(fault):
            print(f"skipped fault: {fault}: {reason}")
    directory = tempfile.mkdtemp(prefix="chaos-")
    first = arguments.seed
    print(f"{arguments.runs} runs from seed {first} in {directory}", flush=True)
    report = lambda line: print(line, flush=True)  # noqa: E731
    failures = run_many(range(first, first + arguments.runs), directory, report=report)
    print(
        f"{arguments.runs - len(failures)} of {arguments.runs} runs ended like the run without faults"
    )
    for failure in failures:
        print(failure)
    if not failures:
        shutil.rmtree(directory)
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()

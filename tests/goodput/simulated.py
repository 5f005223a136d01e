"""Runs on a clock that stands still unless it is told: their ledgers, and what really happened."""

from collections import Counter

from train.goodput.clock import PhaseClock
from train.goodput.ledger import GoodputLedger
from train.goodput.phases import WORK, flush_interval


class Simulated:
    """A run whose attempts are driven by hand; it flushes its ledger when a real one does."""

    def __init__(self, directory, now=1e9):
        self.directory, self.now = directory, now
        self.truth = Counter()
        """Seconds by the names of the tables, lost work not among them."""
        self.kept = 0.0
        """Seconds of steps that are committed."""
        self.attempts = 0
        self.committed = 0
        self.unflushed = 0.0
        """Seconds before deaths that no line has."""

    def begin(self, *, age=0.0, submitted=None):
        """Starts an attempt, ``age`` seconds after its process."""
        self.attempts += 1
        self.truth["start"] += age
        self.now += age
        offset = 1000.0 * self.attempts  # each host has a monotonic clock of its own
        self.clock = PhaseClock(
            age=age, submitted=submitted, now=lambda: self.now - offset, wall=lambda: self.now
        )
        self.ledger = GoodputLedger(self.clock, in_background=False)
        self.step, self.saved = self.committed, None
        self.worked = self.counted = 0.0
        self.ledger.steps = lambda: (self.step, self.committed)
        self.ledger.open(self.directory, self.attempts, self.committed)
        self.written_at = self.now

    def spend(self, phase, seconds):
        """Spends time in a phase."""
        self.clock.enter(phase)
        name = "compute" if phase == "forward" else phase
        self.truth[name] += seconds
        self.worked += seconds if name in WORK else 0.0
        while seconds > 0:
            due = self.written_at + flush_interval(self.clock.elapsed) - self.now
            part = min(seconds, max(due, 0.001))
            self.now += part
            seconds -= part
            if part == due:
                self.flush()

    def flush(self):
        """Writes a line."""
        self.ledger.write()
        self.written_at = self.now

    def take_step(self, data, forward, compute, wait):
        """Takes a step."""
        for phase, seconds in (
            ("data", data), ("forward", forward), ("wait", wait), ("compute", compute),
        ):  # fmt: skip
            self.spend(phase, seconds)
        self.step += 1

    def save(self):
        """Starts a checkpoint."""
        self.ledger.saving(self.step)
        self.flush()
        self.saved = self.step, self.worked

    def commit(self):
        """The checkpoint that was started is committed."""
        if self.saved is not None:
            self.committed, worked = self.saved
            self.kept += worked - self.counted
            self.saved, self.counted = None, worked
            checkpoint = self.directory / "checkpoints" / f"step-{self.committed:012d}"
            checkpoint.mkdir(parents=True, exist_ok=True)

    def die(self, *, torn=b""):
        """Kills the attempt, perhaps while it wrote a line."""
        self.unflushed += self.now - self.written_at
        with (self.directory / "goodput.jsonl").open("ab") as file:
            file.write(torn)

    def finish(self, code):
        """Ends the attempt."""
        self.clock.enter("shutdown")
        self.ledger.ended(code)
        self.ledger.close()
        self.written_at = self.now

    def idle(self, seconds):
        """Nothing runs."""
        self.truth["idle"] += seconds
        self.now += seconds

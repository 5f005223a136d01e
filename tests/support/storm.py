"""Cuts the network between two hosts at a random time, for a random time, and goes on as a cluster
does: an agent that asks for a retry is started again."""

import random
import signal
import time
from dataclasses import dataclass, field

from tests.support.runs import TINY, metrics

RUN = [
    "length.steps=250", "batch.micro_batch_size=6", "task.sleep=0.05", "checkpoint.every_steps=8",
    "checkpoint.asynchronous=false", "evaluate.every_steps=12", "watchdog.timeout=20",
]  # fmt: skip
# Steps of a period whose end is to be hit; None where another event gives the time.
PHASES = {"start": None, "step": 1, "save": 8, "evaluation": 12, "stop": None}
LENGTHS = [2, 8, 20, 45]
RETRY, STOPPED = 75, 143


@dataclass
class Storm:
    """One run with one cut, both drawn from ``seed``; ``text`` says what happened."""

    hosts: object
    directory: object
    seed: int
    text: list[str] = field(default_factory=list)

    def __post_init__(self):
        draw = random.Random(self.seed)
        self.phase = list(PHASES)[self.seed % len(PHASES)]
        self.length = draw.choice(LENGTHS)
        self.host, self.delay = draw.randrange(2), draw.uniform(0, 5)
        self.started, self.agents, self.starts = time.monotonic(), [None, None], [0, 0]

    def run(self):
        """Returns when both agents have ended with 0; raises AssertionError for anything else."""
        try:
            for host in (0, 1):
                self.start(host)
            self.wait_for_phase()
            self.note(f"cut at host {self.host}, in {self.phase}, for {self.length} s")
            self.hosts.cut(self.host)
            time.sleep(self.length)
            before = self.rows()
            self.hosts.mend(self.host)
            self.note("mended")
            self.go_on(lambda: self.rows() > before or self.ended(), 120)
            self.note("went on")
            self.go_on(self.ended, 120)
        finally:
            self.hosts.mend(self.host)
            for host in (0, 1):
                self.hosts.lose(host)
        return self

    def start(self, host):
        options = ["--nnodes", "2", "--rdzv-endpoint", f"{self.hosts.subnet}.1:29400"]
        command = ["python", "-m", "train", "fit", *TINY, f"run.dir={self.directory}", *RUN]
        with self.log(host, self.starts[host]).open("w") as log:
            self.agents[host] = self.hosts.start_node_agent(
                host, command, *options, "--max-restarts", "3", output=log
            )
        self.starts[host] += 1

    def wait_for_phase(self):
        if self.phase == "start":
            time.sleep(self.delay)
            return
        self.go_on(lambda: self.rows() > 5 + self.delay, 120)
        if period := PHASES[self.phase]:
            self.go_on(lambda: self.last_step() % period == period - 1, 60)
            time.sleep(self.delay / 30)
        else:
            self.agents[self.host].send_signal(signal.SIGTERM)
            time.sleep(self.delay / 10)

    def go_on(self, condition, seconds):
        """Starts agents again that ask for it, until the condition holds."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.report()
            for host, agent in enumerate(self.agents):
                code = agent.poll()
                if code in (None, 0):
                    continue
                self.note(f"agent {host} ended with {code}")
                asked = code == STOPPED and self.phase == "stop"
                assert code == RETRY or asked, self.report()
                assert self.starts[host] < 5, self.report()
                self.start(host)
            time.sleep(0.02)

    def log(self, host, start):
        return self.directory.with_name(f"agent-{host}.{start}.log")

    def ended(self):
        return all(agent.poll() == 0 for agent in self.agents)

    def rows(self):
        return len(metrics(self.directory)) if (self.directory / "metrics.jsonl").exists() else 0

    def last_step(self):
        return max((row["step"] for row in metrics(self.directory)), default=0)

    def note(self, text):
        self.text.append(f"{time.monotonic() - self.started:6.1f} s  {text}")

    def report(self):
        logs = [
            f"agent {host}, start {start}:\n" + self.log(host, start).read_text()[-3000:]
            for host in (0, 1)
            for start in range(self.starts[host])
        ]
        return "\n".join([f"seed {self.seed}", *self.text, *logs])

"""A separate Slurm on this machine: munged, slurmctld, and a slurmd for each virtual node.

Each slurmd has its own host name and /etc/hosts (UTS and mount namespaces), in which nodes have
loopback addresses. Jobs see two hosts; the machine itself is not changed.
"""

import os
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

from tests.support.runs import free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
NODES = ("node1", "node2")
_SBIN = "/usr/local/sbin:/usr/sbin:/sbin"
_PATIENCE = 60.0  # seconds for a daemon to start, on a busy machine


def why_not():
    """Why Slurm cannot run on this machine, or None."""
    path = f"{os.environ['PATH']}:{_SBIN}"
    missing = [program for program in PROGRAMS if shutil.which(program, path=path) is None]
    if missing:
        return f"{', '.join(missing)}: not installed (Debian: apt-get install slurm-wlm munge)"
    if os.geteuid() != 0:
        return "nodes with their own host names need root"
    tried = subprocess.run(
        ["unshare", "--mount", "--uts", "sh", "-c", "mount --bind /etc/hosts /etc/hosts"],
        capture_output=True, text=True,
    )  # fmt: skip
    if tried.returncode:
        return f"mount and UTS namespaces cannot be created ({tried.stderr.strip()})"
    return None


class Cluster:
    """Two nodes of two cores; jobs of partition ``high`` preempt those of ``low``."""

    def __init__(self, directory):
        self.directory = Path(directory)
        self.config = self.directory / "slurm.conf"
        self.environment = {
            **os.environ,
            "SLURM_CONF": str(self.config),
            "PATH": f"{os.environ['PATH']}:{_SBIN}",
        }
        self._daemons = []
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def _start(self):
        self._write()
        self._daemon(
            "munged", "--foreground", "--force",
            f"--key-file={self.directory}/munge.key", f"--socket={self.directory}/munge.socket",
            f"--pid-file={self.directory}/munge.pid", f"--log-file={self.directory}/munge.log",
            f"--seed-file={self.directory}/munge.seed",
        )  # fmt: skip
        self._wait((self.directory / "munge.socket").exists, "munged")
        self._daemon("slurmctld", "-D", "-f", str(self.config))
        for name in NODES:
            self._daemon(
                "unshare", "--mount", "--uts", "sh", "-c",
                f"mount --bind {self.directory}/hosts /etc/hosts && hostname {name} "
                f"&& exec slurmd -D -f {self.config} -N {name}",
            )  # fmt: skip
        self._wait(lambda: self.tool("sinfo", "-h", "-o", "%T", "-p", "low") == "idle", "slurmd")

    def _write(self):
        (self.directory / "spool").mkdir()
        (self.directory / "state").mkdir()
        key = self.directory / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        addresses = {name: f"127.0.0.{2 + number}" for number, name in enumerate(NODES)}
        lines = ["127.0.0.1 localhost", *(f"{ip} {name}" for name, ip in addresses.items())]
        (self.directory / "hosts").write_text("\n".join(lines) + "\n")
        nodes = "\n".join(
            f"NodeName={name} NodeAddr={ip} Port={free_port()} CPUs=2 RealMemory=4000"
            for name, ip in addresses.items()
        )
        d = self.directory
        self.config.write_text(f"""
ClusterName=isorun
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={free_port()}
SlurmUser=root
SlurmdUser=root
# A job that is put back starts again only when its credentials have run out, else 120 s later.
AuthInfo=socket={d}/munge.socket,cred_expire=5
StateSaveLocation={d}/state
SlurmctldPidFile={d}/slurmctld.pid
SlurmctldLogFile={d}/slurmctld.log
SlurmdSpoolDir={d}/spool/%n
SlurmdPidFile={d}/slurmd-%n.pid
SlurmdLogFile={d}/slurmd-%n.log
# No cgroups: in a container they cannot be written.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=bf_interval=1,sched_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
# What is declared counts, not what this machine has.
SlurmdParameters=config_overrides
{nodes}
PartitionName=low Nodes={",".join(NODES)} Default=YES PriorityTier=1
PartitionName=high Nodes={",".join(NODES)} PriorityTier=2
""")

    def _daemon(self, *command):
        log = (self.directory / f"{len(self._daemons)}.out").open("wb")
        with log:
            self._daemons.append(
                subprocess.Popen(
                    command, env=self.environment, stdin=subprocess.DEVNULL,
                    stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                )
            )  # fmt: skip

    def _wait(self, condition, what):
        deadline = time.monotonic() + _PATIENCE
        while not condition():
            said = "\n".join(p.read_text() for p in sorted(self.directory.glob("*.out")))
            assert all(d.poll() is None for d in self._daemons), f"a daemon ended:\n{said}"
            assert time.monotonic() < deadline, f"{what} does not start:\n{said}"
            time.sleep(0.1)

    def empty(self):
        """Ends all remaining jobs at once."""
        self.run("scontrol", "update", "partition=low", "state=drain")
        self.run("scancel", "--signal=KILL", "--full", "--user=root", "--state=running")
        self.run("scancel", "--user=root")
        self._wait(lambda: not self.tool("squeue", "--noheader"), "an empty queue")
        self.run("scontrol", "update", "partition=low", "state=up")

    def close(self):
        """Ends all jobs, then the daemons in reverse order of their start."""
        if len(self._daemons) > 1:
            with suppress(OSError, subprocess.TimeoutExpired, AssertionError):
                self.empty()
        for daemon in reversed(self._daemons):
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    # -- commands -------------------------------------------------------------------------------

    def run(self, *command, timeout=60, **kwargs):
        """Runs a Slurm command."""
        kwargs.setdefault("env", self.environment)
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout, **kwargs)

    def tool(self, *command):
        """The output of a Slurm command."""
        return self.run(*command).stdout.strip()

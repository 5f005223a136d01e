"""isorun's TorchX components: ``torchx run isorun.fit``, ``.doctor``, ``.sweep`` and ``.run``.

TorchX reads this file's text as well as its functions: their arguments need types of a few plain
kinds, written out in this file, and docstrings in Google's style, from which ``--help`` is made.
The file also works by its path: ``torchx run launch/components.py:fit``.
"""

from typing import Dict, List, Optional

from torchx.specs import AppDef

from launch import app as apps
from launch import sweep as sweeps
from launch.identity import identify
from launch.job import training


def fit(
    *overrides: str,
    config: Optional[List[str]] = None,
    j: str = "1xauto",
    h: Optional[str] = None,
    cpu: int = 0,
    gpu: int = 0,
    memMB: int = 0,  # noqa: N803
    image: Optional[str] = None,
    name: Optional[str] = None,
    env: Optional[Dict[str, str]] = None,
    mounts: Optional[List[str]] = None,
    metadata: Optional[Dict[str, str]] = None,
    max_retries: int = 0,
    max_restarts: int = 0,
    preflight: str = "auto",
    rdzv_port: int = 0,
    allow_changes: bool = False,
    check: bool = True,
) -> AppDef:
    """Trains: starts a run, or goes on with it if its run directory holds one.

    Example: torchx run isorun.fit -j 2x4 --config configs/text.yaml optim.lr=3e-4

    Args:
        overrides: key=value settings that win over the files, such as optim.lr=3e-4; last
        config: config files, FILE,FILE,...; later ones win; paths as in the image
        j: NODESxPROCESSES such as 2x4, or MIN:MAXxPROCESSES, whose nodes may come and go, or PROCESSES; auto: one process per GPU
        h: a named resource for each node, such as gpu_h100_8, in place of cpu, gpu and memMB
        cpu: cores per node; 0: 2 per process, or 4 per GPU
        gpu: GPUs per node
        memMB: main memory per node, in MiB; 0: 8192 per process, or 16384 per GPU
        image: container image; by default isorun:cpu, or isorun:cuda with GPUs; local_cwd and slurm use what is installed
        name: name of the job; by default run.name of the config
        env: environment variables, NAME=VALUE,NAME=VALUE; no secrets on remote schedulers
        mounts: type=bind,src=/host,dst=/container[,readonly][,type=...]
        metadata: KEY=VALUE,... for the scheduler: labels, annotations
        max_retries: how often the scheduler starts the job again after a failure
        max_restarts: how often the agent starts the processes again, for failures worth a retry
        preflight: look at the nodes first: off, quick, full, or auto (quick with several nodes)
        rdzv_port: where the nodes meet on node 0; 0: chosen locally and on Slurm, else 29500
        allow_changes: go on with a run although its config has changed in ways that change results
        check: validate the config before it is submitted
    """
    launch = apps.Launch.of(
        j, h, (cpu, gpu, memMB), image, name, env, mounts, metadata, max_retries
    )
    job = training(config or [], overrides, check=check, world_size=launch.shape.world_size)
    command = job.command("fit", *(["--allow-changes"] if allow_changes else []))
    return launch.app(
        "fit",
        identify(job.name, "fit", job.run_directory),
        command,
        options=apps.agent_options(preflight, max_restarts),
        rdzv_port=rdzv_port,
    )


def doctor(
    *overrides: str,
    config: Optional[List[str]] = None,
    level: str = "full",
    j: str = "1xauto",
    h: Optional[str] = None,
    cpu: int = 0,
    gpu: int = 0,
    memMB: int = 0,  # noqa: N803
    image: Optional[str] = None,
    name: Optional[str] = None,
    env: Optional[Dict[str, str]] = None,
    mounts: Optional[List[str]] = None,
    metadata: Optional[Dict[str, str]] = None,
    rdzv_port: int = 0,
    check: bool = True,
) -> AppDef:
    """Looks at the nodes that a run would have, and trains nothing.

    Example: torchx run isorun.doctor -j 2x8 -h gpu_h100_8 --config configs/text.yaml

    Args:
        overrides: key=value settings of the run, such as run.dir=/shared/mine; last
        config: config files, FILE,FILE,...; later ones win; paths as in the image
        level: quick or full
        j: NODESxPROCESSES such as 2x4, or PROCESSES; auto: one process per GPU
        h: a named resource for each node, such as gpu_h100_8, in place of cpu, gpu and memMB
        cpu: cores per node; 0: 2 per process, or 4 per GPU
        gpu: GPUs per node
        memMB: main memory per node, in MiB; 0: 8192 per process, or 16384 per GPU
        image: container image; by default isorun:cpu, or isorun:cuda with GPUs; local_cwd and slurm use what is installed
        name: name of the job; by default run.name of the config
        env: environment variables, NAME=VALUE,NAME=VALUE; no secrets on remote schedulers
        mounts: type=bind,src=/host,dst=/container[,readonly][,type=...]
        metadata: KEY=VALUE,... for the scheduler: labels, annotations
        rdzv_port: where the nodes meet on node 0; 0: chosen locally and on Slurm, else 29500
        check: validate the config before it is submitted
    """
    launch = apps.Launch.of(j, h, (cpu, gpu, memMB), image, name, env, mounts, metadata, 0)
    job = training(config or [], overrides, check=check, world_size=launch.shape.world_size)
    return launch.app(
        "doctor",
        identify(job.name, "doctor"),
        job.command("fit"),
        options=["--preflight-only", *apps.agent_options(level, 0)[2:]],
        rdzv_port=rdzv_port,
    )


def sweep(
    *overrides: str,
    config: Optional[List[str]] = None,
    j: str = "1xauto",
    h: Optional[str] = None,
    cpu: int = 0,
    gpu: int = 0,
    memMB: int = 0,  # noqa: N803
    image: Optional[str] = None,
    name: Optional[str] = None,
    env: Optional[Dict[str, str]] = None,
    mounts: Optional[List[str]] = None,
    metadata: Optional[Dict[str, str]] = None,
    max_retries: int = 0,
    max_restarts: int = 0,
    check: bool = True,
) -> AppDef:
    """Trains once for each combination of values; each node takes its share of the runs.

    An override with several values, key=A,B,C, is varied; a list in brackets is one value. The
    runs lie side by side in the run directory of the config; started again, finished ones are
    left alone.

    Example: torchx run isorun.sweep -j 2x1 --config configs/digits.yaml optim.lr=1e-3,3e-3 run.seed=0,1

    Args:
        overrides: key=value settings, or key=A,B,C for those that are varied; last
        config: config files, FILE,FILE,...; later ones win; paths as in the image
        j: NODESxPROCESSES: as many runs at once, each with so many processes; auto: one per GPU
        h: a named resource for each node, such as gpu_h100_8, in place of cpu, gpu and memMB
        cpu: cores per node; 0: 2 per process, or 4 per GPU
        gpu: GPUs per node
        memMB: main memory per node, in MiB; 0: 8192 per process, or 16384 per GPU
        image: container image; by default isorun:cpu, or isorun:cuda with GPUs; local_cwd and slurm use what is installed
        name: name of the job; by default run.name of the config
        env: environment variables, NAME=VALUE,NAME=VALUE; no secrets on remote schedulers
        mounts: type=bind,src=/host,dst=/container[,readonly][,type=...]
        metadata: KEY=VALUE,... for the scheduler: labels, annotations
        max_retries: how often the scheduler starts the job again after a failure
        max_restarts: how often the agent starts the processes again, for failures worth a retry
        check: validate the config of each run before they are submitted
    """
    launch = apps.Launch.of(
        j, h, (cpu, gpu, memMB), image, name, env, mounts, metadata, max_retries
    )
    job, trials = sweeps.plan(config or [], overrides, check, launch.shape)
    return launch.alone(
        "sweep",
        identify(job.name, "sweep"),
        sweeps.arguments(job, trials, launch.shape, max_restarts),
    )


def run(
    *command: str,
    j: str = "1x1",
    h: Optional[str] = None,
    cpu: int = 0,
    gpu: int = 0,
    memMB: int = 0,  # noqa: N803
    image: Optional[str] = None,
    name: str = "run",
    env: Optional[Dict[str, str]] = None,
    mounts: Optional[List[str]] = None,
    metadata: Optional[Dict[str, str]] = None,
    max_retries: int = 0,
    max_restarts: int = 0,
    preflight: str = "off",
    rdzv_port: int = 0,
) -> AppDef:
    """Runs any command under the node agent: to prepare data, to verify or to export a run.

    Example: torchx run isorun.run --cpu 16 -- python -m train verify --config configs/text.yaml

    Args:
        command: the command and its arguments, after --
        j: NODESxPROCESSES such as 2x4, or MIN:MAXxPROCESSES, whose nodes may come and go, or PROCESSES; auto: one process per GPU
        h: a named resource for each node, such as gpu_h100_8, in place of cpu, gpu and memMB
        cpu: cores per node; 0: 2 per process, or 4 per GPU
        gpu: GPUs per node
        memMB: main memory per node, in MiB; 0: 8192 per process, or 16384 per GPU
        image: container image; by default isorun:cpu, or isorun:cuda with GPUs; local_cwd and slurm use what is installed
        name: name of the job
        env: environment variables, NAME=VALUE,NAME=VALUE; no secrets on remote schedulers
        mounts: type=bind,src=/host,dst=/container[,readonly][,type=...]
        metadata: KEY=VALUE,... for the scheduler: labels, annotations
        max_retries: how often the scheduler starts the job again after a failure
        max_restarts: how often the agent starts the processes again, for failures worth a retry
        preflight: look at the nodes first: off, quick, full, or auto (quick with several nodes)
        rdzv_port: where the nodes meet on node 0; 0: chosen locally and on Slurm, else 29500
    """
    launch = apps.Launch.of(
        j, h, (cpu, gpu, memMB), image, name, env, mounts, metadata, max_retries
    )
    return launch.app(
        "run",
        identify(name, "run"),
        apps.given(command),
        options=apps.agent_options(preflight, max_restarts),
        rdzv_port=rdzv_port,
    )

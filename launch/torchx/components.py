"""isorun's TorchX components: ``torchx run isorun.fit``, ``.doctor``, ``.sweep``, ``.tune`` and ``.run``.

TorchX parses the text of this file: arguments need annotations of a few simple types, written out
here, and Google-style docstrings, from which ``--help`` is made. The components can also be named
by the path of the file: ``torchx run launch/torchx/components.py:fit``.
"""

from typing import Dict, List, Optional

from torchx.specs import AppDef

from launch import agent_command as agent
from launch.torchx import app as apps
from launch.torchx import study_job as studies
from launch.torchx import sweep as sweeps
from launch.torchx.arguments import check_types
from launch.torchx.run_ids import ids_of_run
from launch.torchx.train_command import train_command


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
    dry_run: bool = False,
    check: bool = True,
) -> AppDef:
    """Trains: starts a run, or resumes the run in its run directory.

    Example: torchx run isorun.fit -j 2x4 --config configs/text.yaml optim.lr=3e-4

    Args:
        overrides: key=value settings that override the config files, such as optim.lr=3e-4; after all options
        config: config files, FILE,FILE,...; later files override earlier ones; the paths must be valid in the image
        j: NODESxPROCESSES such as 2x4, or MIN:MAXxPROCESSES for an elastic run, or PROCESSES on one node; auto: one process per GPU
        h: named resource of each node, such as gpu_h100_8; replaces cpu, gpu and memMB
        cpu: cores per node; 0: 2 per process, or 4 per GPU
        gpu: GPUs per node
        memMB: memory per node in MiB; 0: 8192 per process, or 16384 per GPU
        image: container image; default isorun:cpu, or isorun:cuda with GPUs; local_cwd and slurm use the installed packages instead
        name: name of the job; default: run.name of the config
        env: environment variables, NAME=VALUE,NAME=VALUE; secrets are refused by remote schedulers
        mounts: type=bind,src=/host,dst=/container[,readonly][,type=...]
        metadata: KEY=VALUE,... for the scheduler, such as annotations
        max_retries: how many times the scheduler restarts the job after a failure
        max_restarts: how many times the agent restarts the processes after a retryable failure
        preflight: checks of the nodes before the run: off, quick, full, or auto (quick with several nodes)
        rdzv_port: rendezvous port on node 0; 0: a free port with local_cwd, a port of the run on Slurm, else 29500
        allow_changes: resume a run although its config has changed in a way that changes results
        dry_run: try two steps of everything and print the time and memory of each, instead of training
        check: validate the config before the job is submitted
    """
    check_types(fit, locals())
    builder = apps.AppBuilder.from_arguments(
        j, h, (cpu, gpu, memMB), image, name, env, mounts, metadata, max_retries
    )
    world_size = builder.shape.world_size
    train = train_command(config or [], overrides, check=check, world_size=world_size)
    options = ["--allow-changes"] * allow_changes + ["--dry-run"] * dry_run
    return builder.with_agent(
        "fit",
        ids_of_run(train.name, "fit", train.run_directory),
        train.words("fit", *options),
        options=[
            *agent.max_restarts_option(max_restarts),
            *agent.preflight_option(preflight),
        ],
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
    """Checks the nodes that a run would use, without training.

    Example: torchx run isorun.doctor -j 2x8 -h gpu_h100_8 --config configs/text.yaml

    Args:
        overrides: key=value settings of the run, such as run.dir=/shared/mine; after all options
        config: config files, FILE,FILE,...; later files override earlier ones; the paths must be valid in the image
        level: how much is checked: quick or full
        j: NODESxPROCESSES such as 2x4, or PROCESSES on one node; auto: one process per GPU
        h: named resource of each node, such as gpu_h100_8; replaces cpu, gpu and memMB
        cpu: cores per node; 0: 2 per process, or 4 per GPU
        gpu: GPUs per node
        memMB: memory per node in MiB; 0: 8192 per process, or 16384 per GPU
        image: container image; default isorun:cpu, or isorun:cuda with GPUs; local_cwd and slurm use the installed packages instead
        name: name of the job; default: run.name of the config
        env: environment variables, NAME=VALUE,NAME=VALUE; secrets are refused by remote schedulers
        mounts: type=bind,src=/host,dst=/container[,readonly][,type=...]
        metadata: KEY=VALUE,... for the scheduler, such as annotations
        rdzv_port: rendezvous port on node 0; 0: a free port with local_cwd, a port of the run on Slurm, else 29500
        check: validate the config before the job is submitted
    """
    check_types(doctor, locals())
    builder = apps.AppBuilder.from_arguments(
        j, h, (cpu, gpu, memMB), image, name, env, mounts, metadata, 0
    )
    world_size = builder.shape.world_size
    train = train_command(config or [], overrides, check=check, world_size=world_size)
    return builder.with_agent(
        "doctor",
        ids_of_run(train.name, "doctor"),
        agent.doctor_command(level, train.words("fit")),
        options=agent.preflight_option("off"),
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
    """Trains once for each combination of values; the runs are distributed over the nodes.

    An override with several values, key=A,B,C, is varied; a list in brackets is one value. Each
    run gets its own directory inside the run directory of the config. When the same sweep is
    launched again, finished runs are skipped and the others resume.

    Example: torchx run isorun.sweep -j 2x1 --config configs/digits.yaml optim.lr=1e-3,3e-3 run.seed=0,1

    Args:
        overrides: key=value settings, and key=A,B,C for those that are varied; after all options
        config: config files, FILE,FILE,...; later files override earlier ones; the paths must be valid in the image
        j: NODESxPROCESSES: NODES runs at a time with PROCESSES processes each; auto: one process per GPU
        h: named resource of each node, such as gpu_h100_8; replaces cpu, gpu and memMB
        cpu: cores per node; 0: 2 per process, or 4 per GPU
        gpu: GPUs per node
        memMB: memory per node in MiB; 0: 8192 per process, or 16384 per GPU
        image: container image; default isorun:cpu, or isorun:cuda with GPUs; local_cwd and slurm use the installed packages instead
        name: name of the job; default: run.name of the config
        env: environment variables, NAME=VALUE,NAME=VALUE; secrets are refused by remote schedulers
        mounts: type=bind,src=/host,dst=/container[,readonly][,type=...]
        metadata: KEY=VALUE,... for the scheduler, such as annotations
        max_retries: how many times the scheduler restarts the job after a failure
        max_restarts: how many times the agent restarts the processes after a retryable failure
        check: validate the config of each run before the job is submitted
    """
    check_types(sweep, locals())
    builder = apps.AppBuilder.from_arguments(
        j, h, (cpu, gpu, memMB), image, name, env, mounts, metadata, max_retries
    )
    sweep_plan = sweeps.plan(config or [], overrides, check, builder.shape)
    return builder.without_agent(
        "sweep",
        ids_of_run(sweep_plan.name, "sweep"),
        sweeps.arguments(sweep_plan, builder.shape, max_restarts),
    )


def tune(
    *overrides: str,
    space: str,
    config: Optional[List[str]] = None,
    trials: int = 0,
    objective: Optional[List[str]] = None,
    sampler: str = "tpe",
    pruner: str = "none",
    storage: Optional[str] = None,
    parallel: int = 1,
    retries: int = 3,
    j: str = "1xauto",
    scheduler: Optional[str] = None,
    cfg: Optional[str] = None,
    job: Optional[List[str]] = None,
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
    check: bool = True,
) -> AppDef:
    """Searches for good values of config keys: isorun tune as a job, with its trials in it or as jobs.

    Example: torchx run isorun.tune -j 1x2 --config configs/digits.yaml --space space.yaml --objective accuracy

    Args:
        overrides: key=value settings of all trials; run.dir is the directory of the study; after all options
        space: YAML file with the keys to vary; the path must be valid in the image
        config: config files, FILE,FILE,...; later files override earlier ones; the paths must be valid in the image
        trials: trials of the study in all; 0: 20, or all combinations with --sampler grid
        objective: evaluation metrics to optimise, NAME[:min|max],...
        sampler: tpe, random, grid, gp or nsgaii, with options as NAME:option=value,...; or wandb:method=bayes|random|grid
        pruner: none, median, percentile, successive_halving, hyperband or threshold, with options as NAME:option=value,...
        storage: journal, sqlite, or the URL of a database
        parallel: trials at a time
        retries: further starts of a trial that the infrastructure ended
        j: 1xPROCESSES of each trial in this job, auto: its GPUs divided by --parallel; or NODESxPROCESSES of each trial with --scheduler
        scheduler: submits each trial as a job of isorun.fit to this scheduler, from the job of the study
        cfg: options of that scheduler, KEY=VALUE,...
        job: further arguments of isorun.fit for these jobs, NAME=VALUE,...
        h: named resource of the node of this job, such as gpu_h100_8; replaces cpu, gpu and memMB
        cpu: cores of the node; 0: 2 per process, or 4 per GPU
        gpu: GPUs of the node
        memMB: memory of the node in MiB; 0: 8192 per process, or 16384 per GPU
        image: container image; default isorun:cpu, or isorun:cuda with GPUs; local_cwd and slurm use the installed packages instead
        name: name of the job; default: run.name of the config
        env: environment variables, NAME=VALUE,NAME=VALUE; secrets are refused by remote schedulers
        mounts: type=bind,src=/host,dst=/container[,readonly][,type=...]
        metadata: KEY=VALUE,... for the scheduler, such as annotations
        max_retries: how many times the scheduler restarts the job after a failure; the study goes on
        check: validate the space and the config before the job is submitted
    """
    check_types(tune, locals())
    place = studies.place_of(j, parallel, scheduler, cfg, job or [])
    builder = apps.AppBuilder.from_arguments(
        place.node, h, (cpu, gpu, memMB), image, name, env, mounts, metadata, max_retries
    )
    study = studies.StudyJob(
        space, config or [], overrides, trials, objective or [], sampler, pruner, storage, retries
    )
    return builder.without_agent(
        "tune",
        ids_of_run(study.name(check, place, builder.shape), "tune"),
        study.arguments(place, builder.shape),
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
    """Runs any command under the node agent, such as data preparation, verify or export.

    Example: torchx run isorun.run --cpu 16 -- python -m train verify --config configs/text.yaml

    Args:
        command: the command and its arguments, after --
        j: NODESxPROCESSES such as 2x4, or MIN:MAXxPROCESSES for an elastic run, or PROCESSES on one node; auto: one process per GPU
        h: named resource of each node, such as gpu_h100_8; replaces cpu, gpu and memMB
        cpu: cores per node; 0: 2 per process, or 4 per GPU
        gpu: GPUs per node
        memMB: memory per node in MiB; 0: 8192 per process, or 16384 per GPU
        image: container image; default isorun:cpu, or isorun:cuda with GPUs; local_cwd and slurm use the installed packages instead
        name: name of the job
        env: environment variables, NAME=VALUE,NAME=VALUE; secrets are refused by remote schedulers
        mounts: type=bind,src=/host,dst=/container[,readonly][,type=...]
        metadata: KEY=VALUE,... for the scheduler, such as annotations
        max_retries: how many times the scheduler restarts the job after a failure
        max_restarts: how many times the agent restarts the processes after a retryable failure
        preflight: checks of the nodes before the run: off, quick, full, or auto (quick with several nodes)
        rdzv_port: rendezvous port on node 0; 0: a free port with local_cwd, a port of the run on Slurm, else 29500
    """
    check_types(run, locals())
    builder = apps.AppBuilder.from_arguments(
        j, h, (cpu, gpu, memMB), image, name, env, mounts, metadata, max_retries
    )
    return builder.with_agent(
        "run",
        ids_of_run(name, "run"),
        apps.required(command),
        options=[
            *agent.max_restarts_option(max_restarts),
            *agent.preflight_option(preflight),
        ],
        rdzv_port=rdzv_port,
    )

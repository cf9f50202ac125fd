"""``python -m train [overrides]``: train a decoder and measure its sinks; ``-m`` sweeps.

A mistake in the settings ends in one line and exit code 2, and so do a full disk and too little
memory. A sweep goes on when one of its runs fails, and the same sweep again runs what isn't
finished: exit code 2 if each that failed did so in one line, 1 if any crashed. A signal saves the
run's state and ends it, and the sweep, with 128 + its number (``train.stopping``).
"""

import os
import signal
import sys
import traceback
from pathlib import Path

# Hydra prints and exits by itself otherwise; here every error ends in one place, below.
os.environ.setdefault("HYDRA_FULL_ERROR", "1")

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from kernels.errors import UserError
from train.config import plain, register_configs, typed
from train.going_on import way_on
from train.gpus import jobs_at_once
from train.mistakes import MISTAKES, JobFailed, in_one_line, tell
from train.ranks import is_rank
from train.run_folder import RunFolder
from train.shortage import shortage
from train.stopping import Stopped, StopSignals, is_first_rank
from train.sweeps import SweepJob, forget_sweep, sweep_summary

register_configs()

SIDE_BY_SIDE = ("JoblibLauncher", "LocalLauncher")
"""Hydra's launchers whose jobs share a machine without anybody who shares out its GPUs."""

OmegaConf.register_new_resolver("sinklab.jobs_at_once", jobs_at_once, replace=True)

_failed_jobs: list[bool] = []
"""Of each failed job, whether it was the user's mistake. Not the errors: they hold the memory that
the job had, the device's too."""


@hydra.main(version_base="1.3", config_path="../conf", config_name="train")
def main(settings: DictConfig) -> None:
    chosen = HydraConfig.get()
    launcher = chosen.launcher._target_.rpartition(".")[2]
    overrides = list(chosen.overrides.task)
    experiment = chosen.runtime.choices.get("experiment") or "default"
    job = None
    if chosen.mode is RunMode.MULTIRUN:
        job = SweepJob(Path(chosen.runtime.output_dir), chosen.job.num, overrides)
        # The same sweep again does what is missing of it.
        settings.resume = True
    config = values = None

    def folder() -> RunFolder | None:
        if values is None:
            return None
        from train.preparation import folder_of

        return folder_of(config, values, experiment, overrides)

    try:
        config = typed(settings)
        values = plain(settings)
        # Imported late, here and above: Lightning and W&B take seconds that --help and mistakes in
        # the settings need not wait for.
        from train.launch import start

        with StopSignals() as signals:
            start(
                config,
                settings=values,
                experiment=experiment,
                overrides=overrides,
                skip_finished=job is not None,
                brief=job is not None,
                apart=job is not None and launcher in SIDE_BY_SIDE,
                signals=signals,
            )
        if job is not None:
            job.finished()
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        raise
    except (KeyboardInterrupt, SystemExit) as stop:
        # Lightning ends an interrupted run with 1.
        if isinstance(stop, SystemExit) and stop.code != 1:
            raise
        if is_first_rank():
            print(f"interrupted: {way_on(folder())}", file=sys.stderr)
        raise Stopped(signal.SIGINT, "interrupted") from None
    except Exception as error:
        is_mistake = isinstance(error, UserError | OmegaConfBaseException)
        mistake = error if is_mistake else shortage(error, config, folder())
        if mistake is not None:
            # Told here, because Hydra would print more than a line.
            tell(mistake, "" if job is None else f"{job.name}:")
        elif job is None or is_rank():
            # The other ranks are somewhere else, and no job can be begun with them.
            raise
        else:
            traceback.print_exc()
            print(f"failed: {job.name}; the sweep goes on", file=sys.stderr)
        if job is not None:
            run_folder = folder()
            why = f"{type(error).__name__}: {error}" if mistake is None else in_one_line(mistake)
            job.failed(why, run_folder and run_folder.path)
        # One run out of memory at night is no reason to lose the others.
        _failed(mistake or error, launcher)


def _failed(error: Exception, launcher: str) -> None:
    """Remember a failed job until the end, or let the sweep's own process remember it."""
    is_mistake = isinstance(error, MISTAKES)
    if launcher != "BasicLauncher":
        raise JobFailed(f"{type(error).__name__}: {error}", is_mistake) from None
    _failed_jobs.append(is_mistake)


def _quoted(argument: str) -> str:
    """The argument with its path quoted: run folders have "=" in their names, Hydra wants none."""
    name, _, value = argument.partition("=")
    if name not in ("run_dir", "init_from") or "=" not in value or value[0] in "'\"":
        return argument
    # A comma separates the values of a sweep.
    return name + "=" + ",".join(f"'{path}'" for path in value.split(","))


def command(arguments: list[str]) -> int:
    """Run ``python -m train`` with these arguments; returns the exit code."""
    sys.argv = [sys.argv[0], *map(_quoted, arguments)]
    _failed_jobs.clear()
    forget_sweep()
    try:
        main()
    except (HydraException, OmegaConfBaseException) as error:
        tell(error)
        return 2
    except Stopped as stopped:
        # Of the other ranks Lightning takes anything but 0 for a crash, and kills the first.
        return stopped.exit_code if is_first_rank() else 0
    except JobFailed as failed:
        # The first of those that failed, when all have ended.
        _failed_jobs.append(failed.is_mistake)
        if not sweep_summary():
            print(f"failed: {failed.what}", file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted: the same command goes on", file=sys.stderr)
        return 130
    except SystemExit as stop:
        # Hydra ends --help with 0.
        return int(stop.code or 0)
    for line in sweep_summary():
        print(line)
    if not _failed_jobs:
        return 0
    return 2 if all(_failed_jobs) else 1


if __name__ == "__main__":
    sys.exit(command(sys.argv[1:]))

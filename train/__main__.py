"""``python -m train [overrides]``: train a decoder and measure its sinks; ``-m`` sweeps.

A mistake in the settings ends in one line and exit code 2, and so do a full disk and too little
memory. A sweep goes on when one of its runs fails, and the same sweep again runs what isn't
finished: exit code 1 if any failed. A signal saves the run's state and ends it, and the sweep, with
128 + its number (``train.stopping``).
"""

import os
import sys
import traceback

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
from train.gpus import jobs_at_once
from train.mistakes import MISTAKES, JobFailed, tell
from train.ranks import is_rank
from train.stopping import Stopped, StopSignals, is_first_rank

register_configs()

SIDE_BY_SIDE = ("JoblibLauncher", "LocalLauncher")
"""Hydra's launchers whose jobs share a machine without anybody who shares out its GPUs."""

OmegaConf.register_new_resolver("sinklab.jobs_at_once", jobs_at_once, replace=True)

_failed_jobs: list[bool] = []
"""Of each failed job, whether it was the user's mistake. Not the errors: they hold the memory that
the job had, the device's too."""


@hydra.main(version_base="1.3", config_path="../conf", config_name="train")
def main(settings: DictConfig) -> None:
    # Imported late: Lightning and W&B take seconds that --help and typos need not wait for.
    from train.launch import start
    from train.shortage import shortage

    chosen = HydraConfig.get()
    in_sweep = chosen.mode is RunMode.MULTIRUN
    launcher = chosen.launcher._target_.rpartition(".")[2]
    if in_sweep:
        # The same sweep again does what is missing of it.
        settings.resume = True
    config = None
    try:
        config = typed(settings)
        with StopSignals() as signals:
            start(
                config,
                settings=plain(settings),
                experiment=chosen.runtime.choices.get("experiment") or "default",
                overrides=list(chosen.overrides.task),
                skip_finished=in_sweep,
                apart=in_sweep and launcher in SIDE_BY_SIDE,
                signals=signals,
            )
    except (UserError, OmegaConfBaseException) as error:
        # Told here, because Hydra would print more than a line; a sweep goes on with its next job.
        tell(error)
        _failed(error, launcher)
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        raise
    except Exception as error:
        mistake = shortage(error, config)
        if mistake is not None:
            tell(mistake)
        elif not in_sweep or is_rank():
            # The other ranks are somewhere else, and no job can be begun with them.
            raise
        else:
            traceback.print_exc()
        if in_sweep:
            # One run out of memory at night is no reason to lose the others.
            print(f"failed: {' '.join(chosen.overrides.task)}; the sweep goes on", file=sys.stderr)
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


def _interrupted() -> int:
    print("interrupted: resume=true goes on from the last checkpoint", file=sys.stderr)
    return 130


def command(arguments: list[str]) -> int:
    """Run ``python -m train`` with these arguments; returns the exit code."""
    sys.argv = [sys.argv[0], *map(_quoted, arguments)]
    _failed_jobs.clear()
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
        print(f"failed: {failed.what}", file=sys.stderr)
        return 2 if failed.is_mistake else 1
    except KeyboardInterrupt:
        return _interrupted()
    except SystemExit as stop:
        # Lightning ends an interrupted run like this; Hydra ends --help with 0.
        return _interrupted() if stop.code == 1 else int(stop.code or 0)
    if not _failed_jobs:
        return 0
    return 2 if all(_failed_jobs) else 1


if __name__ == "__main__":
    sys.exit(command(sys.argv[1:]))

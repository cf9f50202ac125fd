"""``python -m train [overrides]``: train a decoder and measure its sinks; ``-m`` sweeps.

A mistake in the settings ends in one line and exit code 2. A sweep goes on when one of its runs
fails, and the same sweep again runs what isn't finished: exit code 1 if any failed.
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

register_configs()

SIDE_BY_SIDE = ("JoblibLauncher", "LocalLauncher")
"""Hydra's launchers whose jobs share a machine without anybody who shares out its GPUs."""

OmegaConf.register_new_resolver("sinklab.jobs_at_once", jobs_at_once, replace=True)

_failed_jobs: list[Exception] = []


@hydra.main(version_base="1.3", config_path="../conf", config_name="train")
def main(settings: DictConfig) -> None:
    # Imported late: Lightning and W&B take seconds that --help and typos need not wait for.
    from train.launch import start

    chosen = HydraConfig.get()
    in_sweep = chosen.mode is RunMode.MULTIRUN
    launcher = chosen.launcher._target_.rpartition(".")[2]
    if in_sweep:
        # The same sweep again does what is missing of it.
        settings.resume = True
    try:
        start(
            typed(settings),
            settings=plain(settings),
            experiment=chosen.runtime.choices.get("experiment") or "default",
            overrides=list(chosen.overrides.task),
            skip_finished=in_sweep,
            apart=in_sweep and launcher in SIDE_BY_SIDE,
        )
    except (UserError, OmegaConfBaseException) as error:
        # Told here, because Hydra would print more than a line; a sweep goes on with its next job.
        tell(error)
        _failed(error, launcher)
    except Exception as error:
        if not in_sweep or is_rank():
            # The other ranks are somewhere else, and no job can be begun with them.
            raise
        # One run out of memory at night is no reason to lose the others.
        traceback.print_exc()
        print(f"failed: {' '.join(chosen.overrides.task)}; the sweep goes on", file=sys.stderr)
        _failed(error, launcher)


def _failed(error: Exception, launcher: str) -> None:
    """Remember a failed job until the end, or let the sweep's own process remember it."""
    if launcher != "BasicLauncher":
        raise JobFailed(f"{type(error).__name__}: {error}", isinstance(error, MISTAKES)) from None
    _failed_jobs.append(error)


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
    mistaken = all(isinstance(error, MISTAKES) for error in _failed_jobs)
    return 2 if mistaken else 1


if __name__ == "__main__":
    sys.exit(command(sys.argv[1:]))

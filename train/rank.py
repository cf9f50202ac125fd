"""``python -m train.rank FOLDER RANK``: one rank of a run; started by ``train.launch`` alone."""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

from train.launch import JOB, MISTAKE, quiet
from train.mistakes import MISTAKES
from train.stopping import Stopped, StopSignals


def main(folder: Path, rank: int) -> int:
    """Do what ``folder`` says; a user's mistake is left there and ends with 2, Ctrl-C with 130."""
    _end_with(os.getppid())
    quiet()
    job = json.loads((folder / JOB).read_text())
    # What the run's provenance shows is what was typed.
    sys.argv = job.pop("argv")
    from train.config import register_configs, restored
    from train.preparation import folder_of
    from train.run import run
    from train.shortage import shortage

    register_configs()
    config = restored(job["settings"])
    try:
        # Of the ranks and who started them, that one asks for the job to be run again.
        with StopSignals(requeues=False) as signals:
            run(config, **job, signals=signals)
    except Stopped as stopped:
        if rank == 0:
            print(stopped, file=sys.stderr)
        return stopped.exit_code
    except KeyboardInterrupt:
        return 130
    except SystemExit as stop:
        # Lightning ends an interrupted run like this.
        return 130 if stop.code == 1 else int(stop.code or 0)
    except Exception as error:
        where = (config, job["settings"], job["experiment"], job["overrides"])
        mistake = (
            error if isinstance(error, MISTAKES) else shortage(error, config, folder_of(*where))
        )
        if mistake is None:
            raise
        (folder / MISTAKE.format(rank=rank)).write_text(str(mistake))
        return 2
    return 0


def _end_with(parent: int) -> None:
    """Kill this process when the one that started it is gone: a resume may be on its way."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))

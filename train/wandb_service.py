"""Starting W&B and leaving it, whatever state its service and the network are in."""

import logging
import sys
import threading
from collections.abc import Callable
from typing import Any

from train.privacy import PrivateFormatter, PrivateRecords

FINISH_SECONDS = 300
"""How long the end of a run waits for W&B; what isn't uploaded then, ``wandb sync`` uploads."""

STOP_SECONDS = 2
"""How long the end of a run that a signal or an error stops waits for W&B."""

LEAVE_SECONDS = 10
"""How long to wait for W&B once it has failed."""


def start_wandb(described: dict, mode: str) -> Any | None:
    """W&B's run of ``wandb.init``'s arguments: offline if it can't be reached, None if that doesn't
    work either."""
    import wandb

    log = logging.getLogger("wandb")
    if not any(isinstance(known, PrivateRecords) for known in log.filters):
        log.addFilter(PrivateRecords())
    modes = {"online": "it is offline", "offline": "metrics.csv has every row"}
    for name, instead in list(modes.items())[mode == "offline" :]:
        resume = "allow" if name == "online" else None
        quiet = wandb.Settings(
            console="off",
            silent=True,
            finish_timeout=FINISH_SECONDS,
            # Names of the user and the machine, paths; provenance.json has what matters of it.
            x_disable_meta=True,
            host="",
        )
        try:
            return wandb.init(**described, mode=name, resume=resume, settings=quiet)
        except Exception as error:
            warn(f"W&B could not be started {name} ({told(error)}); {instead}")
        finally:
            # What passes by the filter: other loggers of W&B's, and tracebacks.
            for handler in log.handlers:
                if not isinstance(handler.formatter, PrivateFormatter):
                    handler.setFormatter(PrivateFormatter(handler.formatter))
    return None


def told(error: Exception) -> str:
    """Kind and message of an error, in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split()).rstrip(": ")


def within(seconds: float, call: Callable[[], object]) -> None:
    """Wait for ``call`` so long at most, then leave it be. Raises its error, or TimeoutError."""
    raised: list[BaseException] = []

    def caught() -> None:
        try:
            call()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=caught, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"no answer in {seconds:.0f} s")
    if raised:
        # W&B ends the process if its service ended badly.
        raise RuntimeError("ended") if isinstance(raised[0], SystemExit) else raised[0]


def warn(text: str) -> None:
    """One line on stderr about something that stops nothing."""
    print("warning:", text, file=sys.stderr)

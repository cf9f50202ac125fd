"""A user's mistake as one line on stderr and exit code 2, whatever library found it."""

import os
import sys
from collections.abc import Callable

from hydra.errors import HydraException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException

from kernels.errors import UserError

NOISE = (
    # What it appends is no setting of ours.
    "To append to your config use",
    "object_type=",
    "reference_",
    "Config search path:",
    "provider=",
    "See https://",
    "^",
)
"""Beginnings of lines of Hydra's messages that help nobody who mistyped a setting."""


class KnownToAll(UserError):
    """A mistake that all ranks of a run raise alike, so that rank 0 alone tells it."""


MISTAKES = (UserError, HydraException, OmegaConfBaseException)


class JobFailed(Exception):
    """What a sweep's job that ran in another process tells the sweep; it has told the user more."""

    def __init__(self, what: str, is_mistake: bool):
        super().__init__(what, is_mistake)
        self.what = what
        self.is_mistake = is_mistake


def tell(error: Exception) -> None:
    """Print an error about settings as one line that names the setting and what is wrong."""
    if _first_rank_tells(error):
        return
    text = str(error)
    if isinstance(error, OverrideParseException):
        text = f"override {error.override!r} can't be parsed: {error.message}"
    cause = error.__cause__
    if isinstance(cause, OmegaConfBaseException | UserError):
        text = f"{text} {cause}"
    lines = [line.strip() for line in text.splitlines()]
    kept = [line for line in lines if line and not line.startswith(NOISE)]
    line = "; ".join(dict.fromkeys(kept)).replace(":; ", ": ")
    print("error:", line, file=sys.stderr)


def _first_rank_tells(error: Exception) -> bool:
    """Whether this is another rank, with a mistake that all of a run's ranks found."""
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
        return False
    # Imported late: most commands need no torch to find a mistake.
    import torch.distributed

    # Before they have met, all that they have seen is the same settings.
    return isinstance(error, KnownToAll) or not torch.distributed.is_initialized()


def exit_code(
    main: Callable[[list[str]], None], arguments: list[str], interrupted: str = "interrupted"
) -> int:
    """Run a command's ``main``; ``interrupted`` is what Ctrl-C prints."""
    try:
        main(arguments)
    except MISTAKES as error:
        tell(error)
        return 2
    except Exception as error:
        # Imported late: a mistake's line need not wait for torch.
        from train.shortage import shortage

        mistake = shortage(error)
        if mistake is None:
            raise
        tell(mistake)
        return 2
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130
    return 0

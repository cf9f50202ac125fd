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


def tell(error: Exception) -> None:
    """Print an error about settings as one line that names the setting and what is wrong."""
    if isinstance(error, KnownToAll) and os.environ.get("RANK", "0") != "0":
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


def exit_code(
    main: Callable[[list[str]], None], arguments: list[str], interrupted: str = "interrupted"
) -> int:
    """Run a command's ``main``; ``interrupted`` is what Ctrl-C prints."""
    try:
        main(arguments)
    except MISTAKES as error:
        tell(error)
        return 2
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130
    return 0

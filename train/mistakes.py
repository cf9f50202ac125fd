"""A user's mistake as one line on stderr and exit code 2, whatever library found it."""

import os
import select
import signal
import sys
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from pathlib import Path

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from kernels.errors import UserError

CONF = Path(__file__).resolve().parents[1] / "conf"

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


def tell(error: Exception, whose: str = "") -> None:
    """Print an error about settings as one line that names the setting and what is wrong.

    whose: stands before it, as the run of a sweep.
    """
    if not _first_rank_tells(error):
        print("error:", *filter(None, [whose]), in_one_line(error), file=sys.stderr)


def in_one_line(error: Exception) -> str:
    """What a mistake says, without what Hydra and OmegaConf say that helps nobody."""
    text, cause = str(error), error.__cause__
    if isinstance(error, OverrideParseException):
        text = f"override {error.override!r} can't be parsed: {error.message}"
    elif isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, choice = error.missing_cfg_file.rpartition("/")
        rule = f"{group} must be one of {', '.join(error.options)}, got {choice!r}"
        return rule + _nearest(choice, error.options)
    elif isinstance(cause, ConfigKeyError | ConfigAttributeError):
        return _unknown_setting(cause)
    elif isinstance(cause, OmegaConfBaseException):
        # Hydra quotes the override, which names the setting; OmegaConf says what is wrong with it.
        override = text.splitlines()[0].removeprefix("Error merging override ")
        text = f"{override}: {str(cause).splitlines()[0]}"
    elif isinstance(cause, UserError):
        text = f"{text} {cause}"
    lines = [line.strip() for line in text.splitlines()]
    kept = [line for line in lines if line and not line.startswith(NOISE)]
    return "; ".join(dict.fromkeys(kept)).replace(":; ", ": ").replace(".; ", "; ")


def _unknown_setting(error: OmegaConfBaseException) -> str:
    """What to say of a key that a part of the settings doesn't have, which OmegaConf tells of."""
    section, _, key = error.full_key.rpartition(".")
    known = [str(name) for name in error.parent_node or ()]
    if not section:
        # Groups are chosen as if they were settings, some of which aren't.
        known += [str(path.relative_to(CONF)) for path in CONF.rglob("*") if path.is_dir()]
    return no_setting(section, key, known)


def no_setting(section: str, key: str, known: Iterable[str]) -> str:
    """That ``section`` (empty for all of the settings) has no ``key``, and which may be meant."""
    prefix = f"{section}." if section else ""
    return f"there is no setting {prefix}{key}{_nearest(key, known, prefix)}"


def _nearest(name: str, known: Iterable[str], prefix: str = "") -> str:
    """What to add about the known name that ``name`` is most like; nothing if it is like none."""
    close = get_close_matches(name, list(known), n=1)
    return f"; did you mean {prefix}{close[0]}?" if close else ""


def _first_rank_tells(error: Exception) -> bool:
    """Whether this is another rank, with a mistake that all of a run's ranks found."""
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
        return False
    # Imported late: most commands need no torch to find a mistake.
    import torch.distributed

    # Before they have met, all that they have seen is the same settings.
    return isinstance(error, KnownToAll) or not torch.distributed.is_initialized()


def _nobody_reads() -> bool:
    """Whether standard output is what broke, as in ``... | head``; then the rest goes nowhere."""
    try:
        stdout = sys.stdout.fileno()
    except OSError:
        # One that is no file.
        return False
    poll = select.poll()
    poll.register(stdout, 0)
    if not any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), stdout)
    return True


def exit_code(
    main: Callable[[list[str]], None], arguments: list[str], interrupted: str = "interrupted"
) -> int:
    """Run a command's ``main``; ``interrupted`` is what Ctrl-C prints."""
    try:
        main(arguments)
        sys.stdout.flush()
    except MISTAKES as error:
        tell(error)
        return 2
    except BrokenPipeError:
        if not _nobody_reads():
            raise
        return 128 + signal.SIGPIPE
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

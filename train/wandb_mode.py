"""The settings of W&B, and the mode that it runs in.

Apart from the loggers (``train.loggers``) and with W&B imported late, because the typed settings of
a run are needed by what can't wait for W&B and Lightning: ``--help`` and the line about a typo.
"""

import os
from dataclasses import dataclass
from enum import StrEnum

from kernels.errors import require
from train.wandb_service import told, warn


class WandbMode(StrEnum):
    auto = "auto"
    online = "online"
    offline = "offline"
    disabled = "disabled"


@dataclass(kw_only=True)
class LoggerConfig:
    """Logging besides the run folder."""

    wandb: WandbMode = WandbMode.auto
    """auto = $WANDB_MODE if set; else online when logged in, offline when not. Never asks."""
    project: str = "sinklab"
    """W&B project."""
    everything: bool = False
    """Send W&B every threshold and aggregation of the sinks, not just the headline ones."""


def wandb_mode(config: LoggerConfig) -> str:
    """The mode W&B runs in, decided without ever waiting for input.

    With a login that its server doesn't answer or refuses it is offline, and a warning says so.
    Raises UserError for an unknown ``$WANDB_MODE``, and for online without a login.
    """
    setting, mode = "logger.wandb", config.wandb.value
    if config.wandb is WandbMode.auto and (variable := os.environ.get("WANDB_MODE")):
        setting, mode = "WANDB_MODE", variable
    known = [choice.value for choice in WandbMode if choice is not WandbMode.auto]
    if mode in ("disabled", "offline"):
        return mode
    require(mode in ("auto", "online"), setting, f"must be one of {', '.join(known)}", mode)
    import wandb

    try:
        logged_in = wandb.login(prompt=False)
    except wandb.UsageError:
        # No key, and nobody to ask for one.
        logged_in = False
    except Exception as error:
        warn(f"W&B can't be reached with the login there is ({told(error)}); the run is offline")
        return "offline"
    require(logged_in or mode == "auto", setting, "must not be online without a login", mode)
    return "online" if logged_in else "offline"

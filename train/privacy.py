"""What a run folder and W&B don't get to see: where the user's home is, and keys.

Paths below the home folder are stored with ``~``; the value of a variable such as WANDB_API_KEY or
HF_TOKEN becomes the variable's name.
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import Any

SECRET = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS)$")
"""Ends of the names of variables whose values are nobody's business."""

SHORTEST_SECRET = 8
"""A shorter value (``TOKEN=1``) is no key, and would be found in innocent text."""


def private(value: Any) -> Any:
    """The same value (of strings, lists and dictionaries) with home as ``~`` and without keys."""
    return _mapped(value, _private_text)


def with_home(value: Any) -> Any:
    """The same value with ``~`` and paths that begin with ``~/`` as they are on this machine."""

    def expanded(text: str) -> str:
        return os.path.expanduser(text) if text == "~" or text.startswith("~/") else text

    return _mapped(value, expanded)


class PrivateRecords(logging.Filter):
    """Makes a logger's messages private."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = _private_text(record.getMessage()), None
        return True


class PrivateFormatter(logging.Formatter):
    """Makes private what another formatter makes of a record, tracebacks included."""

    def __init__(self, inner: logging.Formatter | None):
        super().__init__()
        self.inner = inner or logging.Formatter()

    def format(self, record: logging.LogRecord) -> str:
        return _private_text(self.inner.format(record))


def _private_text(text: str) -> str:
    for name, secret in os.environ.items():
        if SECRET.search(name.upper()) and len(secret) >= SHORTEST_SECRET:
            text = text.replace(secret, f"${name}")
    home = os.path.expanduser("~")
    for path in {home, os.path.realpath(home)}:
        if len(Path(path).parts) > 1:
            # Not /home/anna in /home/annabel.
            text = re.sub(re.escape(path) + r"(?![\w.-])", "~", text)
    return text


def _mapped(value: Any, change: Any) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {name: _mapped(entry, change) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_mapped(entry, change) for entry in value]
    return value

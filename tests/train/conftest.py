"""One small finished run that tests may read, never write, and copies of it."""

import shutil
from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def composed_once():
    """Hydra composes the settings of every command twice, once just to look up ``hydra.mode``,
    which takes as long as ten training steps. Without that, --multirun decides alone."""
    from hydra._internal.hydra import Hydra

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Hydra, "get_mode", lambda *_, **__: None)
        yield


KEPT_RUN = ("seed=3", "trainer.max_steps=8", "tracking.validate_every=4", "optimizer.lr=0.01")
"""Settings of ``kept_run`` besides ``debug=cpu``."""


@pytest.fixture(scope="session")
def kept_run(cache_dir, tmp_path_factory) -> Path:
    """Eight steps of ``debug=cpu`` with a pinned BOS, validated at 0, 4 and 8."""
    from train.__main__ import command

    # "=" as the names have that runs get by themselves.
    folder = tmp_path_factory.mktemp("kept") / "seed=3-0a1b2c3d"
    arguments = ("debug=cpu", f"cache_dir={cache_dir}", f"run_dir={folder}", *KEPT_RUN)
    assert command(list(arguments)) == 0
    return folder


@pytest.fixture
def run(kept_run):
    """That run, read back anew."""
    from train.runs import load_run

    return load_run(kept_run)


@pytest.fixture
def copied(kept_run, tmp_path) -> Path:
    """A copy of the run that a test may damage."""
    return Path(shutil.copytree(kept_run, tmp_path / "copy"))

"""metrics.csv, and the mode W&B runs in."""

import csv

import pytest
import wandb

from kernels.errors import UserError
from train.loggers import MetricsCSV
from train.wandb_mode import LoggerConfig, WandbMode, wandb_mode


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_rows_are_on_disk_at_once_and_new_columns_join(tmp_path):
    logger = MetricsCSV(tmp_path / "metrics.csv")
    logger.log_metrics({"a": 0.5}, step=1)
    assert read(logger.path) == [{"step": "1", "a": "0.5"}]
    logger.log_metrics({"b": 2.0}, step=2)
    logger.log_metrics({"a": 0.1 + 0.2, "b": 1.0}, step=3)
    assert read(logger.path) == [
        {"step": "1", "a": "0.5", "b": ""},
        {"step": "2", "a": "", "b": "2.0"},
        {"step": "3", "a": "0.30000000000000004", "b": "1.0"},
    ]


def test_going_on_forgets_later_rows_and_a_torn_line(tmp_path):
    path = tmp_path / "metrics.csv"
    logger = MetricsCSV(path)
    for step in range(1, 5):
        logger.log_metrics({"a": float(step), "b": 0.0}, step=step)
    path.write_text(path.read_text() + "3,9")
    again = MetricsCSV(path)
    again.keep_until(3)
    again.log_metrics({"a": 4.5}, step=4)
    assert [(row["step"], row["a"]) for row in read(path)] == [
        ("1", "1.0"),
        ("2", "2.0"),
        ("3", "3.0"),
        ("4", "4.5"),
    ]


def test_starting_anew_forgets_everything(tmp_path):
    logger = MetricsCSV(tmp_path / "metrics.csv")
    logger.log_metrics({"a": 1.0}, step=0)
    logger.keep_until(-1)
    assert read(logger.path) == []


@pytest.mark.parametrize(
    ("variable", "logged_in", "mode"),
    [
        (None, True, "online"),
        (None, False, "offline"),
        ("", False, "offline"),
        ("disabled", True, "disabled"),
        ("offline", True, "offline"),
    ],
)
def test_the_mode_is_decided_without_asking(monkeypatch, variable, logged_in, mode):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    if variable is not None:
        monkeypatch.setenv("WANDB_MODE", variable)

    def login(prompt):
        assert prompt is False
        return logged_in

    monkeypatch.setattr(wandb, "login", login)
    assert wandb_mode(LoggerConfig()) == mode
    assert wandb_mode(LoggerConfig(wandb=WandbMode.disabled)) == "disabled"


@pytest.mark.parametrize("setting", [WandbMode.auto, WandbMode.online])
def test_a_login_that_the_server_does_not_answer_is_offline(monkeypatch, capsys, setting):
    def login(prompt):
        raise wandb.errors.AuthenticationError("Failed to authenticate with http://x: busy")

    monkeypatch.setenv("WANDB_MODE", "online" if setting is WandbMode.auto else "")
    monkeypatch.setattr(wandb, "login", login)
    assert wandb_mode(LoggerConfig(wandb=setting)) == "offline"
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: W&B can't be reached") and "the run is offline" in line
    assert "http://x: busy" in line


@pytest.mark.parametrize(
    ("variable", "setting", "message"),
    [
        ("sometimes", WandbMode.auto, "WANDB_MODE must be one of online, offline, disabled"),
        ("online", WandbMode.auto, "WANDB_MODE must not be online without a login"),
        ("", WandbMode.online, "logger.wandb must not be online without a login"),
    ],
)
def test_a_mode_that_cannot_work_is_refused(monkeypatch, variable, setting, message):
    monkeypatch.setenv("WANDB_MODE", variable)
    monkeypatch.setattr(wandb, "login", lambda prompt: False)
    with pytest.raises(UserError, match=message):
        wandb_mode(LoggerConfig(wandb=setting))

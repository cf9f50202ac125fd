"""The rows of the fault table about files: torn, swapped, foreign and malicious ones are refused by
name, in one line, and nothing in them is executed."""

import hashlib
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml

from kernels.errors import UserError
from tests.train.conftest import KEPT_RUN
from tests.train.faults.table import SLOW
from train.runs import load_run

SAME = (*KEPT_RUN, "trainer.max_steps=12")


class Malicious:
    """Unpickling it would leave a trace."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def resume(train, run: Path) -> int:
    return train(*SAME, "resume=true", run_dir=run)


def branch(train, run: Path) -> int:
    return train("seed=3", f"init_from='{run}@8'", run_dir=run.parent / "branch")


def read(what: Callable) -> Callable[..., int]:
    """Reads something of a run back, as the commands do that report on it."""

    def act(train, run: Path) -> int:
        from train.mistakes import exit_code

        return exit_code(lambda _: what(load_run(run)), [])

    return act


read_tables = read(lambda run: run.sinks())
read_settings = read(lambda run: run.config)
read_tokenizer = read(lambda run: run.at("last").tokenizer)
read_model = read(lambda run: run.at("last").model)


def torn(path: Path, trace: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def without_its_end(path: Path, trace: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def emptied(path: Path, trace: Path) -> None:
    path.write_bytes(b"")


def foreign_state(path: Path, trace: Path) -> None:
    torch.save({"weights": 1}, path)


def pickled(path: Path, trace: Path) -> None:
    path.write_bytes(pickle.dumps(Malicious(trace)))


def malicious_state(path: Path, trace: Path) -> None:
    torch.save({"state_dict": Malicious(trace), "global_step": 8}, path)


def state_of_another_run(path: Path, trace: Path) -> None:
    state = torch.load(path, weights_only=True)
    assert state["callbacks"]["CheckpointSchedule"]["run_id"] is not None
    state["callbacks"]["CheckpointSchedule"]["run_id"] = "0a1b2c3d"
    torch.save(state, path)


def state_of_another_model(path: Path, trace: Path) -> None:
    state = torch.load(path, weights_only=True)
    name = next(name for name in state["state_dict"] if "embedding" in name)
    state["state_dict"][name] = state["state_dict"][name][:, :8].clone()
    torch.save(state, path)


def settings_with(section: str, added: dict) -> Callable[[Path, Path], None]:
    """``TRACE`` stands for a file that somebody executing the settings would make."""

    def damage(path: Path, trace: Path) -> None:
        settings = yaml.safe_load(path.read_text())
        settings[section] |= {
            name: str(trace) if value == "TRACE" else value for name, value in added.items()
        }
        path.write_text(yaml.safe_dump(settings))

    return damage


def yaml_object(path: Path, trace: Path) -> None:
    path.write_text(f"seed: !!python/object/apply:os.mkdir ['{trace}']\n")


def weights_of_another_step(path: Path, trace: Path) -> None:
    shutil.copy(path.parent.parent / "step_00000004" / path.name, path)


def pickle_with_its_digest(path: Path, trace: Path) -> None:
    pickled(path, trace)
    description = path.with_name("model.json")
    told = json.loads(description.read_text())
    told["weights_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    description.write_text(json.dumps(told))


def another_tokenizer(path: Path, trace: Path) -> None:
    path.write_text(path.read_text().replace('"e"', '"ee"'))


class Damage(NamedTuple):
    """A file of the run folder, what is done to it, who reads it then, part of what is said."""

    file: str
    damage: Callable[[Path, Path], None]
    act: Callable[..., int]
    said: str
    slow: bool = True


LAST = "checkpoints/last.ckpt"
WEIGHTS = "checkpoints/step_00000008/model.safetensors"
TARGET = {"_target_": "os.mkdir", "path": "TRACE"}
LOOKUP = {"norm_eps": "${oc.env:HOME}"}

FILES = {
    "state torn": Damage(LAST, torn, resume, "must hold an intact checkpoint"),
    "state without its end": Damage(
        LAST, without_its_end, resume, "@8 with a new run_dir starts from the newest", False
    ),
    "state empty": Damage(
        LAST, emptied, resume, "got one that is damaged or no run's state: ", False
    ),
    "state foreign": Damage(LAST, foreign_state, resume, "intact checkpoint to resume", False),
    "state with code": Damage(LAST, malicious_state, resume, "intact checkpoint", False),
    "state a pickle": Damage(LAST, pickled, resume, "must hold an intact checkpoint"),
    "state of another run": Damage(
        LAST, state_of_another_run, resume, "got one of run 0a1b2c3d in", False
    ),
    "state of another model": Damage(LAST, state_of_another_model, resume, "of this model", False),
    "settings with code": Damage("config.yaml", yaml_object, resume, "a readable config.yaml"),
    "settings with code, read": Damage("config.yaml", yaml_object, read_settings, "must be YAML"),
    "settings with a _target_": Damage(
        "config.yaml", settings_with("corpus", TARGET), resume, "corpus._target_ must stay"
    ),
    "settings with a _target_, read": Damage(
        "config.yaml", settings_with("corpus", TARGET), read_settings, "_target_", False
    ),
    "settings that look a variable up": Damage(
        *("config.yaml", settings_with("model", LOOKUP), read_settings),
        *("model.norm_eps must be a plain value, got '${oc.env:HOME}'", False),
    ),
    "provenance torn": Damage("provenance.json", torn, resume, "readable provenance.json", False),
    "weights torn": Damage(WEIGHTS, torn, branch, "is damaged: its SHA-256"),
    "weights a pickle": Damage(WEIGHTS, pickled, branch, "is damaged: its SHA-256"),
    "weights a pickle with its digest": Damage(
        WEIGHTS, pickle_with_its_digest, read_model, "model.safetensors is damaged", False
    ),
    "weights of another step": Damage(WEIGHTS, weights_of_another_step, branch, "is damaged"),
    "tokenizer torn": Damage(
        "tokenizer.json", torn, read_tokenizer, "must be an intact tokenizer.json"
    ),
    "tokenizer a pickle": Damage(
        "tokenizer.json", pickled, read_tokenizer, "must be an intact tokenizer.json"
    ),
    "tokenizer of another run": Damage(
        "tokenizer.json", another_tokenizer, read_tokenizer, "tokenizer.json"
    ),
    "sinks torn": Damage(
        "sinks/part-00000008.parquet", torn, read_tables, "must be an intact table"
    ),
    "sinks a pickle": Damage(
        "sinks/part-00000008.parquet", pickled, read_tables, "must be an intact table", False
    ),
}


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "fault", [pytest.param(x, marks=[SLOW] * x.slow, id=name) for name, x in FILES.items()]
)
def test_a_file_is_refused_by_name(train, copied, tmp_path, capsys, fault):
    trace = tmp_path / "executed"
    file = copied / fault.file
    fault.damage(file, trace)
    before = contents(copied)
    assert fault.act(train, copied) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and fault.said in line
    assert str(copied) in line or fault.said.startswith("corpus._target_")
    assert not trace.exists()
    assert contents(copied) == before and not (copied.parent / "branch").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pattern", "damage", "said"),
    [
        ("tokenizers/*.json", torn, "cached tokenizer must be intact"),
        ("tokenizers/*.json", pickled, "cached tokenizer must be intact"),
        ("stores/*/train.bin", torn, "token store must be intact"),
        ("stores/*/train.offsets.npy", pickled, "token store must be intact"),
        ("stores/*/manifest.json", torn, "token store must be intact"),
    ],
)
def test_a_file_of_the_cache_is_refused_and_made_again(
    train, cache_dir, tmp_path, capsys, pattern, damage, said
):
    cache, trace = tmp_path / "cache", tmp_path / "executed"
    settings = (f"cache_dir={cache}", "trainer.max_steps=1")
    assert train(*settings, run_dir=tmp_path / "before") == 0
    (file,) = cache.glob(pattern)
    file.chmod(0o644)
    damage(file, trace)
    capsys.readouterr()
    assert train(*settings) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and said in line and str(file) in line
    assert not trace.exists() and not (tmp_path / "run").exists()
    # As the line says.
    shutil.rmtree(file.parent) if "stores" in pattern else file.unlink()
    assert train(*settings) == 0


def test_a_lookup_in_a_models_description_is_refused(copied):
    from models.checkpoints import load_model

    path = copied / "checkpoints" / "step_00000008" / "model.json"
    told = json.loads(path.read_text())
    told["model"]["norm_eps"] = "${oc.env:HOME}"
    path.write_text(json.dumps(told))
    with pytest.raises(UserError, match=r"model.json: norm_eps must be a plain value"):
        load_model(path.parent)

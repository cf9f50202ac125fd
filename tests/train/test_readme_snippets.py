"""The README's section on reading runs back, run as it stands on small runs."""

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "README.md"

SMALL = (
    *("debug=cpu", "packing.batch_tokens=256"),
    *("tracking.per_octave=1", "tracking.sinks_every=16", "tracking.log_every=16"),
    *("tracking.validate_every=64", "trainer.progress=false"),
)
"""What is added to every command: the runs of the README take minutes."""


def blocks(heading: str) -> list[tuple[str, str]]:
    """(language, code) of each fenced block of a section, in their order."""
    section = README.read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"```(\w+)\n(.*?)```", section, re.DOTALL)


@pytest.fixture(scope="module")
def executed(cache_dir, tmp_path_factory) -> Iterator[dict]:
    """The names that the section's Python blocks leave, its commands having been run between."""
    from train.__main__ import command

    names: dict = {}
    with pytest.MonkeyPatch.context() as patch:
        # The snippets' paths are relative.
        patch.chdir(tmp_path_factory.mktemp("readme"))
        for language, code in blocks("Reading runs back"):
            if language == "python":
                exec(compile(code, str(README), "exec"), names)
                continue
            for line in code.splitlines():
                program, what, *overrides = shlex.split(line)
                assert (program, what) == ("scripts/run", "train")
                steps = 2 if "init_from=" in line else 64
                arguments = [*overrides, *SMALL, f"trainer.max_steps={steps}"]
                assert command([*arguments, f"cache_dir={cache_dir}"]) == 0
        yield names


def test_the_section_has_commands_and_python():
    languages = [language for language, _ in blocks("Reading runs back")]
    assert languages == ["sh", "python", "sh", "python"]


def test_what_is_read_is_the_runs(executed):
    assert executed["losses"]["step"].tolist() == [0, 64]
    assert executed["mass"].index.tolist() == [16, 32, 48, 64]
    assert executed["mass"].shape[1] == executed["model"].config.num_layers * 2
    assert executed["pattern"].index[0] == "<bos>"
    assert executed["pattern"].sum(axis=1).to_numpy() == pytest.approx(1, abs=1e-5)
    exported = {path.name for path in Path("runs/exported").iterdir()}
    assert exported == {
        *("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    }
    config = json.loads(Path("runs/exported/config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]


def test_the_branch_begins_where_its_parent_was(executed):
    parent, run, branch = (executed[name] for name in ("parent", "run", "branch"))
    assert (parent["step"], parent["run_id"], parent["arm"]) == (64, run.run_id, run.arm_hash)
    table = executed["differences"]([run, branch])
    assert table["packing.bos"].tolist() == ["document", "none"]
    label = executed["arm_label"]([run, branch])[branch.path]
    assert label == f"packing.bos=none, trainer.max_steps=2, init_from={run.arm_hash}@64"
    # Without the BOS the inputs differ; on the prompts that have none, nothing does.
    before, after = run.metrics().iloc[-1], branch.metrics().iloc[0]
    assert (before["step"], after["step"]) == (64, 0)
    for name in ("probe/t64_text/loss", "probe/t64_text/mass"):
        assert before[name] == after[name]


@pytest.mark.slow
def test_the_commands_for_many_gpus_train(cache_dir, tmp_path):
    """On a CPU, whose devices are processes."""
    from train.__main__ import command

    for index, line in enumerate(blocks("Many GPUs, many runs")[0][1].splitlines()):
        program, what, *overrides = shlex.split(line)
        assert (program, what) == ("scripts/run", "train") and "trainer.devices=2" in overrides
        where = (f"cache_dir={cache_dir}", f"run_dir={tmp_path / str(index)}")
        assert command([*overrides, *SMALL, *where, "trainer.max_steps=2"]) == 0
        assert (tmp_path / str(index) / "checkpoints" / "step_00000002").is_dir()


def test_the_launchers_of_the_section_exist():
    section = README.read_text().split("\n## Many GPUs, many runs\n")[1].split("\n## ")[0]
    named = re.findall(r"hydra/launcher=(\w+)", section)
    there = {path.stem for path in (README.parent / "conf/hydra/launcher").glob("*.yaml")}
    assert set(named) == there

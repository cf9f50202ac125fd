"""Findings from their runs: one campaign end to end, interrupted ones, and every arm's settings."""

import json
import os
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch

from kernels.errors import UserError
from scripts.reproduce import command
from tests.train.made_results import made_record
from tests.train.test_findings_stored import check_stored
from train.findings import FINDINGS, campaign, jobs
from train.findings.base import Of
from train.findings.budgets import BUDGETS, planned, pool_of, run_dir, tokens_of
from train.findings.measures import CURVES, Record

TINY = ("trainer.max_steps=3", "tracking.validate_every=1", "model.num_heads=4")


WRITTEN = {"packing.fixed_position", "packing.random_positions"}
"""Settings of arms whose records have curves by position too."""


@pytest.fixture
def reproduce(cache_dir, tmp_path):
    """``reproduce("noise", ...)`` at budget cpu in folders of its own; returns the exit code."""

    def run(*arguments: str, folder: str = "findings", runs: str = "runs") -> int:
        settings = [word for one in (*TINY, f"cache_dir={cache_dir}") for word in ("--set", one)]
        where = ["--folder", str(tmp_path / folder), "--runs", str(tmp_path / runs)]
        return command([*arguments, "--budget", "cpu", "--store", *where, *settings])

    return run


class StopsAtSecondStep(L.Callback):
    """Somebody ends the process while it trains."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def stored(folder: Path) -> dict[str, dict]:
    """What was stored, but for times."""
    told = {}
    for path in sorted((folder / "runs" / "cpu").glob("*.json")):
        record = json.loads(path.read_bytes())
        del record["seconds"], record["values"]["tokens_per_second"]
        told[path.name] = record
    return told


def measures_of(finding) -> set[str]:
    """All that a finding asks of a run."""
    asked = {one for column in finding.columns for one in Of("", column.measure).measures}
    for claim in finding.claims:
        sides = [side for test in claim.tests for side in test.sides]
        asked.update(*(side.measures for side in (*sides, *(claim.effect or ()))))
    return asked


@pytest.mark.slow
def test_a_finding_from_its_runs_and_again_without_them(reproduce, tmp_path, capsys):
    assert reproduce("noise", "--seeds", "1") == 0
    shown = capsys.readouterr().out
    assert "0 done before" in shown and "a check of the machinery" in shown
    assert check_stored(tmp_path / "findings") == 1
    table = shown[shown.index("| arm") : shown.index("Criteria: ")]
    first = stored(tmp_path / "findings")
    assert len(first) == 2
    # Nothing is made again: not in the same place, nor without the runs' folders.
    assert reproduce("noise", "--seeds", "1", runs="elsewhere") == 0
    again = capsys.readouterr().out
    assert "2 done before" in again and table in again
    assert not (tmp_path / "elsewhere").exists()
    assert reproduce("noise", "--seeds", "1", folder="other") == 0
    assert "2 done before" in capsys.readouterr().out
    assert stored(tmp_path / "other") == first
    assert command(["noise", "--show", "--budget", "cpu", "--folder", str(tmp_path / "other")]) == 0
    assert table in capsys.readouterr().out
    # Another finding has the same arms.
    assert reproduce("emergence", "--seeds", "1") == 0
    assert "2 runs, 2 done before" in capsys.readouterr().out


@pytest.mark.slow
def test_runs_of_other_settings_are_refused(reproduce, capsys):
    assert reproduce("noise", "--seeds", "1") == 0
    capsys.readouterr()
    assert reproduce("noise", "--seeds", "1", "--set", "optimizer.lr=0.5") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "optimizer.lr 0.002 there, 0.5 here" in error


@pytest.mark.slow
def test_interrupted_and_continued_it_is_the_same(reproduce, tmp_path, monkeypatch, capsys):
    assert reproduce("noise", "--seeds", "2", folder="whole", runs="whole_runs") == 0
    # The first run is stopped while it trains, the second before it is probed.
    real_run, real_probe = campaign.run, campaign.probe_run

    monkeypatch.setattr(campaign, "run", partial(real_run, callbacks=[StopsAtSecondStep()]))
    assert reproduce("noise", "--seeds", "2") == 143
    assert (tmp_path / "runs" / "cpu" / "baseline_seed=0" / "checkpoints" / "last.ckpt").exists()
    monkeypatch.setattr(campaign, "run", real_run)

    def interrupt(*args, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr(campaign, "probe_run", interrupt)
    assert reproduce("noise", "--seeds", "2") == 130
    monkeypatch.setattr(campaign, "probe_run", real_probe)
    # No time at all; then for one seed.
    assert reproduce("noise", "--seeds", "2", "--seconds", "0") == 0
    assert "4 runs are still to make" in capsys.readouterr().out
    assert reproduce("noise", "--seeds", "1") == 0
    assert reproduce("noise", "--seeds", "2", "--seconds", "0") == 0
    assert "2 runs are still to make" in capsys.readouterr().out
    assert reproduce("noise", "--seeds", "2") == 0
    assert stored(tmp_path / "findings") == stored(tmp_path / "whole")
    assert check_stored(tmp_path / "findings") == 1


def test_findings_may_have_seeds_of_their_own_and_some_arms_alone(monkeypatch, tmp_path, capsys):
    begun = []

    def made(plan, *args, **more):
        begun.append(plan.slug)
        raise UserError("made up")

    monkeypatch.setattr(campaign, "make", made)
    where = ["--runs", str(tmp_path / "runs"), "--folder", str(tmp_path / "findings")]
    assert command(["emergence", "noise:3", "--seeds", "1", "--budget", "cpu", *where]) == 2
    slugs = ("baseline", "packing=causal_pinned_bos")
    assert begun == [f"{slug}_seed={seed}" for seed in range(3) for slug in slugs]
    assert "error: 6 runs failed, the first: emergence causal seed 0" in capsys.readouterr().err
    begun.clear()
    assert command(["noise", "--arms", "pinned", "--seeds", "2", "--budget", "cpu", *where]) == 2
    assert begun == [f"{slugs[1]}_seed={seed}" for seed in range(2)]


@pytest.mark.slow
def test_several_at_once_and_one_that_fails(reproduce, tmp_path, capsys):
    assert reproduce("noise", "--seeds", "1", folder="whole", runs="whole_runs") == 0
    assert reproduce("noise", "--seeds", "1", "--jobs", "2") == 0
    assert stored(tmp_path / "findings") == stored(tmp_path / "whole")
    # A file where a run's folder should be.
    (tmp_path / "broken" / "cpu").mkdir(parents=True)
    (tmp_path / "broken" / "cpu" / "baseline_seed=0").write_text("")
    capsys.readouterr()
    for count in ("1", "2"):
        assert reproduce("noise", "--seeds", "1", "--jobs", count, folder=count, runs="broken") == 2
        shown = capsys.readouterr()
        assert "failed: noise causal seed 0" in shown.out and "1 runs failed" in shown.err
        assert list(stored(tmp_path / count)) == ["packing=causal_pinned_bos_seed=0.json"]
        for record in (tmp_path / "broken" / "cpu").glob("*/record.json"):
            record.unlink()


@pytest.mark.slow
@pytest.mark.parametrize("name", FINDINGS)
def test_every_finding_runs_and_has_the_measures_it_asks_for(reproduce, tmp_path, name, capsys):
    assert reproduce(name, "--seeds", "1") == 0
    finding, measured = FINDINGS[name], set()
    pool = tmp_path / "findings" / "runs" / pool_of(finding, BUDGETS["cpu"])
    for path in pool.glob("*.json"):
        record = Record.from_json(path)
        measured |= set(record.values)
        assert {"text/excess", "bos_text/excess", "canonical_loss"} <= set(record.curves)
        written = {f"rows/mass_{where}_{p}" for where in ("at", "beside") for p in range(3)}
        assert set(record.curves) - {"step", "tokens"} <= {
            *CURVES,
            *(written if WRITTEN & record.settings.keys() else ()),
            *(f"{kind}/layer_{layer:02d}" for kind in ("excess", "rate_030") for layer in range(2)),
        }
        # Nothing a slot's but where there is one; documents' keys only where there is such.
    assert measures_of(finding) <= measured
    assert check_stored(tmp_path / "findings") == 1


ARMS = [(name, arm.name) for name, finding in FINDINGS.items() for arm in finding.arms]
QUICKLY = [("packing", "document_pinned_bos"), ("fixed_token", "random_1_2")]


@pytest.mark.parametrize(
    ("name", "arm"),
    [pair if pair in QUICKLY else pytest.param(*pair, marks=pytest.mark.slow) for pair in ARMS],
)
def test_every_arm_composes_at_minutes_and_at_the_papers_size(name, arm):
    finding = FINDINGS[name]
    for budget in (BUDGETS["minutes"], BUDGETS["paper"]):
        found = [one for one in finding.arms_of(budget.name) if one.name == arm]
        for one in found:
            plan = planned(finding, budget, one._replace(context_of=None), 2)
            config, settings = plan.compose()
            assert (config.seed, config.data_seed) == (2, 2)
            context = settings["packing"]["context"]
            if finding.own_experiment:
                assert context == 256
            else:
                assert context == (1024 if budget.name == "minutes" else 2048)


@pytest.mark.slow
def test_a_context_is_cut_to_what_another_arm_sees(cache_dir):
    finding, budget = FINDINGS["packing"], BUDGETS["cpu"]
    places = (f"cache_dir={cache_dir}", "corpus.unit=paragraphs")
    (arm,) = (arm for arm in finding.arms if arm.context_of is not None)
    plan = planned(finding, budget, arm, 1, places)
    other, _ = planned(finding, budget, finding.arms[3], 0, places).compose(places)
    from train.data import data_of

    data = data_of(other)
    data.setup()
    config, _ = plan.compose(places)
    # (n + 1) / 2 keys under a causal mask of n, which is a multiple of 8 and at least 64.
    wanted = max(64.0, 2 * data.report.mean_keys - 1)
    assert abs(config.packing.context - wanted) <= 4 and config.packing.context % 8 == 0
    assert config.packing.context < other.packing.context
    ratio = config.packing.batch_tokens / other.packing.batch_tokens
    assert ratio == pytest.approx(1, abs=0.1)
    packing, steps = config.packing, config.trainer.max_steps
    assert tokens_of(plan.preset, plan.own) == packing.batch_tokens * steps


def test_the_compiler_forgets_models_between_runs(monkeypatch, tmp_path):
    """Past eight of them it would quietly run uncompiled."""
    seen = []
    monkeypatch.setattr(torch._dynamo, "reset", lambda: seen.append("reset"))
    monkeypatch.setattr(campaign, "run", lambda *args, **more: seen.append("run"))
    # Which refuses a folder that isn't there: there was no run.
    places = campaign.Places(tmp_path / "runs", tmp_path / "findings", False)
    plan = planned(FINDINGS["noise"], BUDGETS["cpu"], FINDINGS["noise"].arms[0], 0)
    with pytest.raises(UserError, match="no such folder"):
        campaign.make(plan, places, None)
    assert seen == ["reset", "run"]


def test_a_fault_of_one_run_stops_no_other(monkeypatch, tmp_path):
    """No mistake of the user's: a kernel that doesn't compile, a GPU without memory."""
    finding, budget = FINDINGS["noise"], BUDGETS["cpu"]
    places = campaign.Places(tmp_path / "runs", tmp_path / "findings", False)
    tasks = campaign.tasks_of(finding, budget, [0], ())
    begun = []

    def fails(plan, *args, **more):
        begun.append(plan.arm.name)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(campaign, "make", fails)
    missing = campaign.Campaign(places).run(tasks, budget)
    assert begun == ["causal", "pinned"] and not missing.waiting
    log = campaign.log_path(tasks[0].plan, places)
    assert missing.failed[0] == f"noise causal seed 0: RuntimeError, see {log}"
    assert "out of memory" in log.read_text()


class Process:
    """One that is over as soon as it is begun, or fails."""

    def __init__(self, code: int):
        self.returncode = code

    def poll(self) -> int:
        return self.returncode

    def wait(self) -> int:
        return self.returncode

    terminate = wait


def test_runs_side_by_side_are_each_begun_once_and_keep_what_they_cost(monkeypatch, tmp_path):
    finding, budget = FINDINGS["noise"], BUDGETS["minutes"]
    places = campaign.Places(tmp_path / "runs", tmp_path / "findings", True)
    tasks = campaign.tasks_of(finding, budget, range(5), ())
    made, slots = {}, []

    def start(command, log, *, slot, jobs):
        arm, seed = command[command.index("--only") + 1].split(":")
        (plan,) = (t.plan for t in tasks if (t.plan.arm.name, str(t.plan.seed)) == (arm, seed))
        slots.append(slot)
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("error: made up" if seed == "3" else "")
        if seed != "3":
            assert plan.slug not in made
            record = made_record(plan.pool, plan.own, plan.seed, {}, {})
            made[plan.slug] = replace(record, seconds=7.0)
        return Process(2 if seed == "3" else 0)

    monkeypatch.setattr(campaign, "start", start)
    monkeypatch.setattr(campaign, "record_of", lambda plan, places: made.get(plan.slug))
    monkeypatch.setattr(campaign, "visible_gpus", lambda: ["0", "1"])
    one = campaign.Campaign(places, jobs=4, seconds=1000.0)
    one._has_data = True
    missing = one.run(tasks, budget)
    assert not missing.waiting and len(made) == 8
    assert missing.failed == [f"noise {arm} seed 3: made up" for arm in ("causal", "pinned")]
    assert set(slots) == {0, 1, 2, 3} and one.pace.free == {0, 1, 2, 3}
    paths = list((places.stored / "runs").rglob("*.json"))
    assert [Record.from_json(path).seconds for path in paths] == [7.0] * 8


def test_no_run_begins_that_would_end_too_late(monkeypatch, tmp_path):
    finding, budget = FINDINGS["noise"], BUDGETS["minutes"]
    places = campaign.Places(tmp_path / "runs", tmp_path / "findings", False)
    started = []
    monkeypatch.setattr(campaign, "start", lambda *args, **more: started.append(args))
    tasks = campaign.tasks_of(finding, budget, [0], ())
    one = campaign.Campaign(places, jobs=3, seconds=budget.seconds - 1)
    assert one.run(tasks, budget) == campaign.Missing([task.plan for task in tasks], [])
    assert not started


def test_a_shorter_run_is_made_when_a_longer_one_would_end_too_late(monkeypatch, tmp_path):
    finding, budget = FINDINGS["emergence"], BUDGETS["minutes"]
    places = campaign.Places(tmp_path / "runs", tmp_path / "findings", False)
    begun = []

    def made(plan, *args, **more):
        begun.append(plan.arm.name)
        raise UserError("made up")

    monkeypatch.setattr(campaign, "make", made)
    tasks = campaign.tasks_of(finding, budget, [0], ())
    one = campaign.Campaign(places, seconds=1.1 * budget.seconds)
    missing = one.run(tasks, budget)
    assert begun == ["pinned"] and [plan.arm.name for plan in missing.waiting] == ["causal"]
    # It would be done in time if most of it had been made before.
    folder = run_dir(tasks[0].plan, places.runs)
    folder.mkdir(parents=True)
    one = campaign.Campaign(places, seconds=3.4 * budget.seconds)
    assert one.run(tasks, budget).waiting
    had = 2 * budget.seconds / campaign.NO_SLOWER
    (folder / campaign.SPENT).write_text(f"{2 * budget.seconds} {had}")
    one = campaign.Campaign(places, seconds=3.4 * budget.seconds)
    assert not one.run(tasks, budget).waiting


def test_findings_share_a_queue_and_a_run_that_both_want(monkeypatch, tmp_path):
    budget = BUDGETS["cpu"]
    places = campaign.Places(tmp_path / "runs", tmp_path / "findings", False)
    begun = []

    def made(plan, *args, **more):
        begun.append(plan.slug)
        raise UserError("made up")

    monkeypatch.setattr(campaign, "make", made)
    wanted = ("noise", "emergence", "data_amount")
    tasks = [t for n in wanted for t in campaign.tasks_of(FINDINGS[n], budget, [0, 1], ())]
    missing = campaign.Campaign(places).run(tasks, budget)
    assert len(begun) == len(set(begun)) == 8 < len(tasks) == 14
    assert begun[:2] == ["baseline_seed=0", "packing=causal_pinned_bos_seed=0"]
    assert len(missing.failed) == 8 and not missing.waiting


def test_data_that_cannot_be_used_end_a_campaign_of_several_jobs_at_once(tmp_path, capsys):
    where = ["--runs", str(tmp_path / "runs"), "--folder", str(tmp_path / "findings")]
    lost = ["--set", "corpus.paths=[nowhere.jsonl]", "--set", f"cache_dir={tmp_path / 'cache'}"]
    assert command(["noise", "--seeds", "1", "--jobs", "2", *where, *lost]) == 2
    shown = capsys.readouterr()
    assert "corpus.paths must match at least one file" in shown.err
    assert not list((tmp_path / "runs").rglob("*.log"))


def test_why_a_run_failed_is_its_own_last_word(tmp_path):
    """Not an earlier start's, to whose log it adds."""
    log = tmp_path / "run.log"
    log.write_bytes(b"at work\nerror: corpus.paths must match\n")
    assert jobs.why_failed(log, 0) == "corpus.paths must match"
    written = log.stat().st_size
    with log.open("ab") as file:
        file.write(b"killed at \xff\n")
    assert jobs.why_failed(log, written) == f"see {log}"
    assert jobs.why_failed(log, log.stat().st_size) == f"see {log}"


def test_jobs_with_a_gpu_each_share_none(monkeypatch, tmp_path):
    places = campaign.Places(tmp_path / "runs", tmp_path / "findings", False)
    monkeypatch.delenv(jobs.VISIBLE, raising=False)
    for gpus, share in ((0, 6), (1, 6), (2, 3), (4, 2), (8, 1)):
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        assert campaign.Campaign(places, jobs=6).share == share


def test_runs_at_once_share_cores_and_take_gpus_in_turn(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(jobs.os, "cpu_count", lambda: 16)
    for name in (*jobs.THREADS, jobs.VISIBLE):
        monkeypatch.delenv(name, raising=False)
    told = [jobs.environment(slot, 3) for slot in range(3)]
    assert [one[jobs.VISIBLE] for one in told] == ["0", "1", "0"]
    assert {one[name] for one in told for name in jobs.THREADS} == {"5"}
    monkeypatch.setenv(jobs.VISIBLE, "3,7")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert jobs.environment(1, 2)[jobs.VISIBLE] == "7"
    assert jobs.environment(1, 2)["OMP_NUM_THREADS"] == "1"
    monkeypatch.setenv(jobs.VISIBLE, "5")
    assert jobs.environment(1, 2)[jobs.VISIBLE] == "5"


def test_a_run_stopped_before_counts_all_its_time(monkeypatch, tmp_path):
    places = campaign.Places(tmp_path / "runs", tmp_path / "findings", False)
    plan = planned(FINDINGS["noise"], BUDGETS["cpu"], FINDINGS["noise"].arms[0], 0)
    folder = run_dir(plan, places.runs)
    folder.mkdir(parents=True)
    (folder / campaign.SPENT).write_text("30 10")
    (folder / "config.yaml").write_text("")

    def stopped(*args, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr(campaign, "run", stopped)
    with pytest.raises(KeyboardInterrupt):
        campaign.make(plan, places, None)
    cost, had = map(float, (folder / campaign.SPENT).read_text().split())
    assert 30 < cost < 60 and had == pytest.approx(10 + (cost - 30) / campaign.NO_SLOWER, abs=0.01)

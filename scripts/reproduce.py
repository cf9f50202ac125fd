"""Try a finding again: make its runs, print ours beside the paper's, and a verdict.

    python -m scripts.reproduce NAME[:SEEDS] ... --budget cpu|minutes|paper
    python -m scripts.reproduce --list [--budget B]     findings, costs, what can be told
    python -m scripts.reproduce NAME --show             what is stored, without a run or a GPU

Runs that are done aren't made again, stopped ones go on: interrupted or out of --seconds, the same
command continues. --store keeps each run as a file of 10 to 35 kB in docs/findings/runs, from where
the finding can be finished without the runs' folders, and writes table, verdicts, figure and its
data. Verdicts are by criteria that train/findings/ has in writing. Exit code 2 if a run failed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from kernels.errors import UserError, require
from train.findings import FINDINGS, Finding
from train.findings.base import INPUTS
from train.findings.budgets import BUDGETS, Budget, preset_of, seeds_of
from train.findings.store import FOLDER, require_results, results_of, stored_results
from train.mistakes import exit_code
from train.stopping import Stopped

if TYPE_CHECKING:
    from train.findings.campaign import Places
    from train.findings.store import Results


def main(arguments: list[str]) -> None:
    options = parsed(arguments)
    budget = BUDGETS[options.budget]
    if options.list:
        from train.findings.costs import list_lines

        print("\n".join(list_lines(budget, options.folder)))
        return
    require(bool(options.names), "NAME", f"must be among {', '.join(FINDINGS)}", "none")
    findings = [FINDINGS[name] for name in options.most_seeds]
    if options.show:
        for finding in findings:
            results = stored_results(finding, budget, options.folder)
            require_results(results, options.folder)
            print_title(finding, budget)
            print_results(finding, budget, results, options.folder)
        return
    if options.only is not None:
        only(findings[0], budget, options)
        return
    reproduce(findings, budget, options)


def reproduce(findings: list[Finding], budget: Budget, options: argparse.Namespace) -> None:
    """Make what is missing of all of them in one queue; print and store what there is.

    Raises ``UserError`` if a run failed, after the others.
    """
    from train.findings.campaign import Campaign, records, seeds_wanted, tasks_of

    for finding in findings:
        if options.plan or budget.name == "paper":
            print_title(finding, budget)
            print("\n".join(plan_lines(finding, budget)))
    if options.plan:
        return
    places = places_of(options)
    arms = arms_wanted(findings, budget, options.arms)
    tasks = {}
    for finding in findings:
        seeds = seeds_wanted(finding, budget, options.most_seeds[finding.name])
        every = tasks_of(finding, budget, seeds, places.extra)
        tasks[finding.name] = [task for task in every if task.plan.arm.name in arms]
    campaign = Campaign(places, jobs=options.jobs, seconds=options.seconds)
    try:
        missing = campaign.run([task for one in tasks.values() for task in one], budget)
        if missing.waiting:
            print(f"{len(missing.waiting)} runs are still to make: the same command goes on")
    finally:
        # Also of a campaign that was interrupted.
        for finding in findings:
            made = records(tasks[finding.name], places)
            if made:
                print_title(finding, budget)
                results = results_of(finding, budget, made)
                print_outcome(finding, budget, results, options)
    if missing.failed:
        raise UserError(f"{len(missing.failed)} runs failed, the first: {missing.failed[0]}")


def arms_wanted(findings: list[Finding], budget: Budget, told: str | None) -> set[str]:
    """The arms whose runs are made: those of ``told``, by default all.

    Raises ``UserError`` for a name that no finding has at this budget.
    """
    known = [arm.name for finding in findings for arm in finding.arms_of(budget.name)]
    wanted = known if told is None else told.split(",")
    for name in wanted:
        require(name in known, "--arms", f"must be among {', '.join(dict.fromkeys(known))}", name)
    return set(wanted)


def print_outcome(
    finding: Finding, budget: Budget, results: Results, options: argparse.Namespace
) -> None:
    """Ours beside the paper's; stored first, if asked for."""
    if options.store:
        from train.findings.page import store_outcomes

        # Perhaps more seeds than were asked for now.
        results = stored_results(finding, budget, options.folder)
        for path in store_outcomes(finding.name, budget, options.folder):
            print(path)
        print()
    print_results(finding, budget, results, options.folder)


def print_title(finding: Finding, budget: Budget) -> None:
    """Which finding what follows is about."""
    own = finding.own_experiment and budget.decides
    meant_for = f"runs of experiment={finding.experiment}" if own else budget.meant_for
    print(f"\n# {finding.title} ({budget.name}: {meant_for})\n")


def only(finding: Finding, budget: Budget, options: argparse.Namespace) -> None:
    """The one run that --only names, for a campaign of several jobs."""
    from train.findings.campaign import make_only

    name, _, seed = options.only.partition(":")
    arms = {arm.name: arm for arm in finding.arms_of(budget.name)}
    known = name in arms and seed.isdecimal()
    require(known, "--only", f"must be ARM:SEED, ARM among {', '.join(arms)}", options.only)
    make_only(finding, budget, arms[name], int(seed), places_of(options), options.jobs)


def print_results(finding: Finding, budget: Budget, results: Results, folder: Path) -> None:
    """Ours beside the paper's, and the verdicts."""
    from train.findings.page import stored_noise
    from train.findings.table import lines_of, outcome

    told = outcome(results, stored_noise(budget, folder))
    print(f"Claim ({finding.source}): {finding.claim}\n\nSetting: {finding.setting}.\n")
    print("\n".join(lines_of(finding, budget, told)))
    again = f"python -m scripts.reproduce {finding.name} --plan --budget {budget.name}"
    print(f"\nCriteria: {again}. Why ours differs: {folder}.md.")
    if not budget.decides:
        print(f"\nBudget {budget.name}: {budget.meant_for}.")


def plan_lines(finding: Finding, budget: Budget) -> list[str]:
    """What would be run, and by what it would be judged."""
    preset = " ".join(preset_of(finding, budget))
    seeds = len(seeds_of(finding, budget))
    lines = [
        f"every arm: {preset}, {seeds} seeds; {finding.setting}. --list tells what that costs",
        "",
    ]
    for arm in finding.arms_of(budget.name):
        cut = f" packing.context so that it sees as many keys as {arm.context_of}"
        told = ", ".join(f"{name} {value:g}" for name, value in arm.paper.items())
        lines.append(
            f"  {arm.name}: {' '.join(arm.overrides)}{cut if arm.context_of else ''}"
            + (f"  (paper: {told})" if told else "")
        )
    for claim in finding.claims_of(budget.name):
        lines += ["", f"{claim.says}", *(f"  direction: {test}" for test in claim.direction)]
        lines += [f"  magnitude: {test}" for test in claim.magnitude]
        lines += [f"  added {claim.added}"] if claim.added else []
    unknown = "; ".join(finding.unknown) or "nothing that we know of"
    return [*lines, "", INPUTS, "", f"not told by the paper: {unknown}"]


def places_of(options: argparse.Namespace) -> Places:
    """Where runs and results lie."""
    from train.findings.campaign import Places

    return Places(options.runs, options.folder, options.store, tuple(options.set))


class Parser(argparse.ArgumentParser):
    """A mistake is one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def parsed(arguments: list[str]) -> argparse.Namespace:
    """The options; raises ``UserError`` for names that aren't there."""
    parser = Parser(
        prog="python -m scripts.reproduce",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "names", nargs="*", metavar="NAME[:SEEDS]", help=f"of {', '.join(FINDINGS)}"
    )
    parser.add_argument("--budget", default="minutes", help=f"{', '.join(BUDGETS)} (%(default)s)")
    parser.add_argument("--list", action="store_true", help="what there is, and what it costs")
    parser.add_argument("--show", action="store_true", help="print what is stored")
    parser.add_argument("--plan", action="store_true", help="print arms and criteria, run nothing")
    parser.add_argument("--store", action="store_true", help="keep results in --folder")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of results (%(default)s)")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/findings"), help="of run folders (%(default)s)"
    )
    parser.add_argument("--arms", metavar="ARM,...", help="only their runs (by default all arms')")
    parser.add_argument("--seeds", type=int, help="at most so many, where a name has none")
    parser.add_argument("--seconds", type=float, help="begin no run that wouldn't be done by then")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once (%(default)s)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="where data lie, for every run: corpus.paths=[FILE], cache_dir=DIR",
    )
    parser.add_argument("--only", metavar="ARM:SEED", help="make this run and no other")
    options = parser.parse_args(arguments)
    options.most_seeds = {}
    for word in options.names:
        name, colon, count = word.partition(":")
        require(name in FINDINGS, "NAME", f"must be among {', '.join(FINDINGS)}", name)
        valid = not colon or (count.isdecimal() and int(count) >= 1)
        require(valid, f"SEEDS of {name}", "must be >= 1", count)
        options.most_seeds[name] = int(count) if colon else options.seeds
    require(
        options.budget in BUDGETS,
        "--budget",
        f"must be one of {', '.join(BUDGETS)}",
        options.budget,
    )
    told_only = next((name for name in ("list", "show", "plan") if getattr(options, name)), None)
    require(
        options.arms is None or told_only is None,
        "--arms",
        f"must be without --{told_only}, which tells of all arms",
        options.arms,
    )
    for name in ("seeds", "jobs"):
        value = getattr(options, name)
        require(value is None or value >= 1, f"--{name}", "must be >= 1", value)
    require(
        options.seconds is None or options.seconds >= 0,
        "--seconds",
        "must be >= 0",
        options.seconds,
    )
    return options


def command(arguments: list[str]) -> int:
    """Run it with these arguments; returns the exit code."""
    try:
        return exit_code(main, arguments, "interrupted: the same command goes on")
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return stopped.exit_code


if __name__ == "__main__":
    sys.exit(command(sys.argv[1:]))

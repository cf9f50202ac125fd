"""Probe every kept checkpoint of runs, or a Hugging Face model.

    python -m scripts.probe RUN [RUN ...]          runs/<experiment>/<name> folders
    python -m scripts.probe hf=FOLDER --out FILE   sinks of a causal LM, by the same definitions

What a run's folder has already is not made again: interrupted, the same command goes on, and on a
run that is still training it takes what is there. Results are in RUN/probes, read them with
``load_run(RUN).probes()``. Of a run that can't be probed one line tells why; the others go on, and
the exit code is 2.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import pandas as pd
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data.files import write_atomically
from kernels.errors import UserError, require
from train.metrics import HORIZON
from train.mistakes import MISTAKES, exit_code, tell
from train.probes import PROBES
from train.probes.of_runs import probe_run
from train.runs import load_run

SECONDS_BETWEEN_LINES = 10
"""Between lines of progress where there is no terminal for a bar."""

SHOWN = ("mass", "baseline", "rate_030", "rate_080", "rate_030_of_means")
"""Figures of a Hugging Face model that are printed."""


def main(arguments: list[str]) -> None:
    options = parsed(arguments)
    device = device_of(options.device)
    console = Console(markup=False, highlight=False, soft_wrap=True)
    models = [target.removeprefix("hf=") for target in options.targets if is_model(target)]
    runs = [target for target in options.targets if not is_model(target)]
    require(bool(runs) != bool(models), "RUN", "must be runs or one hf=FOLDER", options.targets)
    if models:
        require(len(models) == 1, "hf", "must be one folder at a time", len(models))
        for given, name in ((options.probes, "--probes"), (options.last or None, "--last")):
            rule = "must be left out for hf=FOLDER: it has one table of one checkpoint"
            require(given is None, name, rule, given)
        probe_model(models[0], options, device, console)
        return
    for given, name in ((options.texts, "--texts"), (options.out, "--out")):
        rule = "must be left out for runs: they have held-out text"
        require(given is None, name, rule, given and str(given))
    probe_runs(runs, options, device, console)


def probe_runs(targets: list[str], options, device: torch.device, console: Console) -> None:
    """Probe each run; the others go on where one can't be probed.

    Raises ``UserError`` at the end if there were such: of one run its own, else how many.
    """
    failed = 0
    for target in targets:
        try:
            probe_one(target, options, device, console)
        except MISTAKES as error:
            if len(targets) == 1:
                raise
            failed += 1
            # Some errors name the run, those of its settings and text don't.
            told = UserError(str(error) if target in str(error) else f"{target}: {error}")
            told.__cause__ = error.__cause__
            tell(told)
    if failed:
        raise UserError(f"RUN must be runs that can be probed, {failed} of {len(targets)} can't")


def probe_one(target: str, options, device: torch.device, console: Console) -> None:
    """Probe a run's checkpoints and print how many tables were made."""
    run = load_run(target)
    start = time.monotonic()
    steps = run.steps[-1:] if options.last else run.steps
    probes = options.probes or list(PROBES)
    made = with_bar(run, steps, probes, options, device, console)
    tables = len(steps) * len(probes)
    seconds = time.monotonic() - start
    there = tables - made
    done = f"{made} tables made in {seconds:.0f} s" if made else "nothing to do"
    console.print(f"{run.path}: {done}" + (f", {there} were there" if there else ""))


def parsed(arguments: list[str]) -> argparse.Namespace:
    """The options; ``probes`` as a list of names, None for all."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.probe",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("targets", nargs="+", metavar="RUN | hf=FOLDER")
    parser.add_argument("--probes", help=f"default: all ({','.join(PROBES)})")
    parser.add_argument("--rows", type=int, default=100, help="prompts of each input (%(default)s)")
    parser.add_argument("--last", action="store_true", help="the last kept checkpoint only")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument(
        "--cache-dir", type=Path, help="of text; default: the runs' own, hf: .cache"
    )
    parser.add_argument("--texts", type=Path, help="hf: jsonl or parquet with a field text")
    parser.add_argument("--out", type=Path, help="hf: parquet or csv file for all figures")
    options = parser.parse_args(arguments)
    options.probes = None if options.probes is None else options.probes.split(",")
    for name in options.probes or ():
        require(name in PROBES, "--probes", f"must be among {', '.join(PROBES)}", name)
    require(options.rows >= 1, "--rows", "must be >= 1", options.rows)
    out = options.out
    known = out is None or out.suffix in (".parquet", ".csv")
    require(known, "--out", "must end in .parquet or .csv", str(out))
    return options


def is_model(target: str) -> bool:
    return target.startswith("hf=")


def device_of(name: str) -> torch.device:
    """The device of a name; auto takes a GPU when there is one."""
    allowed = ("auto", "cpu", "cuda")
    require(name in allowed, "--device", f"must be one of {', '.join(allowed)}", name)
    has_gpu = torch.cuda.is_available()
    require(has_gpu or name != "cuda", "--device", "must be cpu where there is no GPU", name)
    return torch.device("cuda" if has_gpu and name != "cpu" else "cpu")


def with_bar(
    run, steps: list[int], probes: list[str], options, device: torch.device, console: Console
) -> int:
    """``probe_run`` with a bar on a terminal; returns how many tables were made."""
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
    hidden = not console.is_terminal
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=hidden) as progress:
        task = progress.add_task(run.name)
        told = time.monotonic()

        def advance(what: str) -> None:
            nonlocal told
            progress.update(task, advance=1, description=what)
            if hidden and time.monotonic() > told + SECONDS_BETWEEN_LINES:
                told = time.monotonic()
                console.print(f"{run.path}: {what} done")

        return probe_run(
            run,
            probes,
            rows=options.rows,
            device=device,
            steps=steps,
            cache_dir=options.cache_dir,
            begin=lambda total: progress.update(task, total=total),
            advance=advance,
        )


def probe_model(folder: str, options, device: torch.device, console: Console) -> None:
    """Write every figure to ``--out``, then print the model's sinks by input."""
    # transformers is an optional extra, and slow to import.
    from train.probes.huggingface import huggingface_sinks

    cache_dir = options.cache_dir or Path(".cache")
    table = huggingface_sinks(folder, options.texts, device, options.rows, cache_dir=cache_dir)
    if options.out is not None:
        write_table(table, options.out)
    whole = table[(table["layer"] == -1) & table["name"].isin(SHOWN) & (table["position"] == 0)]
    if whole.empty:
        console.print(
            f"no figure of the first key in {folder}: no layer lets {HORIZON} queries see it"
        )
    else:
        shown = whole.pivot(index=["input", "num_prompts"], columns="name", values="value")
        # The number of prompts beside the figures, not below the name of the index.
        shown = shown.reindex(columns=list(SHOWN)).reset_index("num_prompts")
        shown = shown.rename(columns={"num_prompts": "prompts"}).rename_axis(columns=None)
        console.print(f"first key's attention over {HORIZON} tokens in {folder}")
        console.print(shown.round(4).to_string())
    if options.out is not None:
        console.print(f"every layer and head: {options.out}")


def write_table(table: pd.DataFrame, out: Path) -> None:
    """As csv or parquet, by the file's name."""
    text = table.to_csv(index=False).encode() if out.suffix == ".csv" else None
    try:
        write_atomically(out, text or table.to_parquet(index=False))
    except OSError as error:
        raise UserError(f"--out can't be written: {error}") from error


if __name__ == "__main__":
    sys.exit(
        exit_code(main, sys.argv[1:], interrupted="interrupted: the same command goes on from here")
    )

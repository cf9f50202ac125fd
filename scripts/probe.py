"""Probe every kept checkpoint of runs, or a Hugging Face model.

    python -m scripts.probe RUN [RUN ...]          runs/<experiment>/<name> folders
    python -m scripts.probe hf=FOLDER --out FILE   sinks of a causal LM, by the same definitions

What a run's folder has already is not made again: interrupted, the same command goes on, and on a
run that is still training it takes what is there. Results are in RUN/probes, read them with
``load_run(RUN).probes()``.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data.files import write_atomically
from kernels.errors import UserError, require
from train.mistakes import exit_code
from train.probes import PROBES
from train.probes.of_runs import probe_run
from train.runs import load_run

SHOWN = ("mass", "baseline", "rate_030", "rate_080", "rate_030_of_means")
"""Figures of a Hugging Face model that are printed."""


def main(arguments: list[str]) -> None:
    options = parsed(arguments)
    device = device_of(options.device)
    console = Console(markup=False, highlight=False, soft_wrap=True)
    models = [target.removeprefix("hf=") for target in options.targets if is_model(target)]
    runs = [load_run(target) for target in options.targets if not is_model(target)]
    require(bool(runs) != bool(models), "RUN", "must be runs or one hf=FOLDER", options.targets)
    if models:
        require(len(models) == 1, "hf", "must be one folder at a time", len(models))
        probe_model(models[0], options, device, console)
        return
    for given, name in ((options.texts, "--texts"), (options.out, "--out")):
        require(given is None, name, "must be left out for runs: they have held-out text", given)
    for run in runs:
        start = time.monotonic()
        steps = run.steps[-1:] if options.last else run.steps
        made = with_bar(run, steps, options, device, console)
        tables = len(steps) * len(options.probes)
        seconds = time.monotonic() - start
        console.print(f"{run.path}: {made} of {tables} tables made in {seconds:.0f} s")


def parsed(arguments: list[str]) -> argparse.Namespace:
    """The options; ``probes`` as a list of names."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.probe",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("targets", nargs="+", metavar="RUN | hf=FOLDER")
    parser.add_argument("--probes", default=",".join(PROBES), help="default: all (%(default)s)")
    parser.add_argument("--rows", type=int, default=100, help="prompts of each input (%(default)s)")
    parser.add_argument("--last", action="store_true", help="the last kept checkpoint only")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--cache-dir", type=Path, help="of the runs' text; default: their own")
    parser.add_argument("--texts", type=Path, help="hf: jsonl or parquet with a field text")
    parser.add_argument("--out", type=Path, help="hf: parquet or csv file for all figures")
    options = parser.parse_args(arguments)
    options.probes = options.probes.split(",")
    for name in options.probes:
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


def with_bar(run, steps: list[int], options, device: torch.device, console: Console) -> int:
    """``probe_run`` with a bar on a terminal; returns how many tables were made."""
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
    hidden = not console.is_terminal
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=hidden) as progress:
        task = progress.add_task(run.name)
        return probe_run(
            run,
            options.probes,
            rows=options.rows,
            device=device,
            steps=steps,
            cache_dir=options.cache_dir,
            begin=lambda total: progress.update(task, total=total),
            advance=lambda what: progress.update(task, advance=1, description=what),
        )


def probe_model(folder: str, options, device: torch.device, console: Console) -> None:
    """Print the model's sinks by input, and write every figure to ``--out``."""
    # transformers is an optional extra, and slow to import.
    from train.probes.huggingface import huggingface_sinks

    cache_dir = options.cache_dir or Path(".cache")
    table = huggingface_sinks(folder, options.texts, device, options.rows, cache_dir=cache_dir)
    whole = table[(table["layer"] == -1) & table["name"].isin(SHOWN) & (table["position"] == 0)]
    shown = whole.pivot(index="input", columns="name", values="value")[list(SHOWN)]
    console.print(f"first key's attention over 64 tokens in {folder}, {options.rows} prompts each")
    console.print(shown.round(4).to_string())
    if options.out is None:
        return
    text = table.to_csv(index=False).encode() if options.out.suffix == ".csv" else None
    try:
        write_atomically(options.out, text or table.to_parquet(index=False))
    except OSError as error:
        raise UserError(f"--out can't be written: {error}") from error
    console.print(f"every layer and head: {options.out}")


if __name__ == "__main__":
    sys.exit(
        exit_code(main, sys.argv[1:], interrupted="interrupted: the same command goes on from here")
    )

"""One self-contained HTML page that compares runs, finished or still training.

    python -m scripts.report RUN [RUN ...] [--out FILE] [--figures DIR]

RUN is a run's folder. The page opens from disk without a network: excess mass over steps by arm,
the arms' table, mass against canonical loss, every head over the steps, norm ratios, onsets, the
settings in which the runs differ, and where the numbers come from. --figures also draws the main
curves as PNG and SVG. Prints a line a file written. Needs plotly: pip install 'sinklab[report]'.
"""

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

from data.files import write_atomically
from kernels.errors import UserError, require
from train.mistakes import exit_code
from train.report.gather import gather


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", metavar="RUN", nargs="*", type=Path, help="run folders")
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="the page to write")
    parser.add_argument("--figures", metavar="DIR", type=Path, help="also draw PNG and SVG there")
    options = parser.parse_args(arguments)
    if find_spec("plotly") is None:
        raise UserError("scripts.report needs plotly: pip install 'sinklab[report]'")
    from train.report.page import render
    from train.report.record import draw_record

    out = options.out
    require(out.absolute().parent.is_dir(), "--out", "must lie in an existing folder", str(out))
    require(not out.is_dir(), "--out", "must be a file", str(out))
    folder = options.figures
    require(
        folder is None or folder.is_dir() or not folder.exists(),
        "--figures",
        "must be a folder",
        str(folder),
    )
    runs, arms = gather(options.runs)
    write_atomically(out, render(runs, arms).encode())
    print(out)
    if folder is not None:
        for path in draw_record(arms, folder):
            print(path)


def command(arguments: list[str]) -> int:
    """Run it with these arguments; returns the exit code."""
    return exit_code(main, arguments)


if __name__ == "__main__":
    sys.exit(command(sys.argv[1:]))

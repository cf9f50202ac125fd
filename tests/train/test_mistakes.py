"""How commands end whose output nobody reads any more."""

import signal
import subprocess
import sys

import pytest

from train.mistakes import exit_code

PRINTS = """
import sys
from train.mistakes import exit_code

def main(arguments):
    for _ in range(int(arguments[0])):
        print("x" * 999)

sys.exit(exit_code(main, sys.argv[1:]))
"""


@pytest.mark.parametrize("lines", [1, 1000])
def test_a_reader_that_has_seen_enough_is_no_error(lines):
    """Of much, which breaks while it is printed, and of little, which breaks at the end."""
    command = [sys.executable, "-c", PRINTS, str(lines)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        error = process.stderr.read()
    assert error == b""
    assert process.returncode == 128 + signal.SIGPIPE


def test_another_pipe_that_breaks_is_one():
    def main(arguments):
        raise BrokenPipeError("a worker's")

    with pytest.raises(BrokenPipeError, match="a worker's"):
        exit_code(main, [])

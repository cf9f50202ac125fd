"""Findings: the papers' central claims, tried again in minutes of one GPU, with seeds.

base.py        what a finding is made of: arms, measures, the paper's numbers, criteria
<name>.py      one finding each: a new one is its file and its line in ``FINDINGS``
budgets.py     cpu, minutes, paper: what a run of an arm is there
campaign.py    makes the runs that are missing, within a time; jobs.py, pace.py: several at once
measures.py    what is kept of a run: some 20 kB that are enough for all that follows
store.py       those records on disk; statistics.py: what their noise can tell
verdicts.py    holds, holds in direction, doesn't hold, not decided, still rising
table.py       ours beside the paper's; draw.py: the figures; page.py: docs/findings.md
"""

from train.findings.attention_ops import ATTENTION_OPS
from train.findings.backcopy import BACKCOPY
from train.findings.base import Finding
from train.findings.data_amount import DATA_AMOUNT
from train.findings.emergence import EMERGENCE
from train.findings.fixed_token import FIXED_TOKEN
from train.findings.noise import NOISE
from train.findings.packing import PACKING

__all__ = ["FINDINGS", "Finding"]

FINDINGS: dict[str, Finding] = {
    finding.name: finding
    for finding in (NOISE, PACKING, EMERGENCE, ATTENTION_OPS, BACKCOPY, FIXED_TOKEN, DATA_AMOUNT)
}
"""By name: what ``python -m scripts.reproduce`` knows; the noise first, all rest on it."""

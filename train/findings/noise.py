"""How much runs differ that differ in their seeds alone: what every other verdict rests on."""

from train.findings.base import RATE, Arm, Column, Finding, Panel

NOISE = Finding(
    name="noise",
    title="Seed-to-seed spread of the baseline",
    claim=(
        "None of a paper: they report one seed a setting. Eight seeds of the baseline, with a "
        "pinned BOS and without a BOS, tell the smallest effect that other findings can tell."
    ),
    source="no paper: 2504.02732, 2410.10781 and 2603.06591 have one seed a setting",
    setting="the minutes preset as it is, and with a pinned BOS",
    aggregation=RATE,
    arms=(Arm("causal", ("packing=causal",)), Arm("pinned", ("packing=causal_pinned_bos",))),
    columns=(
        Column("natural/excess", "excess mass, T = 64"),
        Column("natural/mass", "mass"),
        Column("eos_text/excess", "excess mass, EOS + text"),
        Column("natural/rate_030", "rate, eps 0.3", percent=True),
        Column("natural/rate_080", "rate, eps 0.8", percent=True),
        Column("onset/onset_step", "onset, step"),
        Column("canonical_loss", "canonical loss, nats"),
    ),
    claims=(),
    panels=(
        Panel("points", ("natural/excess",), "Every seed", "excess mass, T = 64"),
        Panel("curves", ("excess",), "Training rows"),
    ),
    experiment="gu60m",
    seeds=8,
)

"""A sink that forms in CPU minutes, and what takes it over (arXiv 2410.13835, 2410.10781)."""

from train.findings.attention_ops import (
    BASE,
    EXCESS,
    FIRST,
    SLOT,
    VALUE,
    falls,
    taken_over,
)
from train.findings.base import RATE, Arm, AtLeast, AtMost, Claim, Column, Finding, Of, Panel

SEEN = (
    "2026-11-30, when seeds 0 to 2 of all arms had been seen, as a test of what attention_ops had "
    "shown; seeds 3 to 5 came after"
)
"""When the finding was made up; what its slots and its gate are held to is attention_ops's."""

DRAINED = 0.5
"""A value norm, first over others, under which a value is called drained."""

BACKCOPY = Finding(
    name="backcopy",
    title="A sink in CPU minutes, and what takes it over",
    claim=(
        "A head that has nothing to do rests on the first token, whose value drains; a learned "
        "key, with or without a value, or a learned logit takes that sink over, and an output gate "
        "does without one."
    ),
    source=(
        "arXiv 2410.13835 for the task and the drained value; 2410.10781, Table 4, 2508.10925 "
        "(sink logit) and 2505.06708 (gate) for what takes it over, on text"
    ),
    setting=(
        "Bigram-Backcopy (experiment=bigram_backcopy), one layer, one head, 800 steps, a minute of "
        "a CPU a run, the attention's kind varied; the first token is the BOS with which each "
        "document begins"
    ),
    aggregation=f"{RATE}; sigmoid by the proxy of 2410.10781, |weight| over the query's sum",
    arms=(
        Arm(BASE),
        Arm("k_bias", ("attention=k_bias",)),
        Arm("kv_bias", ("attention=kv_bias",)),
        Arm("sink_logit", ("attention=sink_logit",)),
        Arm("gated", ("attention=gated",)),
        Arm("sigmoid", ("attention=sigmoid",)),
        Arm("sigmoid_normalized", ("attention=sigmoid", "attention.normalize=true")),
    ),
    columns=(
        Column(EXCESS, "excess mass, T = 64"),
        Column(FIRST, "first token's rate", percent=True),
        Column("natural/null_excess", "slot's excess mass"),
        Column(SLOT, "slot's rate", percent=True),
        Column(VALUE, "value norm, first / others"),
        Column("canonical_loss", "canonical loss, nats"),
    ),
    claims=(
        Claim(
            says="softmax rests on the first token, a tenth above uniform attention at least, and "
            "its value drains (no number in the paper)",
            direction=(
                AtLeast(Of(BASE, EXCESS), plus=0.1),
                AtMost(Of(BASE, VALUE), plus=DRAINED),
            ),
            added=SEEN,
        ),
        taken_over("k_bias", "on text 18.18 -> 0.00 %, slot 73.34 %", added=SEEN),
        taken_over("kv_bias", "on text 18.18 -> 0.04 %, slot 72.76 %", added=SEEN),
        taken_over("sink_logit", "no number in the paper", added=SEEN),
        falls("gated", "on text, attention to the first token 0.467 -> 0.048", added=SEEN),
        Claim(
            says="sigmoid, without normalisation: the proxy reads a sink, a tenth above uniform "
            "attention at least, and no value drains (an observation of ours)",
            direction=(
                AtLeast(Of("sigmoid", EXCESS), plus=0.1),
                AtLeast(Of("sigmoid", VALUE), plus=DRAINED),
            ),
            added=SEEN,
        ),
    ),
    panels=(
        Panel(
            "points", (EXCESS, "natural/null_excess"), "Where the sink is", "excess mass, T = 64"
        ),
        Panel("points", (VALUE,), "The first token's value", "norm, first / others"),
    ),
    experiment="bigram_backcopy",
    own_experiment=True,
    seeds=6,
    unknown=("the paper's task has other sizes, and one to three layers",),
)

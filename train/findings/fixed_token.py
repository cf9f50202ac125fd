"""A token fixed in the data becomes the sink where it stands (arXiv 2410.10781, section 5)."""

from train.findings.base import RATE, Arm, AtLeast, Claim, Column, Finding, Of, Panel


def at(position: int) -> str:
    return f"written/rate_030_at_{position}"


def beside(position: int) -> str:
    return f"written/rate_030_beside_{position}"


SINKS = {0: 0.7411, 1: 0.6903, 2: 0.6964}
"""The paper's Sink_p by position from 0."""


def fixed(position: int) -> str:
    return f"fixed_{position + 1}"


FIXED_TOKEN = Finding(
    name="fixed_token",
    title="A fixed token, and random first tokens",
    claim=(
        "A token fixed at position 1, 2 or 3 of every row takes the sink there, and other "
        "positions have none; random first tokens move the sink: with the first two random it is "
        "at position 2."
    ),
    source="arXiv 2410.10781, section 5 and Table 10; one seed",
    setting=(
        "the baseline without a BOS; the token `e` written at position p (1, 2, 3 as the paper "
        "counts), or tokens drawn anew for every row; prompts have them written in too"
    ),
    aggregation=f"{RATE}; a later key's alpha over the queries that see it, first 16 keys",
    arms=(
        Arm("causal", ("packing=causal",)),
        *(
            Arm(
                fixed(position),
                (
                    "packing=causal",
                    f"packing.fixed_position={position}",
                    "packing.fixed_token=e",
                ),
                {at(position): paper},
            )
            for position, paper in SINKS.items()
        ),
        Arm("random_1", ("packing=causal", "packing.random_positions=[0]"), {at(0): 0.2703}),
        Arm(
            "random_1_2",
            ("packing=causal", "packing.random_positions=[0,1]"),
            {at(0): 0.0198, at(1): 0.1408},
        ),
        Arm("random_2", ("packing=causal", "packing.random_positions=[1]"), {at(0): 0.2099}),
    ),
    columns=(
        Column("text/rate_030", "Sink_1 of plain text", percent=True),
        *(Column(at(p), f"Sink_{p + 1}", percent=True) for p in SINKS),
        *(Column(beside(p), f"largest beside {p + 1}", percent=True) for p in SINKS),
        Column("own_loss", "held-out loss: rows as trained", table=1),
        Column("canonical_loss", "canonical loss: rows without the token", table=1),
        Column("text/loss", "loss of plain text", table=1),
    ),
    claims=(
        *(
            Claim(
                says=f"a token fixed at position {position + 1} is the sink, others are none "
                f"(Sink_{position + 1} {paper:.2%})",
                direction=(
                    AtLeast(
                        Of(fixed(position), at(position)),
                        Of(fixed(position), beside(position)),
                        strict=True,
                    ),
                ),
                magnitude=(
                    AtLeast(
                        Of(fixed(position), at(position)),
                        Of(fixed(position), beside(position)),
                        times=5.0,
                    ),
                ),
                effect=(
                    Of(fixed(position), at(position)),
                    Of(fixed(position), beside(position)),
                ),
                paper_effect=paper,
            )
            for position, paper in SINKS.items()
        ),
        Claim(
            says="with the first two tokens random the sink is at position 2 (14.08 against 1.98 "
            "%)",
            direction=(AtLeast(Of("random_1_2", at(1)), Of("random_1_2", at(0)), strict=True),),
            effect=(Of("random_1_2", at(1)), Of("random_1_2", at(0))),
            paper_effect=0.121,
        ),
    ),
    panels=(
        *(
            Panel("points", (at(p), beside(p)), f"Position {p + 1}", "rate, eps 0.3, T = 64", arms)
            for p, arms in enumerate(
                (
                    ("fixed_1", "random_1", "random_2"),
                    ("fixed_2", "random_1_2"),
                    ("fixed_3",),
                )
            )
        ),
    ),
    experiment="gu60m",
    unknown=("which token was fixed (the released code writes id 1)",),
)

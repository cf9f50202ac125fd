"""Sinks need enough unique text (arXiv 2410.10781, Figs. 5 and 28)."""

from train.findings.base import RATE, Arm, AtLeast, Claim, Column, Finding, Of, Panel


def arms(
    amounts: dict[str, int | None],
    paper: dict[str, float] | None = None,
    packing: str = "causal_pinned_bos",
) -> tuple[Arm, ...]:
    """An arm an amount of unique tokens; None is all."""
    return tuple(
        Arm(
            name,
            (f"packing={packing}",)
            + (() if amount is None else (f"corpus.unique_tokens={amount}",)),
            {"natural/rate_030": paper[name]} if paper and name in paper else {},
        )
        for name, amount in amounts.items()
    )


ALL = "all"


def less(smallest: str) -> Claim:
    """Of the arm with the least unique text, whose amount is the budget's."""
    return Claim(
        says="little unique text, over and over, makes less of a sink than all there is",
        direction=(
            AtLeast(Of(ALL, "natural/excess"), Of(smallest, "natural/excess"), strict=True),
        ),
        effect=(Of(ALL, "natural/excess"), Of(smallest, "natural/excess")),
    )


DATA_AMOUNT = Finding(
    name="data_amount",
    title="Unique text at fixed steps",
    claim=(
        "At the same number of steps, sinks shrink with the amount of unique text: below 1 % of "
        "heads with 50M and 100M tokens, from 200M on they are there; not due to overfitting."
    ),
    source="arXiv 2410.10781, Figs. 5 and 28; one seed",
    setting=(
        "the baseline with a pinned BOS (the paper's has none, nor has ours with the budget paper) "
        "on 5M to all unique tokens, over and over, at fixed steps"
    ),
    aggregation=RATE,
    arms=arms(
        {
            "unique_5M": 5_000_000,
            "unique_10M": 10_000_000,
            "unique_20M": 20_000_000,
            ALL: None,
        }
    ),
    arms_at={
        "cpu": arms({"unique_20K": 20_000, "unique_200K": 200_000, ALL: None}),
        "paper": arms(
            {
                "unique_50M": 50_000_000,
                "unique_100M": 100_000_000,
                "unique_200M": 200_000_000,
                "unique_500M": 500_000_000,
                "unique_2500M": 2_500_000_000,
                ALL: None,
            },
            {ALL: 0.1818},
            packing="causal",
        ),
    },
    columns=(
        Column("natural/excess", "excess mass, T = 64"),
        Column("natural/rate_030", "rate, eps 0.3", percent=True),
        Column("passes", "passes"),
        Column("train_loss", "training loss"),
        Column("own_loss", "held-out loss"),
        Column("gap", "gap"),
        Column("canonical_loss", "canonical loss, nats"),
    ),
    claims=(less("unique_5M"), less("unique_20K"), less("unique_50M")),
    panels=(
        Panel("points", ("natural/excess",), "By unique text", "excess mass, T = 64"),
        Panel("points", ("gap",), "Overfitting", "held-out - training loss, nats"),
    ),
    experiment="gu60m",
    unknown=("the amounts between those of the text",),
    undecided=(
        "the paper's claim starts at 200M unique tokens, and the corpus has about half of that"
    ),
)

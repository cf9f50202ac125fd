"""When a sink appears, and in which layers (arXiv 2410.10781, Fig. 4; 2606.02378)."""

from train.findings.base import RATE, Arm, AtLeast, AtMost, Claim, Column, Finding, Of, Panel


def arms(*longer: str) -> tuple[Arm, ...]:
    """Both baselines; ``longer``: overrides of the one whose sink is slow."""
    return (
        Arm("causal", ("packing=causal", *longer), {"natural/rate_030": 0.1818}),
        Arm("pinned", ("packing=causal_pinned_bos",)),
    )


def emerges(arm: str) -> Claim:
    """An onset in every seed, at about the paper's sum of learning rates."""
    return Claim(
        says=f"{arm}: a sink isn't there from the start, and emerges early (steps 1k to 2k of 20k)",
        direction=(
            AtMost(Of(arm, "onset/censored")),
            # Not there from the start: the record before the onset is one.
            AtLeast(Of(arm, "onset/onset_step"), Of(arm, "onset/spacing_step"), strict=True),
        ),
        # Steps at the paper's rate of 4e-4 sum to 0.4 to 0.8; to within a factor of two.
        magnitude=(
            AtLeast(Of(arm, "onset/onset_lr_sum"), plus=0.2),
            AtMost(Of(arm, "onset/onset_lr_sum"), plus=1.6),
        ),
    )


EMERGENCE = Finding(
    name="emergence",
    title="When and where sinks emerge",
    claim=(
        "Sinks aren't there from the start: they emerge after some optimisation, between 1k and 2k "
        "of 20k steps (about 7 % of heads at 5k, 18 % at the end), and in later layers: layers 0 "
        "and 1 never sink."
    ),
    source="arXiv 2410.10781, Fig. 4 and 28; 2606.02378 for layers; one seed each",
    setting=(
        "the baseline without a BOS, as in the paper (with the budget minutes for four times the "
        "steps: its sink may be slow), and with a pinned BOS; onset: the first record from which "
        "the excess mass stays at or above half of its final value and more than two heads "
        "stay above 0.3 (train/onset.py), with its distance to the record before and a 95 % "
        "interval over heads"
    ),
    aggregation=f"{RATE}; curves by step: the rows trained on, their first 64 queries",
    arms=arms("trainer.max_steps=6000"),
    arms_at={"cpu": arms(), "paper": arms()},
    columns=(
        Column("natural/excess", "excess mass, T = 64"),
        Column("natural/rate_030", "rate, eps 0.3", percent=True),
        Column("onset/onset_step", "onset, step"),
        Column("onset/spacing_step", "records apart, steps"),
        Column("onset/onset_lr_sum", "onset, summed learning rate"),
        Column("onset/sink_heads", "heads past their onset"),
        Column("onset/censored_draws", "draws without onset", percent=True),
    ),
    claims=(
        emerges("causal"),
        emerges("pinned"),
        *(
            Claim(
                says=f"{arm}: layers 0 and 1 never sink",
                # A run without a sink says nothing about its layers: it has no such step.
                direction=(
                    AtLeast(Of(arm, "onset/onset_step")),
                    AtMost(Of(arm, "onset/heads_of_layers_0_1")),
                ),
            )
            for arm in ("causal", "pinned")
        ),
    ),
    panels=(
        Panel("curves", ("excess",), "Training rows"),
        Panel("points", ("onset/onset_step",), "Onset of every seed", "step"),
        *(
            Panel("layers", ("excess",), f"{arm}, by layer", arms=(arm,))
            for arm in ("causal", "pinned")
        ),
    ),
    experiment="gu60m",
    unknown=("the paper's text says cosine; its released configurations keep the rate constant",),
)

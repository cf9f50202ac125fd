"""Packing, mask and BOS decide where the sink is (arXiv 2504.02732, Table 2)."""

from train.findings.base import RATE, Arm, AtLeast, AtMost, Claim, Column, Finding, Near, Of, Panel

TEXT, BOS = "text/excess", "bos_text/excess"

ROW_RISE = "row_text/loss - row_{}/loss"
"""What a row loses without the token in front of it that {} has."""

COST = "bos_text/loss - text/loss"
"""Nats a label that a BOS in front of a text costs on prompts: text/cost_bos, of older runs too."""

ARMS = (
    Arm("causal", ("packing=causal",), {"bos_text/rate_030": 0.6510, "text/rate_030": 0.6515}),
    Arm("causal_document_bos", ("packing=causal_document_bos",)),
    Arm(
        "causal_pinned_bos",
        ("packing=causal_pinned_bos",),
        {"bos_text/rate_030": 0.9084, "text/rate_030": 0.0005},
    ),
    Arm("document", ("packing=document",), {"text/rate_030": 0.2823}),
    Arm(
        "document_document_bos",
        ("packing=document_document_bos",),
        {"bos_text/rate_030": 0.8333, "text/rate_030": 0.5024},
    ),
    Arm(
        "document_pinned_bos",
        ("packing=document_pinned_bos",),
        {"bos_text/rate_030": 0.9056, "text/rate_030": 0.0},
    ),
    # A document mask also hides keys: the same number of them without it,
    Arm("causal_fewer_keys", ("packing=causal",), context_of="document"),
    # and both masks where most rows lie in one document, so that it hides few.
    Arm("causal_long", ("packing=causal", "corpus.min_document_tokens=1024")),
    Arm("document_long", ("packing=document", "corpus.min_document_tokens=1024")),
)

PRESETS = tuple(arm.name for arm in ARMS if arm.overrides == (f"packing={arm.name}",))
"""The arms that are a preset of packing and no more: not the controls."""

UNTIED = ("packing=causal", "model.tie_embeddings=false")
LONGER = "trainer.max_steps=6000"

# What a BOS is to a model that never saw it: its embedding, which tying makes an answer's too.
EMBEDDINGS = (
    Arm("causal_untied", UNTIED),
    Arm("causal_longer", ("packing=causal", LONGER)),
    Arm("causal_untied_longer", (*UNTIED, LONGER)),
)


def collapse(arm: str, paper: str) -> Claim:
    """A model that was trained with a pinned BOS without it."""
    return Claim(
        says=f"{arm}: without its BOS the sink is gone and the loss rises ({paper})",
        direction=(
            AtMost(Of(arm, TEXT), Of(arm, BOS), strict=True),
            AtLeast(Of(arm, "text/loss"), Of(arm, "bos_text/loss"), strict=True),
        ),
        magnitude=(AtMost(Of(arm, TEXT), Of(arm, BOS), times=0.25),),
        effect=(Of(arm, BOS), Of(arm, TEXT)),
        paper_effect=0.9079 if arm == "causal_pinned_bos" else 0.9056,
    )


def unmoved_on_prompts(
    arm: str, prompt: str, token: str, paper: str = "", added: str | None = None
) -> Claim:
    """A model for which position 0 means nothing, with a token there and without it."""
    return Claim(
        says=f"{arm} doesn't care whether {token} is there, on 64-token prompts{paper}",
        direction=(Near(Of(arm, "text/loss"), Of(arm, f"{prompt}/loss"), plus=0.05),),
        added=added,
    )


def unmoved(arm: str, prompt: str, token: str, paper: str = "") -> tuple[Claim, Claim]:
    """The same, and on whole rows of text, as a validation loss is. A row has sixteen times the
    labels of a prompt, so there it is held against what the pinned model loses too."""
    rise, pinned = ROW_RISE.format(prompt), Of("causal_pinned_bos", ROW_RISE.format("bos_text"))
    return (
        unmoved_on_prompts(arm, prompt, token, paper),
        Claim(
            says=f"{arm} doesn't care whether {token} is there, on rows of the context: to 0.05 "
            f"nats, and to a quarter of what the pinned model loses without its BOS{paper}",
            direction=(Near(Of(arm, "row_text/loss"), Of(arm, f"row_{prompt}/loss"), plus=0.05),),
            magnitude=(
                AtMost(Of(arm, rise), pinned, times=0.25),
                AtLeast(Of(arm, rise), pinned, times=-0.25),
            ),
            added=SEEN,
        ),
    )


SEEN = (
    "2026-11-30, when seven seeds of the causal model had been seen on prompts, where a BOS "
    "changes the loss by 0.01 to 0.14 nats and an EOS by 0.2; the quarter when three seeds had "
    "been seen on rows"
)
"""When the claims on rows were made up."""


def masked(unmasked: str, document: str, what: str) -> Claim:
    """The document mask without a BOS against the causal one."""
    return Claim(
        says=f"the document mask alone lowers the sink{what} (65.15 -> 28.23 %)",
        direction=(AtLeast(Of(unmasked, TEXT), Of(document, TEXT), strict=True),),
        effect=(Of(unmasked, TEXT), Of(document, TEXT)),
        paper_effect=0.3692,
    )


SEEN_UNTIED = (
    "2026-12-01, when causal's BOS had been seen with noise in its place in five seeds (0 to 4), "
    "and causal_untied's in four (0, 1, 3, 4), two of which it changed by more than 0.05, downwards"
)
"""When the claims on an unseen BOS's embedding were made up."""


def cheap(arm: str, cost: str, than: Of, says: str, added: str = "") -> Claim:
    """A BOS in front of prompts costs less than a tied one that wasn't seen, and little.

    arm, cost: the measure of what it costs. than: what the tied one does. says: which BOS it is.
    added: what had been seen beside ``SEEN_UNTIED``.
    """
    return Claim(
        says=f"{says} costs less than {than.arm}'s, and 0.05 nats at most, on 64-token prompts",
        direction=(AtMost(Of(arm, cost), than, strict=True),),
        magnitude=(AtMost(Of(arm, cost), plus=0.05),),
        effect=(than, Of(arm, cost)),
        added=SEEN_UNTIED + added,
    )


SEEN_ALL = "2026-12-01, when all its seeds had been seen"
"""When what was asked of causal was asked of untied models too."""

UNPINNED = {
    "causal": "which hasn't seen a BOS (90.84 against 65.10 %)",
    "causal_document_bos": "which has seen one at every document's start",
}


def above(unpinned: str, what: str) -> Claim:
    """The pinned model with its BOS against one that never saw it in a fixed place, on the same
    prompts, and on those without a BOS where that isn't trained."""
    prompts = (BOS, TEXT) if unpinned == "causal" else (BOS,)
    rate = "bos_text/rate_030"
    pinned = "causal_pinned_bos"
    return Claim(
        says=f"with its BOS the pinned model sinks more than {unpinned}, {what}",
        direction=tuple(
            AtLeast(Of(pinned, BOS), Of(unpinned, prompt), every=True, strict=True)
            for prompt in prompts
        ),
        magnitude=(AtLeast(Of(pinned, rate), Of(unpinned, rate), times=1.39),)
        if unpinned == "causal"
        else (),
        effect=(Of(pinned, BOS), Of(unpinned, BOS)),
        paper_effect=0.2574,
    )


PACKING = Finding(
    name="packing",
    title="Packing, mask and BOS",
    claim=(
        "A BOS pinned at position 0 in training becomes the sink, and a model without it then has "
        "none and a much larger loss; a model that never saw a fixed BOS doesn't care; documents "
        "masked from each other have sinks at their own starts."
    ),
    source="arXiv 2504.02732, Table 2; one seed",
    setting=(
        "six packings of the same documents in the same order, evaluated on the same text with a "
        "BOS in front (bos_text), without (text) and with an EOS in front (eos_text); controls for "
        "how many keys a query sees. Models trained without a BOS don't know the one of bos_text; "
        "the text of the arms with long documents alone is of long documents too, and rows of "
        "causal_fewer_keys are shorter than the others'; causal_untied has its own unembedding "
        "(3.1M weights more), and the longer arms have 6,000 steps. Without a BOS the sink on "
        "plain text is hardly larger than noise at the budget minutes (the noise finding), so a "
        "mask has next to nothing to take from it there"
    ),
    aggregation=f"{RATE}; the paper's eps and aggregation for Table 2 aren't visible",
    arms=(*ARMS, *EMBEDDINGS),
    # The paper's preset ties nothing, and to a check of the machinery lengths mean nothing.
    arms_at={"cpu": (*ARMS, EMBEDDINGS[0]), "paper": ARMS},
    columns=(
        Column("bos_text/excess", "excess, BOS + text"),
        Column("text/excess", "excess, text"),
        Column("eos_text/excess", "excess, EOS + text"),
        Column("bos_text/rate_030", "rate, BOS + text", percent=True),
        Column("text/rate_030", "rate, text", percent=True),
        Column("bos_text/loss", "loss, BOS + text", table=1),
        Column("text/loss", "loss, text", table=1),
        Column("eos_text/loss", "loss, EOS + text", table=1),
        Column("row_bos_text/loss", "loss of a row, BOS + text", table=1),
        Column("row_text/loss", "loss of a row, text", table=1),
        Column("documents/start_rate_030", "rate at document starts", percent=True, table=2),
        Column("documents/inner_rate_030", "rate at offsets 8-63", percent=True, table=2),
        Column("mean_keys", "keys a query sees", table=2),
        Column("passes", "passes", table=2),
        Column(COST, "cost of a BOS, nats", table=3),
        Column("text/cost_token", "of a token of text", table=3),
        Column("text/cost_noise", "of a BOS that is noise", table=3),
        Column("text/cost_shared", "of one that is text's mean", table=3),
        Column("text/bos_cosine", "cosine, BOS and text's mean", table=3),
        Column("text/bos_length", "length, BOS / text", table=3),
    ),
    claims=(
        *(above(unpinned, what) for unpinned, what in UNPINNED.items()),
        collapse("causal_pinned_bos", "90.84 -> 0.05 %, loss 2.69 -> 7.56"),
        collapse("document_pinned_bos", "90.56 -> 0.00 %, loss 2.67 -> 7.78"),
        *unmoved("causal", "bos_text", "a BOS", " (loss 2.69 and 2.70)"),
        cheap(
            "causal",
            "text/cost_noise",
            Of("causal", "text/cost_bos"),
            "with noise of the same length for its embedding a BOS",
        ),
        cheap(
            "causal_untied",
            "text/cost_bos",
            Of("causal", "text/cost_bos"),
            "an unseen BOS whose embedding isn't tied",
        ),
        cheap(
            "causal_untied_longer",
            COST,
            Of("causal_longer", COST),
            "after 6,000 steps an unseen BOS whose embedding isn't tied",
            "; of causal_longer in three (0 to 2), of causal_untied_longer in none",
        ),
        *(
            unmoved_on_prompts(arm, "bos_text", "a BOS", added=SEEN_ALL)
            for arm in ("causal_untied", "causal_untied_longer")
        ),
        *unmoved("causal_document_bos", "bos_text", "a BOS"),
        # An unseen BOS tells nothing of what follows; an EOS tells that a document begins.
        *unmoved("causal", "eos_text", "the EOS, which it knows,"),
        Claim(
            says="document_document_bos has its sinks at document starts",
            direction=(
                AtLeast(
                    Of("document_document_bos", "documents/start_rate_030"),
                    Of("document_document_bos", "documents/inner_rate_030"),
                    strict=True,
                ),
            ),
            magnitude=(
                AtLeast(
                    Of("document_document_bos", "documents/start_rate_030"),
                    Of("document_document_bos", "documents/inner_rate_030"),
                    times=3.0,
                ),
            ),
            effect=(
                Of("document_document_bos", "documents/start_rate_030"),
                Of("document_document_bos", "documents/inner_rate_030"),
            ),
        ),
        masked("causal", "document", ""),
        masked("causal_fewer_keys", "document", ", with as few keys under both masks"),
        masked("causal_long", "document_long", ", on documents of 1024 tokens or more"),
    ),
    panels=(
        Panel(
            "points",
            ("bos_text/excess", "text/excess"),
            "First key, 64-token prompts",
            "excess mass, T = 64",
            arms=tuple(arm.name for arm in ARMS),
        ),
        # Of the controls nothing is claimed over steps.
        Panel("curves", ("excess",), "Training rows", arms=PRESETS),
        Panel(
            "points",
            (COST, "text/cost_noise"),
            "An unseen BOS (longer: 6,000 steps)",
            "nats that it costs on 64-token prompts",
            arms=("causal", *(arm.name for arm in EMBEDDINGS)),
        ),
    ),
    experiment="barbero120m",
    unknown=(
        "width, depth, heads, learning rate, batch and data of the 120M model",
        "eps of Table 2, and whether EOS was used",
        "whether the first two rows are one model or two",
    ),
)

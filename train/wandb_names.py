"""What a metric of ``metrics.csv`` is called in W&B, and which ones go there by default.

W&B makes a panel section of a key's first segment. Metrics keep their names but for those by layer,
which would drown the rest of their section: ``sink/mass/layer_03`` is
``layers/sink/mass/layer_03`` there. Pictures are in ``figures/``. Of a sink's many aggregations
only the headline ones are sent, so that the first page has at most ``MAX_SCALARS`` keys.
"""

import re

MAX_SCALARS = 40
"""Scalar keys that the default run shows outside of ``layers/``."""

LAYERS = "layers"
"""The section of metrics by layer."""

FIGURES = "figures"
"""The section of pictures."""

SENT_AGGREGATIONS = ("mass", "excess", "rate_030")
"""Of every kind of key and every probe; those of ``sink/`` in ``SENT_OF_SINK`` too."""

SENT_OF_SINK = ("baseline", "rate_080", "rate_030_of_means", "rate_030_from_layer_2")

_BY_LAYER = re.compile(r"/layer_\d+$")
_AGGREGATION = re.compile(
    r"(sink\w*|probe/\w+(?:/\w+)?)/(?:row_|document_|null_|of_keys_)?"
    r"(mass|baseline|excess|rate_\d{3}(_of_means|_from_layer_\d+)?)"
)


def wandb_key(name: str, *, everything: bool = False) -> str | None:
    """The W&B key of the metric ``name``; None if it isn't sent.

    everything: send every aggregation and threshold.
    """
    if _BY_LAYER.search(name):
        return f"{LAYERS}/{name}"
    match = _AGGREGATION.fullmatch(name)
    if match is None or everything or match[2] in SENT_AGGREGATIONS:
        return name
    return name if match[1] == "sink" and match[2] in SENT_OF_SINK else None


def layer_keys(name: str, num_layers: int) -> list[str]:
    """W&B keys of the metric ``name`` in the layers 0 ... num_layers - 1."""
    return [f"{LAYERS}/{name}/layer_{layer:02d}" for layer in range(num_layers)]


def heads_key(probe: str) -> str:
    """W&B key of the picture of a T=64 probe by layer and head; probe: ``text``, ``bos_text``."""
    return f"{FIGURES}/heads_t64_{probe}"

"""What the first position is worth: losses with BOS, without, and with position 0 hidden.

Nats a label on 64-token prompts, always on the same labels (text tokens 2 to 63):

    loss                of ``text``, ``bos_text`` and ``eos_text``; and of ``row_text`` and so on,
                        rows of the run's n tokens, on text tokens 2 to n - 1
    loss_hidden_first   with key 0 hidden, in every layer, from every later query while it is still
                        there: what the sink is worth without the tokens moving or a token missing
    cost_hidden_first   the difference, both through the reference attention
    cost_without_bos    loss of text - loss of bos_text (input ``text``): deleting the BOS, which
                        also takes the model away from what it has seen in training
                        (arXiv 2504.02732, tables 2 and 3)

A model that was trained without BOS doesn't know it: its ``bos_text`` says little, its ``eos_text``
whether it misses a delimiter that it knows. Where the mass goes when key 0 is hidden is
``interventions``' matter.

A prompt's loss is mostly that of a document's beginning, which a delimiter gives away: there even a
model for which position 0 means nothing has use of one. Of a whole row's loss that is a small part.

Cost: three forward passes of each prompt, two of them through the reference attention; one of rows.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from models.batch import IGNORE_LABEL
from models.decoder import Decoder
from train.probes.base import Finding, ProbeInputs
from train.probes.trace import cut, everywhere, hide_first


@torch.no_grad()
def probe_losses(decoder: Decoder, inputs: ProbeInputs) -> Iterator[Finding]:
    """See the module."""
    plain = {}
    for name in ("text", "bos_text", "eos_text"):
        if name not in inputs.prompts:
            continue
        batch = inputs.prompts[name]
        num_labels = int((batch.labels_BT != IGNORE_LABEL).sum())
        plain[name], seen, hidden = (
            decoder.loss(batch, overrides, statistics="off").loss.item() / num_labels
            for overrides in (None, everywhere(decoder), everywhere(decoder, mask=hide_first))
        )
        yield Finding("loss", name, plain[name])
        yield Finding("loss_hidden_first", name, hidden)
        yield Finding("cost_hidden_first", name, hidden - seen)
    for name, batch in inputs.rows.items():
        # A row at a time: a GPU that trains has no room for the logits of many.
        rows = (cut(batch, slice(row, row + 1)) for row in range(len(batch.tokens_BT)))
        loss = sum(decoder.loss(row, statistics="off").loss.item() for row in rows)
        yield Finding("loss", name, loss / int((batch.labels_BT != IGNORE_LABEL).sum()))
    if "bos_text" in plain:
        yield Finding("cost_without_bos", "text", plain["text"] - plain["bos_text"])

"""The groups whose choices are classes, and which class a run's settings mean.

A section of such a group is stored with its ``kind``, the name the command line knows, because
settings alone don't tell it: ``softmax`` and ``off_by_one`` have the same fields.
"""

from dataclasses import fields

from data.corpora import CORPORA
from data.tokenizers import TOKENIZERS
from models.attention import ATTENTIONS
from train.optimizers import OPTIMIZERS
from train.schedules import SCHEDULES

GROUPS: dict[str, dict[str, type]] = {
    "attention": {name: kind.Config for name, kind in ATTENTIONS.items()},
    "corpus": {name: kind.Config for name, kind in CORPORA.items()},
    "tokenizer": {name: kind.Config for name, kind in TOKENIZERS.items()},
    "optimizer": {name: config_class for name, (config_class, _) in OPTIMIZERS.items()},
    "schedule": dict(SCHEDULES),
}
"""Config class by group and kind."""


def kind_of(group: str, config_class: type) -> str:
    """The name of the kind that a config class of ``group`` belongs to."""
    return next(name for name, known in GROUPS[group].items() if known is config_class)


def told_kind(group: str, section: dict) -> str | None:
    """The kind that a section's other settings tell: the first with the fewest more; None if none.

    What run folders had from before kinds were stored, and why those of that kind keep their hash.
    """
    names = section.keys() - {"kind"}
    sizes = {}
    for kind, config_class in GROUPS[group].items():
        known = {field.name for field in fields(config_class)}
        if names <= known:
            sizes[kind] = len(known)
    return min(sizes, key=sizes.__getitem__, default=None)


def without_told_kinds(settings: dict) -> dict:
    """``settings`` with each kind left out that the rest of its section tells."""
    kept = dict(settings)
    for group in GROUPS.keys() & settings.keys():
        section = settings[group]
        if isinstance(section, dict) and section.get("kind") == told_kind(group, section):
            kept[group] = {name: value for name, value in section.items() if name != "kind"}
    return kept

"""Make the W&B workspace that shows runs by arm: its first page is the report's.

    python -m scripts.dashboard [--entity E] [--project P] [--layers N] [--dry-run]

Needs the extra ``dashboard`` (pip install 'sinklab[dashboard]', from a checkout '.[dashboard]').
Each call saves a new view of the project and prints its address. Without a login, under
WANDB_MODE=offline or disabled, and with --dry-run it says what it would save. Never asks.
"""

import argparse
import importlib.util
import sys
from typing import Any

from kernels.errors import UserError, require
from train.mistakes import exit_code
from train.wandb_names import FIGURES, heads_key, layer_keys

NAME = "Attention sinks"
"""The view's name in the project."""

ARM = "config.arm"

BY_LAYER = {
    "sink/mass": "First key's mass",
    "sink/rate_030": "First key: heads over 0.3",
    "sink_document/mass": "Document starts' mass",
    "sink_null/mass": "Null slot's mass",
    "probe/t64_bos_text/mass": "BOS + text: first key's mass",
    "probe/t64_text/mass": "Text: first key's mass",
    "norm_first/massive_ratio": "Hidden state of rows' first tokens",
    "norm_first/value_ratio": "Value of rows' first tokens",
    "norm/massive_ratio": "Hidden state of documents' first tokens",
    "norm/value_ratio": "Value of documents' first tokens",
    "attention/max_logit": "Largest score",
    "attention/entropy": "Entropy, nats (tracking.statistics=full)",
}
"""Metrics of the second section, a plot each with a line a layer, and their titles."""

PICTURES = {
    "BOS + text, layers x heads": [heads_key("bos_text")],
    "Text, layers x heads": [heads_key("text")],
    "Sinks at the end": [f"{FIGURES}/sinks_by_layer", f"{FIGURES}/sinks_by_head"],
    "Losses and norms": [f"{FIGURES}/losses", f"{FIGURES}/norm_ratios"],
}
"""Media keys of the third section by title."""


def build_workspace(entity: str, project: str, num_layers: int) -> Any:
    """The workspace as an object of wandb-workspaces; talks to no server.

    num_layers: how many layers the plots by layer have lines for. Raises UserError where the extra
    isn't installed.
    """
    if importlib.util.find_spec("wandb_workspaces") is None:
        raise UserError(
            "scripts.dashboard needs wandb-workspaces: pip install -e '.[dashboard]' installs it"
        )
    import wandb_workspaces.workspaces as ws
    from wandb_workspaces import expr

    columns = [
        "summary:probe/t64_bos_text/mass",
        "summary:probe/t64_bos_text/rate_030",
        "summary:probe/t64_text/mass",
        "summary:val/canonical_loss",
        "summary:tokens",
    ]
    wide = ws.SectionLayoutSettings(columns=3, rows=4)
    sections = {
        "Sinks by arm": _first_page(num_layers),
        "By layer": [_over_steps(t, layer_keys(n, num_layers)) for n, t in BY_LAYER.items()],
        "Pictures": _pictures(),
    }
    return ws.Workspace(
        entity=entity,
        project=project,
        name=NAME,
        sections=[
            ws.Section(name=name, panels=panels, is_open=index == 0, layout_settings=wide)
            for index, (name, panels) in enumerate(sections.items())
        ],
        settings=ws.WorkspaceSettings(x_axis="step", group_by_prefix="first", max_runs=100),
        runset_settings=ws.RunsetSettings(
            groupby=[expr.Config("arm")], pinned_columns=["run:displayName", *columns]
        ),
    )


def _over_steps(title: str, keys: list[str], **options: Any) -> Any:
    """Lines over log steps: an arm's mean over its seeds, and its range."""
    import wandb_workspaces.reports.v2 as wr

    return wr.LinePlot(
        title=title,
        x="step",
        y=keys,
        log_x=True,
        groupby=ARM,
        groupby_aggfunc="mean",
        groupby_rangefunc="minmax",
        max_runs_to_show=100,
        **options,
    )


def _first_page(num_layers: int) -> list[Any]:
    import wandb_workspaces.reports.v2 as wr

    removing_bos = "${probe/t64_text/loss} - ${probe/t64_bos_text/loss}"
    ratios = {
        name: layer_keys(f"norm_first/{name}", num_layers)
        for name in ("massive_ratio", "value_ratio")
    }
    return [
        _over_steps("First key's excess mass, first 64 queries", ["sink/excess"]),
        _over_steps("First key's mass and its uniform baseline", ["sink/mass", "sink/baseline"]),
        _over_steps("Heads over 0.3, first 64 queries", ["sink/rate_030"]),
        _over_steps(
            "Heads over 0.3 on held-out prompts",
            ["probe/t64_bos_text/rate_030", "probe/t64_text/rate_030"],
        ),
        _over_steps("Canonical loss, nats a label", ["val/canonical_loss"]),
        _over_steps(
            "Loss of removing the BOS, nats a label",
            ["probe/t64_text/loss", "probe/t64_bos_text/loss"],
            custom_expressions=[removing_bos],
        ),
        _over_steps("Hidden-state norm, first over ordinary", ratios["massive_ratio"], log_y=True),
        _over_steps("Value norm, first over ordinary", ratios["value_ratio"], log_y=True),
        wr.ScatterPlot(
            title="Mass on BOS + text against canonical loss, at the end",
            x=wr.SummaryMetric("val/canonical_loss"),
            y=wr.SummaryMetric("probe/t64_bos_text/mass"),
        ),
        wr.BarPlot(
            title="Heads over 0.3 at the end",
            metrics=["probe/t64_bos_text/rate_030", "probe/t64_text/rate_030"],
            groupby=ARM,
            groupby_aggfunc="mean",
            groupby_rangefunc="minmax",
        ),
        wr.RunComparer(diff_only="split"),
    ]


def _pictures() -> list[Any]:
    import wandb_workspaces.reports.v2 as wr

    return [
        wr.MediaBrowser(title=title, media_keys=keys, num_columns=len(keys), gallery_axis="step")
        for title, keys in PICTURES.items()
    ]


def describe(workspace: Any) -> list[str]:
    """A workspace as lines: its sections, and each panel's kind, title and keys."""
    lines = [f"workspace {workspace.name!r}, runs grouped by {ARM}, lines over log steps"]
    for section in workspace.sections:
        lines.append(f"  {section.name}, {'open' if section.is_open else 'closed'}")
        for panel in section.panels:
            title = getattr(panel, "title", None) or "settings in which runs differ"
            keys = [key for key in panel_keys(panel) if key != "step"]
            lines.append(f"    {type(panel).__name__:13}{title}: {_short(keys)}")
    return lines


def panel_keys(panel: Any) -> list[str]:
    """The W&B keys that a panel reads, that of its x axis first."""
    values = [getattr(panel, name, None) for name in ("x", "y", "metrics", "media_keys")]
    listed = [value if isinstance(value, list) else [value] for value in values]
    return [getattr(key, "name", key) for keys in listed for key in keys if key is not None]


def _short(keys: list[str]) -> str:
    if len(keys) > 2:
        return f"{keys[0]} ... {keys[-1].rsplit('/', 1)[-1]}"
    return ", ".join(keys) or "config"


def _logged_in() -> bool:
    """Whether W&B takes what is saved, found out without asking."""
    from train.wandb_mode import LoggerConfig, wandb_mode

    return wandb_mode(LoggerConfig()) == "online"


def _save(workspace: Any) -> str:
    """Save and return the address. Raises UserError if W&B refuses or can't be reached."""
    import wandb

    try:
        if not workspace.entity:
            workspace.entity = wandb.Api().default_entity or ""
        require(bool(workspace.entity), "--entity", "must be given (none is the default)", "none")
        return workspace.save().url
    except UserError:
        raise
    except Exception as error:
        # Whatever the client raises (GraphQL, HTTP, its own), its text may quote what was sent.
        raise UserError(
            f"W&B didn't take the workspace of project {workspace.project!r} "
            f"({type(error).__name__}): are the network, --entity and --project right?"
        ) from error


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.dashboard",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--entity", default="", help="user or team; default: the login's own")
    parser.add_argument("--project", default="sinklab", help="default: sinklab")
    parser.add_argument("--layers", type=int, default=12, help="lines of plots by layer; 12")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be saved")
    options = parser.parse_args(arguments)
    require(options.layers >= 1, "--layers", "must be >= 1", options.layers)
    require(bool(options.project), "--project", "must have a name", options.project)
    workspace = build_workspace(options.entity, options.project, options.layers)
    if options.dry_run or not _logged_in():
        why = "" if options.dry_run else ", but there is no working W&B login (`wandb login`)"
        where = f"{options.entity or '<your entity>'}/{options.project}"
        print(f"this would be saved to {where}{why}:")
        print("\n".join(describe(workspace)))
        return
    print(f"saved: {_save(workspace)}")


def command(arguments: list[str]) -> int:
    """Run it with these arguments; returns the exit code."""
    return exit_code(main, arguments)


if __name__ == "__main__":
    sys.exit(command(sys.argv[1:]))

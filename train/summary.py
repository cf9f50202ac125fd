"""The table at a run's end: what came out, where it is, how to look at it, what to expect."""

from rich.console import Console
from rich.table import Table

from data.evaluation import ProbeKind
from data.module import TokenDataModule
from data.packing import BosKind
from train.evaluation import Evaluation
from train.run_folder import RunFolder

EXPECTED_TOKENS = 10_000_000
"""Tokens of text under which no sink is to be expected, whatever the packing: the earliest onset of
all runs of the findings is after 11M, with a pinned BOS (docs/findings.md)."""


def print_summary(
    console: Console,
    folder: RunFolder,
    data: TokenDataModule,
    evaluation: Evaluation,
    row: dict[str, float],
    training_seconds: float,
    run_seconds: float,
    *,
    is_proxy: bool,
    brief: bool = False,
) -> None:
    """Print the final figures of a run; if ``brief``, its losses and where it is, without a table.

    row: the latest value of every metric. run_seconds: all that the run took, the training steps'
    ``training_seconds`` included. is_proxy: masses are shares of weights that no softmax made, and
    are marked.
    """
    mark = " (proxy)" if is_proxy else ""
    metrics = evaluation.metrics
    table = Table(title=f"{folder.path.name}", title_justify="left", show_edge=False)
    table.add_column("figure")
    table.add_column("value", justify="right")
    table.add_column("compare with")

    def add(figure: str, name: str, compare: str = "") -> None:
        if name in metrics:
            table.add_row(figure, f"{metrics[name]:.3f}", compare)

    entropy = data.unigram_entropy
    gap = entropy - metrics["val/canonical_loss"]
    side = "below" if gap > 0 else "above"
    reference = f"unigram entropy {entropy:.3f}: {abs(gap):.2f} {side}"
    if data.optimal_loss is not None:
        excess = metrics["val/canonical_loss"] - data.optimal_loss
        reference = f"optimum {data.optimal_loss:.3f}: {excess:.3f} above"
    add("canonical loss, nats a label", "val/canonical_loss", reference)
    add("own loss, nats a label", "val/own_loss")
    add("bits a byte", "val/bits_per_byte")
    for kind in evaluation.probes:
        prefix = f"probe/t64_{kind}"
        untrained = kind is ProbeKind.bos_text and data.packing.bos is BosKind.none
        note = ", BOS not seen in training" if untrained else ""
        title = {"text": "text", "bos_text": "BOS + text"}[kind]
        baseline = f"uniform {metrics.get(f'{prefix}/baseline', float('nan')):.3f}"
        add(f"{title}: first key's mass{mark}, T=64", f"{prefix}/mass", baseline + note)
        add(f"{title}: slot's mass", f"{prefix}_null/mass", "attention beside the keys")
        add(
            f"{title}: first key's without the slot",
            f"{prefix}_of_keys/mass",
            "mass / (1 - slot's)",
        )
        add(f"{title}: heads over 0.3", f"{prefix}/rate_030", "share of (sample, layer, head)")
        add(f"{title}: loss", f"{prefix}/loss", "on the same labels")
    if "backcopy/non_trigger_mass" in metrics:
        mass, baseline = (
            metrics["backcopy/non_trigger_mass"],
            metrics["backcopy/non_trigger_baseline"],
        )
        times = f"uniform {baseline:.3f}: {mass / baseline:.1f} times"
        add("first key's mass, non-trigger queries", "backcopy/non_trigger_mass", times)
        add("first key's mass, trigger queries", "backcopy/trigger_mass")
    if not brief:
        console.print()
        console.print(table)
        console.print()
    speed = row.get("perf/tokens_per_second")
    pace = f", at last {speed / 1000:.1f}k tokens/s" if speed else ""
    lines = [
        f"trained for {training_seconds:.0f} s of {run_seconds:.0f} s on {row['tokens']:,} "
        f"tokens{pace}",
        f"everything is in {folder.path}"
        + (f"; pictures in {folder.figures}" if folder.figures.is_dir() else ""),
    ]
    if brief:
        loss, mass = (metrics.get(name) for name in ("val/canonical_loss", "probe/t64_text/mass"))
        sink = "" if mass is None else f", first key's mass at T=64 {mass:.3f}{mark}"
        lines = [f"{folder.path.name}: {lines[0]}; canonical loss {loss:.3f}{sink}"]
    wandb_runs = [] if brief else sorted((folder.path / "wandb").glob("*run-*"))
    if wandb_runs:
        lines.append(
            f"look at the curves without an account: scripts/run wandb leet {wandb_runs[-1]}"
        )
    if not brief and data.optimal_loss is None and row["tokens"] < EXPECTED_TOKENS:
        lines.append(
            f"no sink is expected from {row['tokens']:,} tokens of text: "
            "see experiment=bigram_backcopy for one that forms in CPU minutes"
        )
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)

"""Figures of record: short names in a legend that covers nothing, whatever the runs are called."""

import pytest
from matplotlib.figure import Figure

from tests.train.made_runs import made_run
from train.report.gather import gather
from train.report.record import draw_record

LONG = ("packing.context=256", "packing.mask=document", "model.d_model=64", "model.num_heads=1")
UNLIKE = {
    "plain": [],
    "kind": ["attention=off_by_one"],
    "rate": [*LONG, "optimizer.lr=1e-2"],
    "both": [*LONG, "optimizer.lr=1e-2", "attention=sigmoid"],
}
PATHS = {
    name: [*LONG, "tokenizer=file", f"tokenizer.path=/{'long/' * 30}{name}.json"]
    for name in ("one", "other")
}
"""Told apart by values that have no space to break a line at."""
ALIKE = {rate: [f"optimizer.lr={rate}"] for rate in ("0.001", "0.002", "0.004")}


@pytest.fixture
def figures(monkeypatch) -> list[Figure]:
    """The figures that would be saved as PNG."""
    saved = []

    def keep(self, *_, format, **__):
        saved.extend([self] * (format == "png"))

    monkeypatch.setattr(Figure, "savefig", keep)
    return saved


@pytest.mark.parametrize("arms", [UNLIKE | PATHS, ALIKE], ids=["unlike", "alike"])
def test_the_legend_covers_nothing_and_nothing_is_cut_off(figures, tmp_path, arms):
    """Legends of 18 lines an arm lay over the curves and ran out of the picture."""
    runs = [
        made_run(tmp_path / name, *overrides, steps=[1, 10, 100, 1000], onset=100)
        for name, overrides in arms.items()
    ]
    draw_record(gather(runs)[1], tmp_path / "figures")
    assert len(figures) == 3
    for figure in figures:
        figure.draw_without_rendering()
        (legend,) = figure.legends
        shown = legend.get_window_extent()
        whole = [axis.get_tightbbox() for axis in figure.axes]
        assert not any(shown.overlaps(box) for box in whole)
        for box in (shown, *whole):
            assert figure.bbox.containsx(box.x0) and figure.bbox.containsx(box.x1)
            assert figure.bbox.containsy(box.y0) and figure.bbox.containsy(box.y1)
        names = [text.get_text() for text in legend.get_texts()]
        assert len(set(names)) == len(names) >= len(arms)
        assert any("\n" in name for name in names) == (arms is not ALIKE)
        # Axes keep their size beside however long a legend.
        assert all(axis.get_window_extent().height > 0.7 * 400 for axis in figure.axes)


def test_unlike_arms_have_short_names_and_whole_ones(tmp_path):
    def arms_of(overrides: dict[str, list[str]]):
        made = [
            made_run(tmp_path / name, *each, steps=[1, 4], onset=None)
            for name, each in overrides.items()
        ]
        return gather(made)[1]

    arms = arms_of(UNLIKE)
    assert [arm.legend for arm in arms] == [
        "packing.mask=causal, attention=softmax, +4 more",
        "packing.mask=causal, attention=off_by_one, +4 more",
        "packing.mask=document, attention=softmax, +4 more",
        "packing.mask=document, attention=sigmoid, +4 more",
    ]
    assert all(arm.label.count("=") == 6 and arm.whole_legend == arm.label for arm in arms)
    assert [arm.legend for arm in arms_of(ALIKE)] == [f"optimizer.lr={rate}" for rate in ALIKE]

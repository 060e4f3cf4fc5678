"""What the score command says about a summary, and the figure that it draws of it."""

import io

import numpy as np
import pytest

pytest.importorskip("pyarrow")
pytest.importorskip("matplotlib")

import pyarrow as pa

from marginops.commands.score.figure import draw
from marginops.commands.score.summary import sentences


def summary_of(**parts):
    counts = dict.fromkeys(("missing", "nan", "infinite", "overflow", "unlabelled"), 0)
    return {"rows": {"rows": 400, **counts}, **parts}


def selection_of(**changes):
    return {
        **{"by": "loss", "largest": True, "k": 10, "rows": 400, "selected": 10},
        **{"first_score": 4.5, "last_score": 2.25},
        **changes,
    }


@pytest.mark.parametrize(
    ("summary", "text"),
    [
        (
            summary_of(selection=selection_of()),
            "selected: the 10 rows with the largest loss, from 4.5 to 2.25",
        ),
        (
            summary_of(selection=selection_of(k=1000, selected=400)),
            "selected: all 400 rows that have a loss, fewer than the 1,000 asked for",
        ),
        (
            summary_of(selection=selection_of(last_score=None)),
            "selected: the 10 rows with the largest loss, from 4.5 to not finite",
        ),
        (
            summary_of(label_issues={"k": 3, "error_rate": None, "most_confused": []}),
            "label issues: no row has a label and finite logits",
        ),
        (
            summary_of(
                moments={"classes": 9, "features": 1024, "mean_radius": None, "empty_classes": 9}
            ),
            "class moments: 9 classes of 1,024 values, mean radius not finite; "
            "classes without rows: 9",
        ),
    ],
)
def test_sentences(summary, text):
    assert list(sentences(summary))[1:] == [text]


def distribution_of(values):
    """The table and the summary of a distribution, as a run leaves them."""
    edges = np.unique(np.concatenate([np.linspace(values.min(), values.max(), 400), [0]]))
    edges[-1] += 1e-9
    counts, _ = np.histogram(values, edges)
    bins = pa.table({"lower": edges[:-1], "upper": edges[1:], "count": counts})
    return bins.filter(pa.array(counts > 0)), {"by": "margin", "count": len(values)}


def test_the_figure_shows_the_distribution_and_the_selection():
    values = np.random.default_rng(0).standard_normal(20_000)
    bins, margins = distribution_of(values)
    threshold = np.sort(values)[499]
    selection = selection_of(by="margin", largest=False, last_score=threshold, selected=500)
    figure = draw(summary_of(margins=margins, selection=selection), bins, "subtitle")
    (axes,) = figure.axes
    shares, edges, _ = axes.patches[0].get_data()
    expected, _ = np.histogram(values, edges)
    np.testing.assert_allclose(shares, expected / len(values), atol=0.002)
    assert shares.sum() > 0.99
    vertical = [line.get_xdata()[0] for line in axes.lines]
    assert vertical == [0, threshold]
    (label,) = axes.get_legend().get_texts()
    assert label.get_text() == f"500 selected rows: up to {threshold:.4g}"
    assert "subtitle" in figure.get_suptitle()


def test_the_figure_shows_no_threshold_of_another_score():
    bins, margins = distribution_of(np.linspace(1, 2, 500))
    figure = draw(summary_of(margins=margins, selection=selection_of()), bins, "")
    assert not figure.axes[0].lines and figure.axes[0].get_legend() is None


def test_the_figure_shows_confused_classes():
    bins, margins = distribution_of(np.linspace(1, 2, 500))
    pairs = [{"label": 1, "prediction": 3, "count": 17}, {"label": 0, "prediction": 2, "count": 4}]
    issues = {"most_confused": pairs, "misclassified": 21}
    figure = draw(summary_of(margins=margins, label_issues=issues), bins, "")
    axes = figure.axes[1]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["1 → 3", "0 → 2"]
    assert [bar.get_width() for bar in axes.patches] == [17, 4]


@pytest.mark.parametrize("values", [np.zeros(5), np.full(5, 1e-30), np.array([])])
def test_the_figure_of_scores_that_do_not_vary(values):
    if len(values):
        edges = [values[0], values[0] + 1e-38]
        bins = pa.table({"lower": edges[:1], "upper": edges[1:], "count": [len(values)]})
    else:
        bins = pa.table({"lower": values, "upper": values, "count": pa.array([], pa.int64())})
    summary = summary_of(margins={"by": "margin", "count": len(values)})
    draw(summary, bins, "").savefig(io.BytesIO())

"""A claim: what it states, the runs that test it, and what their results say of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .data import Sources

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# What one run is told. The values are those of JSON, and "data" names the data set.
Settings = dict[str, Any]
# The settings of a run, its results and its "cpu_seconds".
Row = dict[str, Any]


@dataclass(frozen=True)
class Scope:
    """How much is asked for.

    Attributes:
        seeds: The seeds of the runs.
        quick: Whether to take fewer and shorter runs: minutes for all claims together.
        sources: Where the data sets are. Runs of a data set that is missing are left out.
    """

    seeds: Sequence[int]
    quick: bool
    sources: Sources


@dataclass(frozen=True)
class Table:
    """A table of text. Numbers are cells that start with a digit, a sign or a dash."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Report:
    """What the runs say.

    Attributes:
        outcome: In a word, whether the claim held.
        verdict: The same in one sentence, with its figures. If the claim fails somewhere, the
            sentence says so first.
        tables: Means with standard deviations, and intervals of paired differences.
        notes: What a reader has to know beside the tables, a sentence or two each.
    """

    outcome: Literal["confirmed", "partly confirmed", "not confirmed"]
    verdict: str
    tables: Sequence[Table]
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Claim:
    """One claim.

    Attributes:
        name: The stem of its files.
        title: A few words.
        statement: The claim in one sentence.
        source: Whose claim it is: authors and year, or marginops.
        protocol: What the runs do and what was fixed before them, in paragraphs of Markdown.
        settings: Every run of a scope. A run belongs to one seed, and pairs of runs share it.
        run: Does one run on one thread, and returns its results as values of JSON. It is a function
            of a module in ``trainings``, so that finished runs stay valid until that module, or one
            that it imports from here, has other code.
        report: Says what complete rows mean.
        draw: Draws the rows into a figure of matplotlib.
        seeds: The number of seeds.
        quick_seeds: The number of seeds of a quick run.
        draw_sheet: Draws samples that a run found into a second figure, if there are any.
        is_possible: Whether a run is possible here. Those that need a library that is missing are
            left out, and then the published results stay.
    """

    name: str
    title: str
    statement: str
    source: str
    protocol: str
    settings: Callable[[Scope], list[Settings]]
    run: Callable[[Settings, Sources], dict[str, Any]]
    report: Callable[[list[Row]], Report]
    draw: Callable[[list[Row], "Figure"], None]
    seeds: int = 5
    quick_seeds: int = 2
    draw_sheet: Callable[[list[Row], Sources, "Figure"], None] | None = None
    is_possible: Callable[[Settings], bool] = lambda _: True

    def all_settings(self) -> list[Settings]:
        """Every run with the default seeds and all data sets but MNIST, which few users have."""
        somewhere = Path(__file__).parent
        return self.settings(
            Scope(range(self.seeds), False, Sources(fashion_mnist=somewhere, texts=somewhere))
        )

    @property
    def result_file(self) -> str:
        """The name of the result file; the figure has the same stem."""
        return f"claims-{self.name.replace('_', '-')}.json"

    @property
    def sheet_file(self) -> str | None:
        """The name of the second figure; None for a claim without one."""
        return f"claims-{self.name.replace('_', '-')}-sheet.png" if self.draw_sheet else None

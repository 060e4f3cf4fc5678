"""A look at the samples that look most suspicious with the labels that Fashion-MNIST gives."""

from typing import TYPE_CHECKING

from harness.claim import Row
from harness.data import FASHION_MNIST, Sources, load

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CLASSES = (
    *("T-shirt/top", "trouser", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
)
# How the samples of the sheet look to the eye. Long sleeves and the label T-shirt/top are taken for
# ambiguous, short sleeves and the label pullover or coat for wrong.
WRONG = {
    *(20544, 34381, 27350, 22264, 33982, 52235, 42018),
    *(35321, 39525, 29599, 46926, 40513, 51735, 29154),
}
AMBIGUOUS = {
    *(16691, 36325, 56855, 38100, 39139, 33590, 36089, 40048, 59298),
    *(169, 10097, 51601, 11036, 49983, 39374, 51425, 37286),
}
RIGHT = {2372, 33978, 22576, 13103, 36568, 23487, 57751, 57204, 43277}


def looked_at(indices: list[int]) -> str:
    """How many of the samples look wrong, where the same samples were looked at."""
    wrong, ambiguous, right = (len(set(indices) & kind) for kind in (WRONG, AMBIGUOUS, RIGHT))
    unseen = len(indices) - wrong - ambiguous - right
    text = (
        f"Of the {len(indices)} most suspicious labels of one training without noise, {wrong} look "
        f"plainly wrong, {ambiguous} ambiguous and {right} right"
    )
    return text + (f"; {unseen} were not looked at." if unseen else ".")


def draw_sheet(rows: list[Row], sources: Sources, figure: "Figure") -> None:
    """The most suspicious samples of the training without noise, with label and prediction."""
    for sheet in (row["sheet"] for row in rows if "sheet" in row):
        images = load(FASHION_MNIST, sources).train_inputs
        figure.set_size_inches(10, 8.5)
        figure.suptitle("The label that Fashion-MNIST gives, and what the network predicts")
        panels = figure.subplots(5, 8).flat
        for axes, i, label, predicted in zip(panels, *sheet.values(), strict=True):
            axes.imshow(images[i, 0].numpy(), cmap="gray_r")
            axes.set_title(f"{CLASSES[label]}\n({CLASSES[predicted]}?)", fontsize=9)
            axes.axis("off")

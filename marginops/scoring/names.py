"""The names of all statistics of a row, and what each of them needs."""

NEED_TARGET = (
    "margin",
    "rival",
    "loss",
    "confidence",
    "correct",
    "el2n",
    "gradient_norm",
)
NEED_HEAD = ("gradient_norm", "minimal_margin")

STATISTICS = (
    "margin",
    "rival",
    "top2_margin",
    "loss",
    "confidence",
    "entropy",
    "correct",
    "el2n",
    "gradient_norm",
    "prediction",
    "minimal_margin",
    "probability_margin",
)

# Classes and truth values are no scores.
SCORES = tuple(name for name in STATISTICS if name not in ("rival", "correct", "prediction"))

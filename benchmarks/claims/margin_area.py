"""Does the area under the curve of normalised margins order networks by their test error?

python benchmarks/claims/margin_area.py            # 144 networks: tables, a result file, a figure
python benchmarks/claims/margin_area.py --quick    # 24 small trainings; writes nothing

A seed is one repetition of the design: one initial scale, batch size and learning rate, with which
a network of every architecture is trained after every share of random labels. So the number of
seeds is the number of networks of one architecture and share.
"""

import sys
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
from harness.claim import Claim, Report, Row, Scope, Settings, Table
from harness.command import main
from harness.data import FASHION_MNIST
from harness.statistics import RESAMPLES, Interval, mean_sd
from trainings.margin_area import (
    BARTLETT,
    BATCH_NORM,
    NORMS,
    PERCEPTRON,
    PLAIN,
    READINGS,
    UNNORMALISED,
    run,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ARCHITECTURES = (BATCH_NORM, PLAIN, PERCEPTRON)

"""All claims that are tested by runs, in the order of their page."""

import fewer_samples
import fewer_updates
import inversion
import label_issues
import last_layer
import margin_area
import regularization
import train_faster

CLAIMS = [
    module.CLAIM
    for module in (
        label_issues,
        train_faster,
        fewer_updates,
        regularization,
        margin_area,
        fewer_samples,
        last_layer,
        inversion,
    )
]

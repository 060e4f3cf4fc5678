"""All claims that are tested by runs, in the order of their page."""

import fewer_samples
import fewer_updates
import inversion
import last_layer
import margin_area

CLAIMS = [
    module.CLAIM
    for module in (
        fewer_updates,
        margin_area,
        fewer_samples,
        last_layer,
        inversion,
    )
]

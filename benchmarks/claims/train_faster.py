"""CPU time to equal accuracy, if epochs visit the samples whose margins were small when last seen.

python benchmarks/claims/train_faster.py --texts WHEEL   # tables, a result file, a figure
python benchmarks/claims/train_faster.py --quick         # one network; writes nothing
"""

import sys

from harness.claim import Claim, Scope, Settings
from harness.command import main
from train_faster_report import (
    CNN,
    GAIN,
    MLP,
    PLAIN,
    RESNET,
    TEXTS,
    TITLES,
    Setting,
    draw,
    report,
)
from trainings.train_faster import EL2N, INFO_BATCH, LOSS, SAMPLINGS, STALE, SUBSET, UNIFORM, run

# The budgets as shares of that of the plain run.
SHARES = (0.05, 0.1, 0.2, 0.35, 0.5)
SHARES_OF_OTHERS = (0.1, 0.2, 0.5)
SEEDS_OF_OTHERS = 3
BUDGETS = {
    UNIFORM: (*SHARES, 1.0),
    STALE: SHARES,
    **dict.fromkeys((INFO_BATCH, LOSS, EL2N, SUBSET), SHARES_OF_OTHERS),
}
QUICK_BUDGETS = {UNIFORM: (0.1, 0.2, 0.35), STALE: (0.1, 0.2)} | dict.fromkeys(
    (INFO_BATCH, LOSS, EL2N, SUBSET), (0.1,)
)
PROTOCOL = """
TODO
"""
# The learning rate, and the share of the samples that an epoch visits, hold up to the budget that
# they stand at.
LEARNING_RATES: dict[Setting, dict[str, dict[float, float]]] = {
    MLP: {UNIFORM: {4: 0.1, 16: 0.05}, STALE: {2: 0.1, 16: 0.05}},
    CNN: {UNIFORM: {16: 0.1}, STALE: {16: 0.1}},
    RESNET: {UNIFORM: {16: 0.1}, STALE: {16: 0.1}},
    TEXTS: {UNIFORM: {16: 1.0}, STALE: {16: 1.0}},
}
KEEP = {MLP: {4: 0.3, 16: 0.4}, CNN: {16: 0.5}, RESNET: {16: 0.4}, TEXTS: {16: 0.4}}
KEEP_OF_INFO_BATCH = 0.7


def settings(scope: Scope) -> list[Settings]:
    """Every sampling at every budget. The samplings take turns, so that they share the machine."""
    budgets = QUICK_BUDGETS if scope.quick else BUDGETS
    return [
        {
            "data": setting[0],
            "network": setting[1],
            "sampling": sampling,
            "budget": round(share * PLAIN, 6),
            "keep": keep(setting, sampling, share * PLAIN),
            "learning_rate": learning_rate(setting, sampling, share * PLAIN),
            "evaluate_on": "test",
            "seed": seed,
        }
        for seed in scope.seeds
        for setting in (TITLES if not scope.quick else [MLP])
        if scope.sources.has(setting[0])
        for share in BUDGETS[UNIFORM]
        for sampling in SAMPLINGS
        if share in budgets[sampling]
        if sampling in (UNIFORM, STALE) or seed < SEEDS_OF_OTHERS
    ]


def learning_rate(setting: Setting, sampling: str, budget: float) -> float:
    """The learning rate that was chosen on held-out training samples."""
    of_setting = LEARNING_RATES[setting]
    return up_to(of_setting.get(sampling, of_setting[UNIFORM]), budget)


def keep(setting: Setting, sampling: str, budget: float) -> float:
    """The share of the samples that an epoch visits."""
    if sampling in (UNIFORM, INFO_BATCH):
        return 1.0 if sampling == UNIFORM else KEEP_OF_INFO_BATCH
    return up_to(KEEP[setting], budget)


def up_to(values: dict[float, float], budget: float) -> float:
    """The value at the first limit that is not below the budget."""
    return next(value for limit, value in values.items() if budget <= limit)


CLAIM = Claim(
    name="train_faster",
    title="Less CPU time with stale margins",
    statement="Training with `MarginSampler`, which visits the samples whose margins were small "
    f"when the training last saw them, takes at least {GAIN} times less CPU time than training "
    "with uniform batches to the same test accuracy.",
    source="marginops",
    protocol=PROTOCOL,
    settings=settings,
    run=run,
    report=report,
    draw=draw,
    quick_seeds=1,
)

if __name__ == "__main__":
    sys.exit(main(CLAIM))

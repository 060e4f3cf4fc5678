"""Every public function of tensors, beside the same function in plain PyTorch."""

import math

import torch
import torch.nn.functional as F

import marginops

BATCH, ROWS, CLASSES, COLUMNS = 3, 6, 4, 5
IGNORED = -100


def random(*shape):
    return torch.randn(
        *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape))
    )


TARGET = torch.tensor([0, IGNORED, 2, 3, 1, 0])
KEPT = TARGET != IGNORED
LABEL = TARGET.clamp(min=0)
LOGITS, FEATURES = random(ROWS, CLASSES), random(ROWS, COLUMNS)
WEIGHT, BIAS = random(CLASSES, COLUMNS), random(CLASSES)


def rival_value(logits):
    return logits.masked_fill(F.one_hot(LABEL, CLASSES).bool(), -math.inf).max(-1)


def margin(logits, log_norm=0.0):
    own = logits.gather(1, LABEL[:, None]).squeeze(1)
    value = (own - rival_value(logits).values) * torch.exp(-torch.as_tensor(log_norm))
    return torch.where(KEPT, value, math.inf)


def score(logits, weight=WEIGHT):
    values, classes = logits.topk(2)
    return (values[:, 0] - values[:, 1]) / (weight[classes[:, 0]] - weight[classes[:, 1]]).norm(
        dim=1
    )


def loss(logits):
    return F.cross_entropy(logits, TARGET, reduction="none")


def smallest(values):
    return values.topk(2, largest=False).values


def statistics(logits):
    p = logits.softmax(1)
    confidence = torch.where(KEPT, p.gather(1, LABEL[:, None]).squeeze(1), 1)
    entropy = torch.where(KEPT, -(p * p.log()).sum(1), 0)
    return torch.stack((finite(margin(logits)), loss(logits), confidence, entropy))


def fields(result):
    return torch.stack((finite(result.margin), result.loss, result.confidence, result.entropy))


def tempered(logits):
    values = statistics(logits / 0.7)
    return torch.stack((-values[1], values[3]))


def log_prob_and_entropy(features, weight):
    return torch.stack(
        marginops.linear_log_prob(
            features, weight, TARGET, BIAS, temperature=0.7, return_entropy=True
        )
    )


def moments(features):
    members = [features[label == TARGET] for label in range(CLASSES)]
    means = [rows.mean(0) for rows in members]
    squares = [
        (rows - mean).square().sum(1).mean() for rows, mean in zip(members, means, strict=True)
    ]
    # Three classes have one sample. Their radius is 0, and so is its gradient.
    return torch.cat((torch.stack(means).flatten(), squares[0].sqrt().reshape(1)))


def regularization(features, weight, logits):
    pair = LABEL[KEPT], rival_value(logits).indices[KEPT]
    distance = (weight[pair[0]] - weight[pair[1]]).norm(dim=1)
    return (features[KEPT].norm(dim=1).max() * distance.mean()).square()


def head(features):
    return F.linear(features, WEIGHT, BIAS)


def finite(values):
    return torch.where(values == math.inf, 0, values)


def class_moments(features):
    result = marginops.class_moments(features, TARGET, CLASSES)
    return torch.cat((result.mean.flatten(), result.radius[:1]))


def radius_area(margins):
    return torch.where(margins == math.inf, 0, margins).sum() / (margins != math.inf).sum()


# Name: the function, the same in plain PyTorch, and the shape of the argument.
CASES = {
    "classification_margin": (
        lambda x: finite(marginops.classification_margin(x, TARGET)),
        lambda x: finite(margin(x)),
        (ROWS, CLASSES),
    ),
    "classification_margin of log_norm": (
        lambda x: finite(marginops.classification_margin(LOGITS, TARGET, log_norm=x)),
        lambda x: finite(margin(LOGITS, x)),
        (),
    ),
    "minimal_margin_score": (
        lambda x: marginops.minimal_margin_score(x, WEIGHT),
        score,
        (ROWS, CLASSES),
    ),
    "minimal_margin_score of weight": (
        lambda x: marginops.minimal_margin_score(LOGITS, x),
        lambda x: score(LOGITS, x),
        (CLASSES, COLUMNS),
    ),
    "select_smallest": (lambda x: marginops.select_smallest(x, 2).scores, smallest, (ROWS,)),
    "select_minimal_margin": (
        lambda x: marginops.select_minimal_margin(x, WEIGHT, k=2).scores,
        lambda x: smallest(score(x)),
        (ROWS, CLASSES),
    ),
    "select_classification_margin": (
        lambda x: marginops.select_classification_margin(x, TARGET, 2).scores,
        lambda x: smallest(margin(x)),
        (ROWS, CLASSES),
    ),
    "sample_statistics": (
        lambda x: fields(marginops.sample_statistics(x, TARGET)),
        statistics,
        (ROWS, CLASSES),
    ),
    "mean_loss": (
        lambda x: marginops.sample_statistics(x, TARGET).mean_loss(),
        lambda x: F.cross_entropy(x, TARGET),
        (ROWS, CLASSES),
    ),
    "linear_classification_margin": (
        lambda x: finite(marginops.linear_classification_margin(x, WEIGHT, TARGET, BIAS)),
        lambda x: finite(margin(head(x))),
        (ROWS, COLUMNS),
    ),
    "linear_minimal_margin_score": (
        lambda x: marginops.linear_minimal_margin_score(x, WEIGHT, BIAS),
        lambda x: score(head(x)),
        (ROWS, COLUMNS),
    ),
    "linear_select_minimal_margin": (
        lambda x: marginops.linear_select_minimal_margin(x, WEIGHT, BIAS, k=2).scores,
        lambda x: smallest(score(head(x))),
        (ROWS, COLUMNS),
    ),
    "linear_select_classification_margin": (
        lambda x: marginops.linear_select_classification_margin(x, WEIGHT, TARGET, k=2).scores,
        lambda x: smallest(margin(F.linear(x, WEIGHT))),
        (ROWS, COLUMNS),
    ),
    "linear_sample_statistics": (
        lambda x: fields(marginops.linear_sample_statistics(x, WEIGHT, TARGET, BIAS)),
        lambda x: statistics(head(x)),
        (ROWS, COLUMNS),
    ),
    "linear_sample_statistics of weight": (
        lambda x: marginops.linear_sample_statistics(FEATURES, x, TARGET).loss,
        lambda x: loss(F.linear(FEATURES, x)),
        (CLASSES, COLUMNS),
    ),
    "linear_log_prob": (
        lambda x: log_prob_and_entropy(x, WEIGHT),
        lambda x: tempered(head(x)),
        (ROWS, COLUMNS),
    ),
    "linear_log_prob of weight": (
        lambda x: log_prob_and_entropy(FEATURES, x),
        lambda x: tempered(F.linear(FEATURES, x, BIAS)),
        (CLASSES, COLUMNS),
    ),
    "class_moments": (class_moments, moments, (ROWS, COLUMNS)),
    "multi_margin_regularization": (
        lambda x: marginops.multi_margin_regularization(x, WEIGHT, TARGET),
        lambda x: regularization(x, WEIGHT, F.linear(x, WEIGHT)),
        (ROWS, COLUMNS),
    ),
    "MultiMarginRegularization of weight": (
        lambda x: marginops.multi_margin_regularization(FEATURES, x, TARGET, logits=LOGITS),
        lambda x: regularization(FEATURES, x, LOGITS),
        (CLASSES, COLUMNS),
    ),
    "margin_area": (marginops.margin_area, radius_area, (ROWS,)),
}

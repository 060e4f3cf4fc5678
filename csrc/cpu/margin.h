// The scores of the margin family, which the selection kernels call before they select.
#pragma once

#include <optional>

#include "tensor.h"

namespace marginops::cpu {

Tensor classification_margin(const Tensor& logits, const Tensor& target,
                             const std::optional<Tensor>& log_norm, int64_t ignore_index);

// Without a weight, `bias` and `nearest` do not count, and with it `softmax` does not.
Tensor minimal_margin_score(const Tensor& logits, const std::optional<Tensor>& weight,
                            const std::optional<Tensor>& bias, bool nearest, bool softmax);

}  // namespace marginops::cpu

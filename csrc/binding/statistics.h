// Checks of the arguments of sample_statistics_gradient, for the kernels of every device.
#pragma once

#include "checks.h"

namespace marginops {

inline void check_statistics_gradient(
    const Tensor& logits, const Tensor& target, const Tensor& rival, const Tensor& confidence,
    const Tensor& entropy, const Tensor& maximum, const Tensor& log_sum,
    const std::optional<Tensor>& log_norm, const std::optional<Tensor>& grad_margin,
    const std::optional<Tensor>& grad_loss, const std::optional<Tensor>& grad_confidence,
    const std::optional<Tensor>& grad_entropy, const std::optional<Tensor>& grad_mean_loss,
    const std::optional<Tensor>& num_counted) {
  check_logits(logits, 1);
  check_target(target, logits);
  check_vector("rival", rival, logits.size(0), "the rows of logits", ScalarType::Long, logits);
  check_values("confidence", confidence, logits);
  check_values("entropy", entropy, logits);
  check_values("maximum", maximum, logits);
  check_values("log_sum", log_sum, logits);
  check_values("grad_margin", grad_margin, logits);
  check_values("grad_loss", grad_loss, logits);
  check_values("grad_confidence", grad_confidence, logits);
  check_values("grad_entropy", grad_entropy, logits);
  check_number("grad_mean_loss", grad_mean_loss, logits);
  check_number("num_counted", num_counted, logits);
  check_log_norm(log_norm, logits);
}

}  // namespace marginops

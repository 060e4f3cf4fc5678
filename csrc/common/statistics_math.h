// The arithmetic of softmax statistics. The CPU and the CUDA kernels share it.
#pragma once

#include "margin_math.h"

namespace marginops {

// Sums of e = exp(logit - maximum) over the classes read so far. One class that has the maximum is
// left out: next to its e, which is 1, the small terms would be lost to rounding. Logits of -inf
// add nothing, whatever the maximum is. NaN needs no care here, because Top2 records it. merge() is
// associative and commutative up to rounding, so a row may be read in any pieces.
template <class Value>
struct ExponentialSums {
  Value maximum = -std::numeric_limits<Value>::infinity();
  Value plain = 0;     // sum of e
  Value weighted = 0;  // sum of e * (logit - maximum)
  Value squares = 0;   // sum of e * e

  MARGINOPS_FUNCTION void add(Value logit) {
    if (logit > maximum) {
      raise(logit);
    } else if (logit > -std::numeric_limits<Value>::infinity()) {
      const Value step = logit - maximum, e = std::exp(step);
      plain += e;
      if (e != 0) weighted += e * step;
      squares += e * e;
    }
  }

  MARGINOPS_FUNCTION void merge(ExponentialSums other) {
    if (other.maximum > maximum) {
      const ExponentialSums smaller = *this;
      *this = other;
      other = smaller;
    }
    if (other.maximum == -std::numeric_limits<Value>::infinity()) return;
    other.raise(maximum);
    plain += other.plain;
    weighted += other.weighted;
    squares += other.squares;
  }

  // Replaces the maximum by the logit of another class, which is not smaller. The class that was
  // left out so far now counts in the sums.
  MARGINOPS_FUNCTION void raise(Value new_maximum) {
    const Value step = maximum - new_maximum;
    const Value scale = std::exp(step);
    maximum = new_maximum;
    if (scale == 0) {  // a step of -inf times 0 would be NaN
      plain = weighted = squares = 0;
      return;
    }
    squares = scale * (scale * (1 + squares));
    weighted = scale * (weighted + step * (1 + plain));
    plain = scale * (1 + plain);
  }
};

// The difference of the probabilities of the two largest logits of a row. Two close numbers are
// subtracted only as logits, so the result is accurate relative to its value. A tie gives +0.0.
template <class Value>
MARGINOPS_FUNCTION Value top2_margin(const Top2<Value>& top, const ExponentialSums<Value>& sums) {
  const Value step = -top2_margin(top);
  return (0 - std::expm1(step)) / (1 + sums.plain);
}

// log(1 + x) for x >= 0, as accurate as std::log1p and twice as fast on the CPU. The last factor
// corrects the rounding of 1 + x.
template <class Value>
MARGINOPS_FUNCTION Value log_one_plus(Value x) {
  const Value sum = 1 + x;
  return sum == 1 ? x : std::log(sum) * (x / (sum - 1));
}

// Statistics of a sample's softmax, given its label.
template <class Value>
struct SoftmaxStatistics {
  Value loss, confidence, entropy, el2n;
  Value maximum, log_sum;  // log_sum: logarithm of the sum of exp(logit - maximum)
};

// The statistics of a row. `sums` has read every class, and `label_logit` is the logit of the
// label. No field loses digits to cancellation as the confidence approaches 1. If the row has a NaN
// or no finite maximum, every field is NaN, except that an infinite maximum is kept.
template <class Value>
MARGINOPS_FUNCTION SoftmaxStatistics<Value> softmax_statistics(const ExponentialSums<Value>& sums,
                                                               Value label_logit, bool nan) {
  constexpr Value kInfinity = std::numeric_limits<Value>::infinity();
  const Value maximum = nan ? std::numeric_limits<Value>::quiet_NaN() : sums.maximum;
  if (!(maximum > -kInfinity && maximum < kInfinity)) {
    constexpr Value kNan = std::numeric_limits<Value>::quiet_NaN();
    return {kNan, kNan, kNan, kNan, maximum, kNan};
  }
  const Value total = 1 + sums.plain, log_sum = log_one_plus(sums.plain);
  const Value step = label_logit - maximum, e = std::exp(step), confidence = e / total;
  Value square;
  if (label_logit == maximum) {  // the sums leave out the label or a class with an equal logit
    square = sums.plain * sums.plain + sums.squares;
  } else {
    const Value rest = sums.squares - e * e;
    square = (rest > 0 ? rest : Value{0}) + 1 + (total - e) * (total - e);
  }
  return {log_sum - step, confidence, log_sum - sums.weighted / total, std::sqrt(square) / total,
          maximum,        log_sum};
}

// An ignored sample counts as learnt perfectly.
template <class Value>
MARGINOPS_FUNCTION SoftmaxStatistics<Value> ignored_statistics() {
  return {0, 1, 0, 0, 0, 0};
}

// The norm of the loss's gradient for the weight and bias of the last layer. `input_norm` is the
// norm of the sample's features.
template <class Value>
MARGINOPS_FUNCTION Value last_layer_gradient_norm(Value el2n, Value input_norm) {
  return el2n * std::hypot(Value{1}, input_norm);
}

// The gradient of a row's statistics for its logits. The entry of the label is label(), and that of
// every other class is dense(). The caller adds the gradient of the margin to the label's entry and
// subtracts it from the rival's.
template <class Value>
struct SoftmaxGradient {
  Value maximum, log_sum;
  Value confidence, entropy;                       // results of the row
  Value grad_loss, grad_confidence, grad_entropy;  // gradients of the results

  MARGINOPS_FUNCTION Value log_probability(Value logit) const { return logit - maximum - log_sum; }

  // p_c * (grad_loss - grad_confidence * p_y - grad_entropy * (log p_c + entropy))
  MARGINOPS_FUNCTION Value dense(Value logit) const {
    const Value log_p = log_probability(logit), p = std::exp(log_p);
    return p == 0
               ? Value{0}
               : p * (grad_loss - grad_confidence * confidence - grad_entropy * (log_p + entropy));
  }

  // dense() of the label plus grad_confidence * p_y - grad_loss, in a form in which 1 - p_y does
  // not cancel.
  MARGINOPS_FUNCTION Value label(Value logit) const {
    const Value log_p = log_probability(logit);
    Value entropy_part = 0;
    if (grad_entropy != 0) {
      const Value p = std::exp(log_p);
      entropy_part = p == 0 ? Value{0} : p * grad_entropy * (log_p + entropy);
    }
    return std::expm1(log_p) * (grad_loss - grad_confidence * confidence) - entropy_part;
  }
};

}  // namespace marginops

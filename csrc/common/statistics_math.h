// The arithmetic of the statistics of a softmax, shared by the CPU and the CUDA kernels.
#pragma once

#include "margin_math.h"

namespace marginops {

// Sums of e = exp(logit - maximum) over the classes read so far, except for one that has the
// maximum: its 1 would swallow what the others add. Logits of -inf add nothing, whatever the
// maximum, and a NaN need not be noticed here; Top2 keeps it. merge() is associative and
// commutative up to rounding, so rows may be read in any pieces.
template <class Value>
struct ExponentialSums {
  Value maximum = -std::numeric_limits<Value>::infinity();
  Value plain = 0;     // of e
  Value weighted = 0;  // of e * (logit - maximum)
  Value squares = 0;   // of e * e

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

  // Measures from a maximum that is not smaller and that another class has, so that the class left
  // out so far counts.
  MARGINOPS_FUNCTION void raise(Value to) {
    const Value step = maximum - to;
    const Value scale = std::exp(step);
    maximum = to;
    if (scale == 0) {  // step may be -inf
      plain = weighted = squares = 0;
      return;
    }
    squares = scale * (scale * (1 + squares));
    weighted = scale * (weighted + step * (1 + plain));
    plain = scale * (1 + plain);
  }
};

// log(1 + x) of x >= 0, as accurate as std::log1p and twice as fast on the CPU: what rounding 1 + x
// took away is put back by the last factor.
template <class Value>
MARGINOPS_FUNCTION Value log_one_plus(Value x) {
  const Value sum = 1 + x;
  return sum == 1 ? x : std::log(sum) * (x / (sum - 1));
}

// What a sample's softmax says of its label.
template <class Value>
struct SoftmaxStatistics {
  Value loss, confidence, entropy, el2n;
  Value maximum, log_sum;  // log_sum: logarithm of the sum of exp(logit - maximum)
};

// Of a row of which `sums` has seen every class; `own` is the logit of its label. In no field does
// anything cancel as the confidence approaches 1. Without a finite maximum, or with a NaN in the
// row, everything is NaN but an infinite maximum itself.
template <class Value>
MARGINOPS_FUNCTION SoftmaxStatistics<Value> softmax_statistics(const ExponentialSums<Value>& sums,
                                                               Value own, bool nan) {
  constexpr Value kInfinity = std::numeric_limits<Value>::infinity();
  const Value maximum = nan ? std::numeric_limits<Value>::quiet_NaN() : sums.maximum;
  if (!(maximum > -kInfinity && maximum < kInfinity)) {
    constexpr Value kNan = std::numeric_limits<Value>::quiet_NaN();
    return {kNan, kNan, kNan, kNan, maximum, kNan};
  }
  const Value total = 1 + sums.plain, log_sum = log_one_plus(sums.plain);
  const Value step = own - maximum, e = std::exp(step), confidence = e / total;
  Value square;
  if (own == maximum) {  // the others' sums, whichever of several maxima was left out
    square = sums.plain * sums.plain + sums.squares;
  } else {
    const Value rest = sums.squares - e * e;
    square = (rest > 0 ? rest : Value{0}) + 1 + (total - e) * (total - e);
  }
  return {log_sum - step, confidence, log_sum - sums.weighted / total, std::sqrt(square) / total,
          maximum,        log_sum};
}

// Ignored samples count as learnt perfectly.
template <class Value>
MARGINOPS_FUNCTION SoftmaxStatistics<Value> ignored_statistics() {
  return {0, 1, 0, 0, 0, 0};
}

// The norm of the gradient of the loss for the last layer's weight and bias, of a sample whose
// features have the norm `input_norm`.
template <class Value>
MARGINOPS_FUNCTION Value last_layer_gradient_norm(Value el2n, Value input_norm) {
  return el2n * std::hypot(Value{1}, input_norm);
}

// The gradient of a row's statistics for its logits. Every class has its dense() part; the label's
// entry is label() instead, and the margin's `margin` is added there and taken from the rival.
template <class Value>
struct SoftmaxGradient {
  Value maximum, log_sum;
  Value confidence, entropy;                       // of the row
  Value grad_loss, grad_confidence, grad_entropy;  // of the result

  MARGINOPS_FUNCTION Value log_probability(Value logit) const { return logit - maximum - log_sum; }

  // p_c * (grad_loss - grad_confidence * p_y - grad_entropy * (log p_c + entropy))
  MARGINOPS_FUNCTION Value dense(Value logit) const {
    const Value log_p = log_probability(logit), p = std::exp(log_p);
    return p == 0
               ? Value{0}
               : p * (grad_loss - grad_confidence * confidence - grad_entropy * (log_p + entropy));
  }

  // The same with -grad_loss + grad_confidence * p_y added, where 1 - p_y does not cancel.
  MARGINOPS_FUNCTION Value label(Value logit) const {
    const Value log_p = log_probability(logit), p = std::exp(log_p);
    const Value entropy_part = p == 0 ? Value{0} : p * grad_entropy * (log_p + entropy);
    return std::expm1(log_p) * (grad_loss - grad_confidence * confidence) - entropy_part;
  }
};

}  // namespace marginops

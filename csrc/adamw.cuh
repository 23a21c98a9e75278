// One element of AdamW, and the scalars that all elements of a call share.
//
// With t the step, g the gradient times the clip factor and bc_i = 1 - beta_i^t:
//     m += (1 - beta1) (g - m);   v = beta2 v + (1 - beta2) g^2
//     torch:     p -= lr weight_decay p + lr / bc1 * m / (sqrt(v) / sqrt(bc2) + eps)
//     fairseq:   the same with eps / sqrt(bc2) for eps
// Elements are fp32 with IEEE square root and division, in the order written here and in kernels/adamw_ema.py; scalars
// are made in fp64. beta2 is the sum of two fp32 numbers, because 0.999 rounded to one leaves 1 - beta2 five digits.
#pragma once

#include "ema.cuh"

namespace d2v {

struct AdamWScalars {
  float clip;
  float weight;      // 1 - decay of the teacher
  float weight1;     // 1 - beta1
  float weight2;     // 1 - beta2
  float beta2;       // an fp32 number just below beta2
  float beta2_rest;  // what it lacks
  float eps;         // beside sqrt(v) / sqrt(bc2)
  float rate;        // lr / bc1
  float shrink;      // lr * weight_decay
  float root_scale;  // 1 / sqrt(bc2)
};

// The next fp32 number below the one nearest to x >= 0; 0 stays.
D2V_HOST_DEVICE float next_below(double x) {
  const float nearest = static_cast<float>(x);
  return nearest > 0.0f ? float_of(bits_of(nearest) - 1u) : nearest;
}

// step: counted from 1; a skipped first step has number 0 and counts as 1. decay: of the teacher.
D2V_HOST_DEVICE AdamWScalars adamw_scalars(double clip, double decay, double step, double lr, double beta1,
                                           double beta2, double eps, double weight_decay, bool fairseq) {
  const double t = step < 1.0 ? 1.0 : step;
  const double root_bias2 = sqrt(1.0 - pow(beta2, t));
  AdamWScalars s;
  s.clip = static_cast<float>(clip);
  s.weight = weight_of(decay);
  s.weight1 = static_cast<float>(1.0 - beta1);
  s.weight2 = static_cast<float>(1.0 - beta2);
  s.beta2 = next_below(beta2);
  s.beta2_rest = static_cast<float>(beta2 - s.beta2);
  s.eps = static_cast<float>(fairseq ? eps / root_bias2 : eps);
  s.rate = static_cast<float>(lr / (1.0 - pow(beta1, t)));
  s.shrink = static_cast<float>(lr * weight_decay);
  s.root_scale = static_cast<float>(1.0 / root_bias2);
  return s;
}

D2V_HOST_DEVICE void adamw_element(float& p, float g, float& m, float& v, const AdamWScalars& s) {
  g = g * s.clip;
  m = lerp(m, g, s.weight1);
  v = v * s.beta2 + (v * s.beta2_rest + s.weight2 * g * g);
  const float step = m / (sqrtf(v) * s.root_scale + s.eps);
  p = p - (s.shrink * p + s.rate * step);
}

}  // namespace d2v

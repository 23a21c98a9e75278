// One element of the moving average: teacher + (1 - decay) (student - teacher).
#pragma once

#include "host_device.cuh"

namespace d2v {

// start + weight * (end - start), from the nearer side, as torch.lerp.
D2V_HOST_DEVICE float lerp(float start, float end, float weight) {
  const float way = end - start;
  return weight < 0.5f ? start + weight * way : end - (1.0f - weight) * way;
}

// The weight of the student. fp32 would leave 1 - 0.99999 two digits.
D2V_HOST_DEVICE float weight_of(double decay) { return static_cast<float>(1.0 - decay); }

}  // namespace d2v

// Activations and their derivatives, a line at a time.
#pragma once

#include <cstdint>

namespace rmk {

enum class Function : int { kGelu = 0, kGeluTanh = 1, kRelu = 2, kSilu = 3, kSigmoid = 4 };  // as activation.py

// a[i] = f(z[i]), times value[i] where value is not null, for i < count.
void activate(Function f, const float* z, const float* value, int64_t count, float* a);

struct ActivationGradient {
  float* a;        // the activation, times `weight`
  float* d_z;      // u * weight times its derivative in z
  float* d_value;  // ... in value, where that is not null
};

// From u, the gradient of the activation of a row but for the row's weight. Returns the sum of u times the activation,
// in an order of its own.
float activate_backward(Function f, const float* z, const float* value, const float* u, float weight, int64_t count,
                        const ActivationGradient& out);

}  // namespace rmk

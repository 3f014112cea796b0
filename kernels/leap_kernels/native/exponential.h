// The exponential function on vectors of float.
#pragma once

#include "simd.h"

namespace leap {

// exp(-x) for x >= 0; NaN stays NaN. 0 beyond x = 60 (9e-27): a mask that is all but shut would make subnormal numbers of
// its weight, its gradient or their products, and a matrix product with 1 % of them takes twenty times as long.
// exp(r) = 1 + r + r^2 * poly(r) on |r| <= ln(2)/2; coefficients: own weighted least-squares fit, 3e-9 relative.
inline F32 exp_negative(F32 x) {
  const F32 shifted = x * -1.44269504088896341f + 12582912.0f;  // 1.5 * 2^23: rounds to an integer in the low bits
  const F32 n = shifted - 12582912.0f;
  F32 r = -x - n * 0.693359375f;  // ln 2 in two parts, the first exact in products
  r = r + n * 2.12194440e-4f;
  F32 p = 1.381460577e-3f * r + 8.368710987e-3f;
  p = p * r + 4.166838899e-2f;
  p = p * r + 1.666652113e-1f;
  p = p * r + 4.999999404e-1f;
  p = p * (r * r) + r + 1.0f;
  const I32 exponent = ((I32)shifted + 127) << 23;
  const F32 result = p * (F32)exponent;
  return x > 60.0f ? F32{} : result;
}

}  // namespace leap

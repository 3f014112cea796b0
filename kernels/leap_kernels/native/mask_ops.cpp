// Relaxed-mask forward and backward for CPUs: W * sigmoid((scale * P + g) / temperature) and its gradient with respect
// to P, with the logistic noise g regenerated from a counter so that nothing has to be stored between the two.
//
// Work is cut into chunks of fixed size with one partial sum each, added in order at the end, so neither the elements
// nor the sums depend on the number of threads. Every element goes through the same vector code (tails are padded into
// a scratch tile), so a shard computes bit for bit what the whole matrix does.

#include <algorithm>
#include <vector>

#include "exponential.h"
#include "philox.h"

namespace leap {
namespace {

constexpr int64_t kChunk = 16384;  // elements per partial sum

// log(u / (1 - u)) for u = (k + 0.5) * 2^-23, k = word >> 9.
//
// a = k + 0.5 and b = 2^23 - a are exact floats. The reduced argument f = (a - b 2^e) / (b 2^e) is formed from an exact
// difference, so the result keeps its relative accuracy near u = 1/2, where log(u) - log(1 - u) would cancel.
// log(1+f) = f - f^2/2 + f^3 * poly(f) on [sqrt(1/2) - 1, sqrt(2) - 1]; own weighted least-squares fit, 6e-9 relative.
inline F32 logistic(U32 words) {
  const F32 a = __builtin_convertvector((I32)(words >> 9), F32) + 0.5f;
  const F32 b = 8388608.0f - a;
  const F32 inverse = 1.0f / b;
  const I32 e = ((I32)(a * inverse) - 0x3f3504f3) >> 23;  // so that a / (b 2^e) lies in [sqrt(1/2), sqrt(2))
  const F32 power = (F32)((e + 127) << 23), inverse_power = (F32)((127 - e) << 23);
  const F32 f = (a - b * power) * (inverse * inverse_power);
  const F32 exponent = __builtin_convertvector(e, F32);
  F32 p = -7.634230703e-2f * f + 1.276146919e-1f;
  p = p * f + -1.316023320e-1f;
  p = p * f + 1.420177519e-1f;
  p = p * f + -1.662335396e-1f;
  p = p * f + 2.000122666e-1f;
  p = p * f + -2.500082254e-1f;
  p = p * f + 3.333333135e-1f;
  const F32 f2 = f * f;
  F32 tail = p * (f2 * f) + exponent * -2.12194440e-4f;
  tail = tail - 0.5f * f2;
  return (tail + f) + exponent * 0.693359375f;
}

struct Sigmoid {
  F32 value, slope;  // s(z) and s(z) (1 - s(z)), the latter without cancellation
};

inline Sigmoid sigmoid(F32 z) {
  const F32 e = exp_negative(z < 0.0f ? -z : z);
  const F32 s = 1.0f / (1.0f + e);
  const F32 small = e * s;
  return {z < 0.0f ? small : s, small * s};
}

struct Sums {
  double mask = 0, squares = 0, density = 0;
};

struct Scalars {
  float scale, inverse_temperature;
  bool noisy;
  Noise noise;
};

template <bool kNoisy>
void forward_tile(const Scalars& k, const uint32_t* words, const float* w, const float* p, float* out, Sums& sums) {
  F32 mask_sum{}, square_sum{}, density_sum{};
  for (int i = 0; i < kTile; i += kLanes) {
    const F32 scaled = load<F32>(p + i) * k.scale;
    const F32 z = (kNoisy ? scaled + logistic(load<U32>(words + i)) : scaled) * k.inverse_temperature;
    const F32 mask = sigmoid(z).value;
    const F32 masked = mask * load<F32>(w + i);
    store(out + i, masked);
    mask_sum += mask;
    square_sum += masked * masked;
    const Sigmoid density = sigmoid(scaled);  // named: GCC 12 crashes on `+= sigmoid(...).value`
    density_sum += density.value;
  }
  sums.mask += lane_sum(mask_sum);
  sums.squares += lane_sum(square_sum);
  sums.density += lane_sum(density_sum);
}

struct StatsGrad {
  float mask, squares, density;
};

template <bool kNoisy, bool kDensity>
void backward_tile(const Scalars& k, const StatsGrad& s, const uint32_t* words, const float* grad, const float* w,
                   const float* p, float* out) {
  const FlushSubnormals flush;  // not around conversions: small half-precision gradients pass through such numbers
  const float slope_factor = k.scale * k.inverse_temperature, density_factor = k.scale * s.density;
  for (int i = 0; i < kTile; i += kLanes) {
    const F32 scaled = load<F32>(p + i) * k.scale;
    const F32 z = (kNoisy ? scaled + logistic(load<U32>(words + i)) : scaled) * k.inverse_temperature;
    const Sigmoid mask = sigmoid(z);
    const F32 weight = load<F32>(w + i);
    const F32 grad_mask = weight * (load<F32>(grad + i) + (2.0f * s.squares) * (mask.value * weight)) + s.mask;
    F32 result = grad_mask * mask.slope * slope_factor;
    if (kDensity) {
      const Sigmoid density = sigmoid(scaled);
      result += density.slope * density_factor;
    }
    store(out + i, result);
  }
}

// Padding logits are -infinity: mask and density are then exactly 0 and add nothing to the sums.
constexpr float kPadLogit = -__builtin_inff();

}  // namespace
}  // namespace leap

using namespace leap;

// masked = mask * weight (dtype of weight); stats[3] = sum mask, sum masked^2, sum sigmoid(scale * logits).
extern "C" void leap_mask_forward(const void* weight, int weight_dtype, const void* logits, int logits_dtype,
                                  void* masked, double* stats, int64_t count, int64_t offset, float scale,
                                  float temperature, int noisy, uint64_t seed, uint32_t layer, uint32_t step,
                                  int threads) {
  const Scalars scalars{scale, 1.0f / temperature, noisy != 0, {seed, layer, step}};
  const int64_t chunks = (count + kChunk - 1) / kChunk;
  std::vector<Sums> partial(static_cast<size_t>(chunks));
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t c = 0; c < chunks; ++c) {
    TileIn w{weight, weight_dtype, 0.0f, {}}, p{logits, logits_dtype, kPadLogit, {}};
    TileOut out{masked, weight_dtype, {}};
    uint32_t buffer[kWordBuffer];
    Sums& sums = partial[size_t(c)];
    for_each_tile(c * kChunk, std::min(count, (c + 1) * kChunk), [&](int64_t i, int n) {
      const float* w_tile = w.at(i, n);
      const float* p_tile = p.at(i, n);
      float* out_tile = out.at(i, n);
      if (scalars.noisy) {
        const uint32_t* words = tile_words(scalars.noise, uint64_t(offset + i), buffer);
        forward_tile<true>(scalars, words, w_tile, p_tile, out_tile, sums);
      } else {
        forward_tile<false>(scalars, nullptr, w_tile, p_tile, out_tile, sums);
      }
      out.flush(out_tile, i, n);
    });
  }
  stats[0] = stats[1] = stats[2] = 0;
  for (const Sums& sums : partial) {
    stats[0] += sums.mask;
    stats[1] += sums.squares;
    stats[2] += sums.density;
  }
}

// grad_logits (dtype of logits) from the gradients of masked and of stats; it may be the same memory as grad_masked
// when the dtypes agree, because a tile is read before it is written.
extern "C" void leap_mask_backward(const void* grad_masked, int grad_dtype, const void* weight, int weight_dtype,
                                   const void* logits, int logits_dtype, const double* stats_grad, void* grad_logits,
                                   int64_t count, int64_t offset, float scale, float temperature, int noisy,
                                   uint64_t seed, uint32_t layer, uint32_t step, int threads) {
  const Scalars scalars{scale, 1.0f / temperature, noisy != 0, {seed, layer, step}};
  const StatsGrad s{float(stats_grad[0]), float(stats_grad[1]), float(stats_grad[2])};
  const auto tile = scalars.noisy ? (s.density != 0 ? backward_tile<true, true> : backward_tile<true, false>)
                                  : (s.density != 0 ? backward_tile<false, true> : backward_tile<false, false>);
  const int64_t chunks = (count + kChunk - 1) / kChunk;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t c = 0; c < chunks; ++c) {
    TileIn grad{grad_masked, grad_dtype, 0.0f, {}}, w{weight, weight_dtype, 0.0f, {}};
    TileIn p{logits, logits_dtype, kPadLogit, {}};
    TileOut out{grad_logits, logits_dtype, {}};
    uint32_t buffer[kWordBuffer];
    for_each_tile(c * kChunk, std::min(count, (c + 1) * kChunk), [&](int64_t i, int n) {
      const uint32_t* words = scalars.noisy ? tile_words(scalars.noise, uint64_t(offset + i), buffer) : nullptr;
      float* out_tile = out.at(i, n);
      tile(scalars, s, words, grad.at(i, n), w.at(i, n), p.at(i, n), out_tile);
      out.flush(out_tile, i, n);
    });
  }
}

// The raw Philox words of weights offset .. offset + count, for checking against other implementations.
extern "C" void leap_philox_words(uint32_t* words, int64_t count, int64_t offset, uint64_t seed, uint32_t layer,
                                  uint32_t step) {
  uint32_t buffer[kWordBuffer];
  for_each_tile(0, count, [&](int64_t i, int n) {
    std::copy_n(tile_words({seed, layer, step}, uint64_t(offset + i), buffer), n, words + i);
  });
}

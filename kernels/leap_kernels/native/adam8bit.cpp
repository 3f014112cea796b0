// One step of Adam on a flat slice of logits, both moments packed into 16 bits (adam8bit.py says how).
//
// One pass over memory instead of some thirty: the state is unpacked, moved, used and packed again tile by tile. Every
// element goes through the same code (tails are padded into a scratch tile), so a slice of a matrix computes bit for
// bit what the whole does, on any number of threads. The loops are plain ones that compilers turn into vectors.

#include <algorithm>
#include <cstdint>

#include "philox.h"

namespace leap {
namespace {

constexpr int kCodes = 1024, kPerOctave = 12, kFloorExponent = -68;  // of v
constexpr int kZero = 32, kMaxMultiple = 31;                          // of m in multiples of sqrt(v)

struct Step {
  float unit;  // of m, in multiples of sqrt(v)
  float keep1, add1, keep2, add2;
  float rate, root_scale;  // with both bias corrections
  float shift;             // of every logit
};

// v by code: 2^octave for whole octaves, times 2^f for what is left, 0 for code 0. Computed, since gathers from a table of
// all codes are slower (7.0 against 5.7 ns a weight for the whole step on Sapphire Rapids).
// 2^f = 1 + f * poly(f): own weighted least-squares fit, 7e-8 relative at the twelfths.
inline float grid_value(int code) {
  const int octave = (code - 1 + kPerOctave) / kPerOctave - 1;  // rounds down for code 0 too
  const float f = float(code - 1 - kPerOctave * octave) * (1.0f / float(kPerOctave));
  float p = 1.824269188e-3f * f + 9.101247415e-3f;
  p = p * f + 5.574537441e-2f;
  p = p * f + 2.401773185e-1f;
  p = p * f + 6.931505203e-1f;
  const float power = bits_to_float(uint32_t(octave + kFloorExponent + 127) << 23);
  return code > 0 ? power * (p * f + 1.0f) : 0.0f;
}

inline float middle(uint32_t byte) { return (float(byte) + 0.5f) * (1.0f / 256.0f); }

// Number of the greatest grid value that v is not below. The logarithm by mantissa and exponent is off by less than a
// hundredth of an octave, so the guess by at most one.
inline int code_below(float v) {
  const int32_t bits = int32_t(float_to_bits(v));
  const float t = bits_to_float((uint32_t(bits) & 0x7fffffu) | 0x3f800000u) - 1.0f;
  const float log2 = float((bits >> 23) - 127) + t * (1.344f - 0.344f * t);
  int code = int((log2 - float(kFloorExponent)) * float(kPerOctave) + 1.0f);
  code = std::min(std::max(code, 0), kCodes - 1);
  code -= int(v < grid_value(code)) & int(code > 0);
  return code + (int(v >= grid_value(code + 1)) & int(code < kCodes - 1));
}

void update_tile(const Step& s, const uint32_t* words, const float* grad, float* logits, int16_t* moments) {
  const FlushSubnormals flush;  // not around conversions: small half-precision gradients pass through such numbers
  float m[kTile], v[kTile];
  for (int i = 0; i < kTile; ++i) {
    const int bits = int(moments[i]) + 32768;
    const int code = bits >> 6;
    const float old = grid_value(code);
    m[i] = float((bits & 63) - kZero) * s.unit * __builtin_sqrtf(old) * s.keep1 + grad[i] * s.add1;
    v[i] = old * s.keep2 + grad[i] * grad[i] * s.add2;
  }
  for (int i = 0; i < kTile; ++i) {
    logits[i] -= s.rate * (m[i] / (__builtin_sqrtf(v[i]) * s.root_scale + 1e-8f)) + s.shift;
  }
  for (int i = 0; i < kTile; ++i) {
    int code = code_below(v[i]);
    const float low = grid_value(code), gap = grid_value(code + 1) - low;
    code = std::min(code + int(v[i] - low > gap * middle(words[i] & 255)), kCodes - 1);
    const float exact = m[i] / (__builtin_sqrtf(grid_value(code)) * s.unit) + middle((words[i] >> 8) & 255);
    const float bounded = std::min(std::max(__builtin_floorf(exact), -float(kMaxMultiple)), float(kMaxMultiple));
    const int multiple = code > 0 ? int(bounded) : 0;  // m is given up where v rounds to 0
    moments[i] = int16_t(code * 64 + multiple + kZero - 32768);
  }
}

// float32 to bfloat16, up or down at random with the mean kept, by the upper halves of the words.
void round_tile(const uint32_t* words, const float* logits, uint16_t* out, int count) {
  for (int i = 0; i < count; ++i) out[i] = uint16_t((float_to_bits(logits[i]) + (words[i] >> 16)) >> 16);
}

}  // namespace
}  // namespace leap

using namespace leap;

// Updates logits (float32 or bfloat16) and moments [count] in place. rate is divided by Adam's first bias correction,
// root_scale is one over the root of the second, shift what every logit moves down by besides; first is the slice's
// place in its matrix, for the random words.
extern "C" void leap_adam8bit(void* logits, int logits_dtype, const void* grad, int grad_dtype, int16_t* moments,
                              int64_t count, int64_t first, float unit, float beta1, float beta2, float rate,
                              float root_scale, float shift, uint64_t seed, uint32_t layer, uint32_t step,
                              int threads) {
  const Step s{unit, beta1, 1 - beta1, beta2, 1 - beta2, rate, root_scale, shift};
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t tile = 0; tile < (count + kTile - 1) / kTile; ++tile) {
    const int64_t i = tile * kTile;
    const int n = int(std::min<int64_t>(kTile, count - i));
    uint32_t buffer[kWordBuffer];
    const uint32_t* words = tile_words({seed, layer, step}, uint64_t(first + i), buffer);
    float p[kTile], g[kTile];
    int16_t state[kTile];
    load_as_float(logits, logits_dtype, i, n, p);
    load_as_float(grad, grad_dtype, i, n, g);
    std::copy_n(moments + i, n, state);
    std::fill(p + n, p + kTile, 0.0f);
    std::fill(g + n, g + kTile, 0.0f);
    std::fill(state + n, state + kTile, int16_t(kZero - 32768));
    update_tile(s, words, g, p, state);
    std::copy_n(state, n, moments + i);
    if (logits_dtype == kBFloat16) {
      round_tile(words, p, static_cast<uint16_t*>(logits) + i, n);
    } else {
      store_from_float(p, logits_dtype, i, n, logits);
    }
  }
}

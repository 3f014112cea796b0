// Histograms of values by the upper or the lower half of a key that orders them, see radix_counts.py.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "simd.h"

namespace leap {
namespace {

constexpr int kBuckets = 1 << 16;
constexpr int kTile = 1024;
constexpr int64_t kChunk = 1 << 20;  // elements of one thread at a time; a count of them fits into 32 bits

// Positive floats are ordered like their bits, negative ones the other way round; -0 counts as 0.
inline int32_t ordered_key(float value) {
  const int32_t bits = int32_t(float_to_bits(value + 0.0f));
  return bits ^ ((bits >> 31) & 0x7fffffff);
}

// Calls body(key of a value, its histogram) for all values, a histogram for each thread, and adds these to counts.
template <typename Body>
void count(const void* values, int dtype, int64_t size, int64_t* counts, int threads, Body body) {
#pragma omp parallel num_threads(threads)
  {
    std::vector<uint32_t> own(kBuckets);
    float tile[kTile];
#pragma omp for schedule(static)
    for (int64_t chunk = 0; chunk < (size + kChunk - 1) / kChunk; ++chunk) {
      std::fill(own.begin(), own.end(), 0u);
      const int64_t last = std::min(size, (chunk + 1) * kChunk);
      for (int64_t i = chunk * kChunk; i < last; i += kTile) {
        const int n = int(std::min<int64_t>(kTile, last - i));
        load_as_float(values, dtype, i, n, tile);
        for (int k = 0; k < n; ++k) body(tile[k], own.data());
      }
#pragma omp critical
      for (int b = 0; b < kBuckets; ++b) counts[b] += own[size_t(b)];
    }
  }
}

}  // namespace
}  // namespace leap

using namespace leap;

// Adds to counts [65536] how many values have each upper half of the key; returns whether any is NaN.
extern "C" int leap_count_high(const void* values, int dtype, int64_t size, int64_t* counts, int threads) {
  int nan = 0;
  count(values, dtype, size, counts, threads, [&nan](float value, uint32_t* own) {
    if (value != value) nan = 1;  // every thread that writes it writes the same
    ++own[(ordered_key(value) >> 16) + kBuckets / 2];
  });
  return nan;
}

// Adds to counts [65536], of the values whose upper half is `upper`, how many have each lower half.
extern "C" void leap_count_low(const void* values, int dtype, int64_t size, int upper, int64_t* counts, int threads) {
  count(values, dtype, size, counts, threads, [upper](float value, uint32_t* own) {
    const int32_t key = ordered_key(value);
    if ((key >> 16) + kBuckets / 2 == upper) ++own[key & 0xffff];
  });
}

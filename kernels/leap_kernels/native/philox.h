// The random words of masks and of stochastic rounding, a tile of elements at a time (philox.py says which is whose).
#pragma once

#include <algorithm>

#include "tile.h"

namespace leap {

struct Noise {
  uint64_t seed;
  uint32_t layer, step;
};

// Low half of each 64-bit lane times a 32-bit constant, as 64 bits. The upper half of `a` may hold anything.
inline U64 multiply_low(U64 a, uint32_t m) {
#if defined(__AVX512F__) && defined(__AVX512DQ__)
  return (U64)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(m));
#elif defined(__AVX2__)
  return (U64)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(m));
#else
  return (a & 0xffffffffull) * uint64_t(m);
#endif
}

// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011) for the weights
// first .. first + kTile, rounded outwards to whole blocks of four; returns where word `first` landed in `buffer`.
//
// One block per 64-bit lane: the widening products are then single instructions, and what they leave in the upper
// halves is never read.
inline const uint32_t* tile_words(const Noise& noise, uint64_t first, uint32_t* buffer) {
  constexpr int kBlockLanes = kVectorBytes / 8;
  constexpr int kBlocks = kTile / 4 + kBlockLanes;  // one more vector, for tiles that start inside a block
  uint64_t low_words[kBlocks], high_words[kBlocks];
  uint64_t key0[10], key1[10];
  for (uint32_t r = 0; r < 10; ++r) {
    key0[r] = uint32_t(noise.seed) + r * 0x9E3779B9u;
    key1[r] = uint32_t(noise.seed >> 32) + r * 0xBB67AE85u;
  }
  uint64_t lane_index[kBlockLanes];
  for (int i = 0; i < kBlockLanes; ++i) lane_index[i] = uint64_t(i);
  const U64 lanes = load<U64>(lane_index);
  const uint64_t first_block = first >> 2;
  for (int b = 0; b < kBlocks; b += kBlockLanes) {
    const U64 block = lanes + (first_block + uint64_t(b));
    U64 c0 = block, c1 = block >> 32, c2 = (block ^ block) + noise.step, c3 = (block ^ block) + noise.layer;
    for (int r = 0; r < 10; ++r) {
      const U64 product0 = multiply_low(c0, 0xD2511F53u);
      const U64 product1 = multiply_low(c2, 0xCD9E8D57u);
      c0 = (product1 >> 32) ^ c1 ^ key0[r];
      c1 = product1;
      c2 = (product0 >> 32) ^ c3 ^ key1[r];
      c3 = product0;
    }
    store(low_words + b, (c0 & 0xffffffffull) | (c1 << 32));
    store(high_words + b, (c2 & 0xffffffffull) | (c3 << 32));
  }
  uint64_t* pairs = reinterpret_cast<uint64_t*>(buffer);
  for (int b = 0; b < kBlocks; ++b) {
    pairs[2 * b] = low_words[b];
    pairs[2 * b + 1] = high_words[b];
  }
  return buffer + (first & 3);
}

constexpr int kWordBuffer = kTile + 4 * (kVectorBytes / 8);

template <typename Body>
void for_each_tile(int64_t first, int64_t last, Body body) {
  for (int64_t i = first; i < last; i += kTile) body(i, int(std::min<int64_t>(kTile, last - i)));
}

}  // namespace leap

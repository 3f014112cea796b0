// y = x W^T for a BMP128 matrix (see bmp128.py) on CPUs, for few rows of x.
//
// A row's values lie one after the other, so a kernel walks them with a pointer that advances by the popcount of each
// word; of `off` only the start of the row (or of a stretch of it) is read, which saves its bytes. Values are expanded
// to their columns in registers by a permutation, whose indices AVX-512 counts and AVX2 looks up in a table of 256
// entries. Sums are float32, in an order that depends on the instruction set and on how many rows x has, but not on the
// number of threads.

#include <algorithm>
#include <cstdlib>
#include <vector>

#include "simd.h"

#if defined(__x86_64__)
#define LEAP_AVX2_FEATURES "avx2,fma,popcnt,bmi,bmi2"
#define LEAP_AVX512_FEATURES LEAP_AVX2_FEATURES ",avx512f,avx512bw,avx512dq,avx512vl,avx512bitalg,avx512vpopcntdq"
#define LEAP_AVX2 __attribute__((target(LEAP_AVX2_FEATURES)))
#define LEAP_AVX512 __attribute__((target(LEAP_AVX512_FEATURES)))
#define LEAP_AVX512_BF16 __attribute__((target(LEAP_AVX512_FEATURES ",avx512bf16")))
#endif

namespace leap {
namespace {

enum Isa : int { kScalar = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3 };  // numbers known to gemv_bitmap_cpu.py
constexpr const char* kIsaNames[] = {"scalar", "avx2", "avx512", "avx512_bf16"};

// Several rows of x are taken in blocks of 8, 4, 2 and 1.
int block_width(int remaining) { return 1 << std::min(3, 31 - __builtin_clz(unsigned(remaining))); }

// Matrix rows that a kernel takes at a time, from far apart: each of them begins a stretch of memory that the following
// tasks read on, so that the hardware prefetches two long streams. Measured on Zen 4 (4096 x 4096, half kept, float32 /
// bfloat16): 2.5 / 1.4 ms with one row, 2.2 / 1.1 with two, 2.5 / 1.6 with four. Neighbouring rows gain nothing, since
// each stream breaks off at its row's end.
constexpr int kRows = 2;

// A stretch of whole groups of kRows matrix rows, and the same columns of a block of x.
struct Slice {
  const uint32_t* bits[kRows];
  const void* vals[kRows];
  const void* x;  // as PreparedX lays it out
  int64_t words;
  int64_t prefetch_bytes;  // how far ahead of the values in use memory is fetched
};

// A kernel adds the products of a slice's row r with row b of B rows of x to sums[r][b].
using Sums = float[kRows][8];
using Kernel = void (*)(const Slice&, Sums& sums);

// Enough independent accumulators for the latency of a fused multiply-add.
constexpr int accumulators(int batch) { return std::max(1, 4 / (batch * kRows)); }

inline void prefetch(const void* vals, int64_t ahead) { __builtin_prefetch(static_cast<const char*>(vals) + ahead); }

float value_at(const float* vals) { return *vals; }
float value_at(const uint16_t* vals) { return bf16_to_float(*vals); }

template <typename T, int B>
void slice_scalar(const Slice& slice, Sums& sums) {
  const float* x = static_cast<const float*>(slice.x);
  for (int r = 0; r < kRows; ++r) {
    const float* xr = x;
    const T* v = static_cast<const T*>(slice.vals[r]);
    for (int64_t w = 0; w < slice.words; ++w, xr += 32 * B) {
      for (uint32_t word = slice.bits[r][w]; word != 0; word &= word - 1) {
        const float value = value_at(v++);
        for (int b = 0; b < B; ++b) sums[r][b] += value * xr[32 * b + __builtin_ctz(word)];
      }
    }
  }
}

#if defined(__x86_64__)

// For each byte of mask, where each of 8 lanes finds its value, with the sign bit set where it has none: for float32 its
// number, for bfloat16 those of its two bytes.
struct ExpandLanes {
  alignas(32) int32_t of[256][8];
};
struct ExpandBytes {
  alignas(16) uint8_t of[256][16];
};

constexpr ExpandLanes make_expand_lanes() {
  ExpandLanes table{};
  for (int byte = 0; byte < 256; ++byte) {
    for (int lane = 0, rank = 0; lane < 8; ++lane) {
      const bool kept = (byte >> lane) & 1;
      table.of[byte][lane] = kept ? rank : INT32_MIN;
      rank += kept;
    }
  }
  return table;
}

constexpr ExpandLanes kExpandLanes = make_expand_lanes();

constexpr ExpandBytes make_expand_bytes() {
  ExpandBytes table{};
  for (int byte = 0; byte < 256; ++byte) {
    for (int i = 0; i < 16; ++i) {
      const int lane = kExpandLanes.of[byte][i / 2];
      table.of[byte][i] = lane < 0 ? 0x80 : uint8_t(2 * lane + i % 2);
    }
  }
  return table;
}

constexpr ExpandBytes kExpandBytes = make_expand_bytes();

// How many values the columns before each byte of a mask word have.
inline int count_below(uint32_t word, int byte) { return __builtin_popcount(word & ((1u << (8 * byte)) - 1)); }

LEAP_AVX2 inline float sum8(__m256 v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}

template <int B, int kAcc>
LEAP_AVX2 inline void add_sums(__m256 (&acc)[B][kAcc], float* sums) {
  for (int b = 0; b < B; ++b) {
    for (int s = 1; s < kAcc; ++s) acc[b][0] = _mm256_add_ps(acc[b][0], acc[b][s]);
    sums[b] += sum8(acc[b][0]);
  }
}

// A zero that the compiler does not see through: of a blend with one it makes a comparison and an AND.
LEAP_AVX2 inline __m256 opaque_zero() {
  __m256 zero = _mm256_setzero_ps();
  __asm__("" : "+x"(zero));
  return zero;
}

template <int B>
LEAP_AVX2 void slice_avx2(const Slice& slice, Sums& sums) {
  constexpr int kAcc = accumulators(B);
  const __m256 zero = opaque_zero();
  const float* x = static_cast<const float*>(slice.x);
  const float* v[kRows];
  __m256 acc[kRows][B][kAcc] = {};
  for (int r = 0; r < kRows; ++r) v[r] = static_cast<const float*>(slice.vals[r]);
  for (int64_t w = 0; w < slice.words; ++w, x += 32 * B) {
#pragma GCC unroll 2
    for (int r = 0; r < kRows; ++r) {
      const uint32_t word = slice.bits[r][w];
      prefetch(v[r], slice.prefetch_bytes);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const __m256 values = _mm256_loadu_ps(v[r] + count_below(word, i));
        const __m256 lanes = _mm256_load_ps(reinterpret_cast<const float*>(kExpandLanes.of[(word >> (8 * i)) & 0xff]));
        const __m256 spread = _mm256_permutevar8x32_ps(values, _mm256_castps_si256(lanes));
        const __m256 expanded = _mm256_blendv_ps(spread, zero, lanes);
        for (int b = 0; b < B; ++b) {
          __m256& sum = acc[r][b][i % kAcc];
          sum = _mm256_fmadd_ps(expanded, _mm256_load_ps(x + 32 * b + 8 * i), sum);
        }
      }
      v[r] += __builtin_popcount(word);
    }
  }
  for (int r = 0; r < kRows; ++r) add_sums<B, kAcc>(acc[r], sums[r]);
}

// 8 bfloat16 from `vals` on, which a byte of the mask picks from, and how it picks.
LEAP_AVX2 inline __m128i load_values(const uint16_t* vals) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(vals));
}
LEAP_AVX2 inline __m128i load_picks(uint8_t byte) {
  return _mm_load_si128(reinterpret_cast<const __m128i*>(kExpandBytes.of[byte]));
}

// bfloat16, 16 columns by one shuffle of bytes, which also writes the zeros; the even and the odd columns are then
// widened apart.
template <int B>
LEAP_AVX2 void slice_avx2_bf16(const Slice& slice, Sums& sums) {
  constexpr int kAcc = std::max(2, accumulators(B));
  const __m256i upper = _mm256_set1_epi32(int(0xffff0000u));
  const float* x = static_cast<const float*>(slice.x);
  const uint16_t* v[kRows];
  __m256 acc[kRows][B][kAcc] = {};
  for (int r = 0; r < kRows; ++r) v[r] = static_cast<const uint16_t*>(slice.vals[r]);
  for (int64_t w = 0; w < slice.words; ++w, x += 32 * B) {
#pragma GCC unroll 2
    for (int r = 0; r < kRows; ++r) {
      const uint8_t* bytes = reinterpret_cast<const uint8_t*>(slice.bits[r] + w);
      prefetch(v[r], slice.prefetch_bytes);
#pragma GCC unroll 2
      for (int i = 0; i < 4; i += 2) {
        const uint8_t low = bytes[i], high = bytes[i + 1];
        const uint16_t* second = v[r] + __builtin_popcount(low);
        const __m256i values = _mm256_set_m128i(load_values(second), load_values(v[r]));
        const __m256i picks = _mm256_set_m128i(load_picks(high), load_picks(low));
        const __m256i pairs = _mm256_shuffle_epi8(values, picks);
        const __m256 even = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
        const __m256 odd = _mm256_castsi256_ps(_mm256_and_si256(pairs, upper));
        for (int b = 0; b < B; ++b) {
          __m256& first = acc[r][b][i % kAcc];
          first = _mm256_fmadd_ps(even, _mm256_load_ps(x + 32 * b + 8 * i), first);
          __m256& other = acc[r][b][(i + 1) % kAcc];
          other = _mm256_fmadd_ps(odd, _mm256_load_ps(x + 32 * b + 8 * i + 8), other);
        }
        v[r] = second + __builtin_popcount(high);
      }
    }
  }
  for (int r = 0; r < kRows; ++r) add_sums<B, kAcc>(acc[r], sums[r]);
}

// Values to their columns: a lane's value stands at the number of bits below the lane's own, and a permutation fetches
// it from there. On AMD's Zen 5 this takes 1.1 ns for 32 bfloat16, against 1.9 ns with VPEXPANDW, the instruction made
// for it, and 4 ns where the compiler lets that one read memory itself.

// A mask word in all lanes, straight from memory; compilers take it through a general register, which costs a transfer.
LEAP_AVX512 inline __m512i broadcast(const uint32_t* word) {
  __m512i words;
  __asm__("vpbroadcastd %1, %0" : "=v"(words) : "m"(*word));
  return words;
}

LEAP_AVX512 inline __m512i lane_numbers() {
  return _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
}

// A count of values, for the upper halves of the lanes; loading it is cheaper than counting in vector registers.
alignas(64) constexpr uint32_t kUpperHalf[17] = {0x00000, 0x10000, 0x20000, 0x30000, 0x40000,  0x50000,
                                                 0x60000, 0x70000, 0x80000, 0x90000, 0xa0000,  0xb0000,
                                                 0xc0000, 0xd0000, 0xe0000, 0xf0000, 0x100000};

// 32 bfloat16 by one mask word. Of each 32-bit lane i the lower half is column i, the upper half column 16 + i.
LEAP_AVX512 inline __m512i expand(const uint32_t* word, const uint16_t* vals) {
  const __m512i lane = _mm512_sllv_epi32(_mm512_set1_epi32(0x00010001), lane_numbers());
  const __m512i below = _mm512_sub_epi16(lane, _mm512_set1_epi16(1));
  const __m512i words = broadcast(word);
  const __m512i in_lower_half = broadcast(&kUpperHalf[__builtin_popcount(*word & 0xffff)]);
  const __m512i rank = _mm512_add_epi16(_mm512_popcnt_epi16(_mm512_and_si512(words, below)), in_lower_half);
  return _mm512_maskz_permutexvar_epi16(_mm512_test_epi16_mask(words, lane), rank, _mm512_loadu_si512(vals));
}

// 16 float32 by the lower half of each lane of `words`.
LEAP_AVX512 inline __m512 expand(__mmask16 mask, __m512i words, const float* vals) {
  const __m512i lane = _mm512_sllv_epi32(_mm512_set1_epi32(1), lane_numbers());
  const __m512i below = _mm512_sub_epi32(lane, _mm512_set1_epi32(1));
  const __m512i rank = _mm512_popcnt_epi32(_mm512_and_si512(words, below));
  return _mm512_maskz_permutexvar_ps(mask, rank, _mm512_loadu_ps(vals));
}

// How each AVX-512 kernel adds the 32 columns of one mask word to its sums; x points to the block's columns.

struct Float32 {
  using Value = float;
  template <int B, int kSums>
  LEAP_AVX512 static inline void add(const uint32_t* word, const float* v, const float* x, int i,
                                     __m512 (&sums)[B][kSums]) {
    const __m512i words = broadcast(word);
    const __m512 low = expand(__mmask16(*word), words, v);
    const __m512 high =
        expand(__mmask16(*word >> 16), _mm512_srli_epi32(words, 16), v + __builtin_popcount(*word & 0xffff));
    for (int b = 0; b < B; ++b) {
      __m512& first = sums[b][(2 * i) % kSums];
      first = _mm512_fmadd_ps(low, _mm512_load_ps(x + 32 * b), first);
      __m512& second = sums[b][(2 * i + 1) % kSums];
      second = _mm512_fmadd_ps(high, _mm512_load_ps(x + 32 * b + 16), second);
    }
  }
};

// bfloat16 without its own instructions: the lower and upper halves of the lanes are widened apart.
struct BFloat16Split {
  using Value = uint16_t;
  template <int B, int kSums>
  LEAP_AVX512 static inline void add(const uint32_t* word, const uint16_t* v, const float* x, int i,
                                     __m512 (&sums)[B][kSums]) {
    const __m512i pairs = expand(word, v);
    const __m512 low = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
    const __m512 high = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(int(0xffff0000u))));
    for (int b = 0; b < B; ++b) {
      __m512& first = sums[b][(2 * i) % kSums];
      first = _mm512_fmadd_ps(low, _mm512_load_ps(x + 32 * b), first);
      __m512& second = sums[b][(2 * i + 1) % kSums];
      second = _mm512_fmadd_ps(high, _mm512_load_ps(x + 32 * b + 16), second);
    }
  }
};

template <typename Format, int B>
LEAP_AVX512 void slice_avx512(const Slice& slice, Sums& sums) {
  constexpr int kAcc = accumulators(B);
  const float* x = static_cast<const float*>(slice.x);
  const typename Format::Value* v[kRows];
  __m512 acc[kRows][B][kAcc];
  for (int r = 0; r < kRows; ++r) {
    v[r] = static_cast<const typename Format::Value*>(slice.vals[r]);
    for (int b = 0; b < B; ++b)
      for (int s = 0; s < kAcc; ++s) acc[r][b][s] = _mm512_setzero_ps();
  }
  for (int64_t w = 0; w < slice.words; w += 2, x += 64 * B) {
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
#pragma GCC unroll 2
      for (int r = 0; r < kRows; ++r) {
        prefetch(v[r], slice.prefetch_bytes);
        Format::add(slice.bits[r] + w + i, v[r], x + 32 * B * i, i, acc[r]);
        v[r] += __builtin_popcount(slice.bits[r][w + i]);
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int b = 0; b < B; ++b) {
      for (int s = 1; s < kAcc; ++s) acc[r][b][0] = _mm512_add_ps(acc[r][b][0], acc[r][b][s]);
      sums[r][b] += _mm512_reduce_add_ps(acc[r][b][0]);
    }
  }
}

// bfloat16 dot products in hardware, x in bfloat16. Products of two bfloat16 are exact in float32, so against the other
// kernels only the order of the sum differs (and subnormal numbers count as 0).
template <int B>
LEAP_AVX512_BF16 void slice_avx512_dot(const Slice& slice, Sums& sums) {
  constexpr int kAcc = accumulators(B);
  const uint16_t* x = static_cast<const uint16_t*>(slice.x);
  const uint16_t* v[kRows];
  __m512 acc[kRows][B][kAcc];
  for (int r = 0; r < kRows; ++r) {
    v[r] = static_cast<const uint16_t*>(slice.vals[r]);
    for (int b = 0; b < B; ++b)
      for (int s = 0; s < kAcc; ++s) acc[r][b][s] = _mm512_setzero_ps();
  }
  for (int64_t w = 0; w < slice.words; w += 4, x += 128 * B) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      __m512i pairs[kRows];
#pragma GCC unroll 2
      for (int r = 0; r < kRows; ++r) {
        prefetch(v[r], slice.prefetch_bytes);
        pairs[r] = expand(slice.bits[r] + w + i, v[r]);
        v[r] += __builtin_popcount(slice.bits[r][w + i]);
      }
      for (int b = 0; b < B; ++b) {
        const __m512i column = _mm512_load_si512(x + 32 * (B * i + b));
        for (int r = 0; r < kRows; ++r) {
          __m512& sum = acc[r][b][i % kAcc];
          sum = _mm512_dpbf16_ps(sum, (__m512bh)pairs[r], (__m512bh)column);
        }
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int b = 0; b < B; ++b) {
      for (int s = 1; s < kAcc; ++s) acc[r][b][0] = _mm512_add_ps(acc[r][b][0], acc[r][b][s]);
      sums[r][b] += _mm512_reduce_add_ps(acc[r][b][0]);
    }
  }
}

#endif  // __x86_64__

template <int B>
Kernel choose([[maybe_unused]] int isa, int dtype) {
#if defined(__x86_64__)
  if (dtype == kFloat32) {
    if (isa >= kAvx512) return slice_avx512<Float32, B>;
    if (isa == kAvx2) return slice_avx2<B>;
  } else {
    if (isa == kAvx512Bf16) return slice_avx512_dot<B>;
    if (isa == kAvx512) return slice_avx512<BFloat16Split, B>;
    if (isa == kAvx2) return slice_avx2_bf16<B>;
  }
#endif
  return dtype == kFloat32 ? slice_scalar<float, B> : slice_scalar<uint16_t, B>;
}

// How a kernel wants the 32 columns of x that belong to one mask word.
enum class Order {
  kFloats,  // float32, as they are
  kEvenOdd, // float32, of each 16 columns the even ones and then the odd ones
  kPairs,   // bfloat16, columns i and 16 + i side by side, as expand() leaves them
};

Order order_of(int dtype, int isa) {
  if (dtype == kBFloat16 && isa == kAvx512Bf16) return Order::kPairs;
  return dtype == kBFloat16 && isa == kAvx2 ? Order::kEvenOdd : Order::kFloats;
}

// x [batch, count] as the kernels of an instruction set read it, zero beyond `count`: for every block of B rows
// [columns / 32, B, 32], on a cache line boundary.
class PreparedX {
 public:
  PreparedX(const void* x, int dtype, Order order, int batch, int64_t count, int64_t columns)
      : storage_(size_t(batch * columns) + 16, 0.0f) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(storage_.data());
    data_ = storage_.data() + (64 - address % 64) % 64 / 4;
    uint16_t* halves = reinterpret_cast<uint16_t*>(data_);
    for (int b = 0, width; b < batch; b += width) {
      width = block_width(batch - b);
      for (int i = 0; i < width; ++i) {
        for (int64_t c = 0; c < count; c += 32) {
          const int64_t source = (b + i) * count + c, target = b * columns + c * width + 32 * i;
          const int n = int(std::min<int64_t>(32, count - c));
          if (order == Order::kFloats) {
            load_as_float(x, dtype, source, n, data_ + target);
            continue;
          }
          const uint16_t* given = static_cast<const uint16_t*>(x) + source;
          for (int k = 0; k < n; ++k) {
            if (order == Order::kPairs) {
              halves[target + 2 * (k % 16) + k / 16] = given[k];
            } else {
              data_[target + k / 16 * 16 + k % 2 * 8 + k % 16 / 2] = bf16_to_float(given[k]);
            }
          }
        }
      }
    }
  }
  const char* data() const { return reinterpret_cast<const char*>(data_); }

 private:
  std::vector<float> storage_;
  float* data_;
};

constexpr int64_t kRowsPerTask = 16;  // in each part

// Columns are cut so that a block of x stays within this while all rows of a task use it. One or two rows of x the
// second-level cache can serve; cutting them costs more, since a matrix row's values are then read in pieces. Measured on Sapphire Rapids (half kept, one row of x, speed-up over dense): 4096 x 14336 float32 1.13
// with 24 KB and 1.56 with 64, bfloat16 2.15 and 2.48; 4096 x 4096 float32, eight rows of x: 3.4 and 2.7.
constexpr int64_t bytes_of_x(int width) { return (width <= 2 ? 64 : 24) * 1024; }

// Measured on Zen 5: 2.1 to 1.4 ms for AVX2 bfloat16, 1.8 to 1.6 ms for AVX-512 float32 (4096 x 4096, half kept).
constexpr int64_t kPrefetchBytes = 2048;

struct Problem {
  const uint32_t* bits;
  const int32_t* off;
  const int64_t* row_base;  // or null
  const char* vals;
  const char* x;  // as PreparedX lays it out
  void* y;        // [batch, rows]
  int64_t rows, groups;
  int dtype;
  int64_t value_bytes, x_bytes;

  const char* values(int64_t row, int64_t group) const {
    return vals + value_bytes * (off[row * groups + group] + (row_base ? row_base[row] : 0));
  }

  int64_t part() const { return (rows + kRows - 1) / kRows; }  // how far apart the rows of a slice are

  // Rows [first, last) of each part of y for the block of `width` rows of x that starts at `b`.
  void multiply(Kernel kernel, int64_t first, int64_t last, int b, int width) const {
    Sums sums[kRowsPerTask] = {};
    const int64_t step = std::min(groups, std::max<int64_t>(1, bytes_of_x(width) / (128 * x_bytes * width)));
    // Where rows are visited several times, a stretch at a time, the task after this one is what to fetch meanwhile.
    const bool whole_rows = step == groups;
    const int64_t task_bytes = values(std::min(last, rows - 1), 0) - values(first, 0);
    const int64_t prefetch_bytes = whole_rows ? kPrefetchBytes : task_bytes;
    for (int64_t group = 0; group < groups; group += step) {
      const int64_t words = 4 * std::min(step, groups - group);
      const char* x_block = x + x_bytes * 128 * (groups * b + group * width);
      for (int64_t row = first; row < last; ++row) {
        Slice slice{{}, {}, x_block, words, prefetch_bytes};
        for (int r = 0; r < kRows; ++r) {
          const int64_t from = std::min(row + r * part(), rows - 1);  // the last part may be shorter
          slice.bits[r] = bits + 4 * (from * groups + group);
          slice.vals[r] = values(from, group);
        }
        kernel(slice, sums[row - first]);
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int64_t row = first + r * part(); row < std::min(rows, last + r * part()); ++row) {
        const float* row_sums = sums[row - r * part() - first][r];
        for (int i = 0; i < width; ++i) {
          if (dtype == kFloat32) {
            static_cast<float*>(y)[(b + i) * rows + row] = row_sums[i];
          } else {
            static_cast<uint16_t*>(y)[(b + i) * rows + row] = float_to_bf16(row_sums[i]);
          }
        }
      }
    }
  }
};

}  // namespace
}  // namespace leap

using namespace leap;

// The best instruction set of this CPU, as enum Isa numbers them.
extern "C" int leap_best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512bitalg") && __builtin_cpu_supports("avx512vpopcntdq");
  if (avx512) return __builtin_cpu_supports("avx512bf16") ? kAvx512Bf16 : kAvx512;
  if (avx2) return kAvx2;
#endif
  return kScalar;
}

// The one that LEAP_CPU_ISA names, -1 if this CPU has none of that name; without it the best. Asked at every call, and
// so here: looking into the environment from Python takes longer than a small matrix.
static int chosen_isa() {
  static const int best = leap_best_isa();
  const char* wanted = std::getenv("LEAP_CPU_ISA");
  if (wanted == nullptr) return best;
  for (int isa = 0; isa <= best; ++isa) {
    if (std::strcmp(wanted, kIsaNames[isa]) == 0) return isa;
  }
  return -1;
}

// y[batch, rows] = x[batch, count] W^T. dtype (float32 or bfloat16) is that of vals, x and y alike. Returns 0, or 1 and
// does nothing where LEAP_CPU_ISA names what this CPU does not have.
extern "C" int leap_gemv_bitmap(const uint32_t* bits, const int32_t* off, const int64_t* row_base, const void* vals,
                                const void* x, void* y, int64_t rows, int64_t count, int dtype, int batch,
                                int threads) {
  const int isa = chosen_isa();
  if (isa < 0) return 1;
  const int64_t groups = (count + 127) / 128;
  const Order order = order_of(dtype, isa);
  const PreparedX prepared(x, dtype, order, batch, count, 128 * groups);
  const int value_bytes = dtype == kFloat32 ? 4 : 2, x_bytes = order == Order::kPairs ? 2 : 4;
  const Problem problem{bits, off,  row_base, static_cast<const char*>(vals), prepared.data(), y,
                        rows, groups, dtype,  value_bytes, x_bytes};
  const Kernel by_width[9] = {nullptr, choose<1>(isa, dtype), choose<2>(isa, dtype), nullptr, choose<4>(isa, dtype),
                              nullptr, nullptr,               nullptr,               choose<8>(isa, dtype)};
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t task = 0; task < (problem.part() + kRowsPerTask - 1) / kRowsPerTask; ++task) {
    const int64_t first = task * kRowsPerTask, last = std::min(problem.part(), first + kRowsPerTask);
    // The rows of a task are still in the cache when the next block of x wants them.
    for (int b = 0, width; b < batch; b += width) {
      width = block_width(batch - b);
      problem.multiply(by_width[width], first, last, b, width);
    }
  }
  return 0;
}

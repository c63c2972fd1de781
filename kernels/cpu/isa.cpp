// The vocabulary of the kernels: a vector of floats F, a vector of 32-bit words I, and the few operations on them that every
// instruction set spells differently. The kernels in the other files are written once, in these words.
//
// Integer products. A word holds KS codes (4 x 8 bits, 2 x 16 bits or 1 x 32 bits: the widths that multiply without saturating),
// a vector holds W words, and dot(acc, w, x) adds to each 32-bit lane the products of its KS codes. VNNI wants one operand
// unsigned: there a weight code is stored with BIAS added, and the kernels start their sums from -BIAS * sum(x). The result is exact.
//
// dot(acc, w, V, x, Y) adds the products w * x + V * Y. Where it is CROSSED, it adds (w + Y) * (V + x) instead, half the multiplications
// (S. Winograd, "A New Algorithm for Inner Product", 1968): its sums start from -sum(w * V) - sum(x * Y), and are exact like the others.
// AVX2 machines multiply in two of their four pipes and add in all, and two additions of 16 bits cost less than one multiplication.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <omp.h>
#include <utility>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

using i64 = int64_t;

// f(0), f(1), ... f(COUNT - 1), unrolled before the compiler's optimizer sees it: arrays indexed by such an i live in registers.
// (From a plain loop GCC keeps a second copy of the accumulators in memory, which halves the speed of the integer kernels.)
template <class Fn, size_t... INDEX> [[gnu::always_inline]] inline void each(Fn&& f, std::index_sequence<INDEX...>) { (f(INDEX), ...); }
template <int COUNT, class Fn> [[gnu::always_inline]] inline void each(Fn&& f) { each(f, std::make_index_sequence<COUNT>()); }

#if defined(__AVX512VNNI__)

#define ISA_NAME "avx512_vnni"
using F = __m512;
typedef int32_t I __attribute__((vector_size(64)));  // not __m512i, 64-bit lanes to GCC, which then copies accumulators about
using X = int8_t;                      // an activation code, as it lies in a word
constexpr int W = 16, KS = 4, BIAS = 128;
constexpr bool CROSSED = false;
constexpr int PANEL_ROWS = 12;         // rows of x in the block of the panel kernel: 24 of the 32 registers accumulate
constexpr int DOT_ROWS = 6;            // rows of x in the block of the dot kernel (times 4 rows of w)
constexpr int DOT_MAX = 64, DOT_MAX_GROUPED = 8;  // up to how many rows of x the dot kernel is the faster one
constexpr int TABLE_ROWS = 4, TABLE_COLUMNS = 4;  // rows of x and of w in the block of the weight-only kernel

inline F zero() { return _mm512_setzero_ps(); }
inline F set1(float v) { return _mm512_set1_ps(v); }
inline F load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, F v) { _mm512_storeu_ps(p, v); }
inline F add(F a, F b) { return _mm512_add_ps(a, b); }
inline F mul(F a, F b) { return _mm512_mul_ps(a, b); }
inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
inline float sum(F v) { return _mm512_reduce_add_ps(v); }

using B = __m512i;
inline I words(const void* p) { return (I)_mm512_loadu_si512(p); }
inline void store_words(void* p, I v) { _mm512_storeu_si512(p, (B)v); }
inline I word(int32_t v) { return (I)_mm512_set1_epi32(v); }
inline F to_float(I v) { return _mm512_cvtepi32_ps((B)v); }
inline int32_t sum(I v) { return _mm512_reduce_add_epi32((B)v); }
inline I dot(I acc, I w, I x) { return (I)_mm512_dpbusd_epi32((B)acc, (B)w, (B)x); }
inline I dot(I acc, I w, I V, I x, I Y) { return dot(dot(acc, w, x), V, Y); }
inline I constant(int code) { return (I)_mm512_set1_epi8((char)code); }

// W * KS weight codes, biased: 8-bit (the last n of a row), and one half (the low or the high nibbles) of 4-bit ones
inline I codes8(const uint8_t* p) { return words(p) ^ constant(-128); }
inline I codes8(const uint8_t* p, i64 n) {
  return (I)_mm512_maskz_loadu_epi8((1ull << n) - 1, p) ^ constant(-128);
}
template <int HIGH> inline I codes4(const uint8_t* p) {
  const I v = words(p) ^ constant(0x88);
  return (HIGH ? (I)_mm512_srli_epi32((B)v, 4) : v) & constant(15);
}

// 16 bytes of each of the rows 0, 4, 8, 12
inline I lanes(const int8_t* p, i64 stride) {
  auto row = [&](int r) { return _mm_loadu_si128((const __m128i*)(p + r * stride)); };
  B v = _mm512_castsi128_si512(row(0));
  v = _mm512_inserti32x4(_mm512_inserti32x4(v, row(4), 1), row(8), 2);
  return (I)_mm512_inserti32x4(v, row(12), 3) ^ constant(-128);
}
// Words 0..3 of each of W rows become 4 vectors of W rows (a transpose of 4 x 4 words inside every 128 bits), `step` words apart.
inline void transpose(const int8_t* p, i64 stride, int32_t* out, i64 step) {
  const B a = (B)lanes(p, stride), b = (B)lanes(p + stride, stride);
  const B c = (B)lanes(p + 2 * stride, stride), d = (B)lanes(p + 3 * stride, stride);
  const B ab = _mm512_unpacklo_epi32(a, b), cd = _mm512_unpacklo_epi32(c, d), AB = _mm512_unpackhi_epi32(a, b), CD = _mm512_unpackhi_epi32(c, d);
  store_words(out, (I)_mm512_unpacklo_epi64(ab, cd));
  store_words(out + step, (I)_mm512_unpackhi_epi64(ab, cd));
  store_words(out + 2 * step, (I)_mm512_unpacklo_epi64(AB, CD));
  store_words(out + 3 * step, (I)_mm512_unpackhi_epi64(AB, CD));
}
// 16 columns of 2 * W rows of codes become words: out[k / KS][n].
inline void pack(const int8_t* p, i64 stride, int32_t* out) {
  transpose(p, stride, out, 2 * W);
  transpose(p + W * stride, stride, out + W, 2 * W);
}

// Weight-only kernels: W codes, one per byte, become words or floats; a table of 16 floats is looked up by the low 4 bits of a word.
inline __m128i bytes(const uint8_t* p) { return _mm_loadu_si128((const __m128i*)p); }
inline I unsigned_words(const uint8_t* p) { return (I)_mm512_cvtepu8_epi32(bytes(p)); }
inline I signed_words(const uint8_t* p) { return (I)_mm512_cvtepi8_epi32(bytes(p)); }
inline F gather(const float* table, I at) { return _mm512_i32gather_ps((B)at, table, 4); }
inline F from_half(__m256i v) { return _mm512_cvtph_ps(v); }
inline F e5m2(const uint8_t* p, const float*) { return from_half(_mm256_slli_epi16(_mm256_cvtepu8_epi16(bytes(p)), 8)); }
// A sign-extended E4M3, shifted, is the half that is 256 times smaller, but for its bit 14. 0x7f and 0xff are NaN.
constexpr float E4M3_UNIT = 256;
inline F e4m3(const uint8_t* p, const float*) {
  auto all = [](int v) { return _mm256_set1_epi16((short)v); };
  const __m256i v = _mm256_and_si256(_mm256_slli_epi16(_mm256_cvtepi8_epi16(bytes(p)), 7), all(0xbf80));
  return from_half(_mm256_or_si256(v, _mm256_cmpeq_epi16(_mm256_or_si256(v, all(0x8000)), all(0xbf80))));
}
struct Table16 {
  F all;
  explicit Table16(const float* p) : all(load(p)) {}
  F operator()(I at) const { return _mm512_permutexvar_ps((B)at, all); }
};
inline void store_bf16(uint16_t* p, F v) {  // rounds to nearest even
  const I u = (I)_mm512_castps_si512(v), odd = (u >> 16) & 1;
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16((B)((u + 0x7fff + odd) >> 16)));
}

#elif defined(__AVX2__)

#define ISA_NAME "avx2"
using F = __m256;
typedef int32_t I __attribute__((vector_size(32)));
using X = int16_t;                     // pmaddwd of widened codes is exact; pmaddubsw of bytes saturates
constexpr int W = 8, KS = 2, BIAS = 0;
constexpr bool CROSSED = true;
constexpr int PANEL_ROWS = 4, DOT_ROWS = 2, DOT_MAX = 12, DOT_MAX_GROUPED = 6, TABLE_ROWS = 4, TABLE_COLUMNS = 2;

inline F zero() { return _mm256_setzero_ps(); }
inline F set1(float v) { return _mm256_set1_ps(v); }
inline F load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, F v) { _mm256_storeu_ps(p, v); }
inline F add(F a, F b) { return _mm256_add_ps(a, b); }
inline F mul(F a, F b) { return _mm256_mul_ps(a, b); }
inline F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
inline float sum(F v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

using B = __m256i;
inline I words(const void* p) { return (I)_mm256_loadu_si256((const B*)p); }
inline void store_words(void* p, I v) { _mm256_storeu_si256((B*)p, (B)v); }
inline I word(int32_t v) { return (I)_mm256_set1_epi32(v); }
inline F to_float(I v) { return _mm256_cvtepi32_ps((B)v); }
inline int32_t sum(I v) {
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128((B)v), _mm256_extracti128_si256((B)v, 1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}
inline I dot(I acc, I w, I x) { return acc + (I)_mm256_madd_epi16((B)w, (B)x); }
inline I dot(I acc, I w, I V, I x, I Y) { return dot(acc, (I)_mm256_add_epi16((B)w, (B)Y), (I)_mm256_add_epi16((B)V, (B)x)); }
inline I constant(int code) { return (I)_mm256_set1_epi16((short)code); }

inline __m128i half(const void* p) { return _mm_loadu_si128((const __m128i*)p); }
inline I codes8(const uint8_t* p) { return (I)_mm256_cvtepi8_epi16(half(p)); }
inline I codes8(const uint8_t* p, i64 n) {
  uint8_t tail[16] = {};
  memcpy(tail, p, n);
  return codes8(tail);
}
template <int HIGH> inline I codes4(const uint8_t* p) {
  const I v = (I)_mm256_cvtepu8_epi16(half(p)) ^ constant(0x88);
  return HIGH ? (I)_mm256_srli_epi16((B)v, 4) : v & constant(15);
}

inline void pack(const int8_t* p, i64 stride, int32_t* out) {
  I v[8], t[8];  // 16 codes of rows r and r + 8: a transpose of 8 x 8 pairs of codes inside every 128 bits
  each<8>([&](int r) { v[r] = (I)_mm256_inserti128_si256(_mm256_castsi128_si256(half(p + r * stride)), half(p + (r + 8) * stride), 1); });
  each<4>([&](int i) {
    const B a = (B)v[2 * i], b = (B)v[2 * i + 1];
    t[i] = (I)_mm256_unpacklo_epi16(a, b), t[i + 4] = (I)_mm256_unpackhi_epi16(a, b);
  });
  each<2>([&](int h) {
    each<2>([&](int i) {
      const B a = (B)t[4 * h + 2 * i], b = (B)t[4 * h + 2 * i + 1];
      v[4 * h + i] = (I)_mm256_unpacklo_epi32(a, b), v[4 * h + i + 2] = (I)_mm256_unpackhi_epi32(a, b);
    });
  });
  each<4>([&](int i) {
    const B a = (B)v[2 * i], b = (B)v[2 * i + 1], c[2] = {_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b)};
    each<2>([&](int j) {
      store_words(out + (2 * i + j) * 16, (I)_mm256_cvtepi8_epi16(_mm256_castsi256_si128(c[j])));
      store_words(out + (2 * i + j) * 16 + 8, (I)_mm256_cvtepi8_epi16(_mm256_extracti128_si256(c[j], 1)));
    });
  });
}

inline __m128i bytes(const uint8_t* p) { return _mm_loadl_epi64((const __m128i*)p); }
inline I unsigned_words(const uint8_t* p) { return (I)_mm256_cvtepu8_epi32(bytes(p)); }
inline I signed_words(const uint8_t* p) { return (I)_mm256_cvtepi8_epi32(bytes(p)); }
inline F gather(const float* table, I at) { return _mm256_i32gather_ps(table, (B)at, 4); }
inline F from_half(__m128i v) { return _mm256_cvtph_ps(v); }
inline F e5m2(const uint8_t* p, const float*) { return from_half(_mm_slli_epi16(_mm_cvtepu8_epi16(bytes(p)), 8)); }
constexpr float E4M3_UNIT = 256;
inline F e4m3(const uint8_t* p, const float*) {
  auto all = [](int v) { return _mm_set1_epi16((short)v); };
  const __m128i v = _mm_and_si128(_mm_slli_epi16(_mm_cvtepi8_epi16(bytes(p)), 7), all(0xbf80));
  return from_half(_mm_or_si128(v, _mm_cmpeq_epi16(_mm_or_si128(v, all(0x8000)), all(0xbf80))));
}
struct Table16 {
  F low, high;
  explicit Table16(const float* p) : low(load(p)), high(load(p + 8)) {}
  F operator()(I at) const {  // the lookups see 3 bits, the blend the sign
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, (B)at), _mm256_permutevar8x32_ps(high, (B)at), _mm256_castsi256_ps((B)(at << 28)));
  }
};
inline void store_bf16(uint16_t* p, F v) {
  const I u = (I)_mm256_castps_si256(v), odd = (u >> 16) & 1;
  const B rounded = _mm256_srli_epi32((B)(u + 0x7fff + odd), 16);
  _mm_storeu_si128((__m128i*)p, _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1)));
}

#else  // any machine: vectors of the compiler's own (GCC and Clang), 16 bytes wide

#define ISA_NAME "scalar"
typedef float F __attribute__((vector_size(16)));
typedef int32_t I __attribute__((vector_size(16)));
using X = int32_t;
constexpr int W = 4, KS = 1, BIAS = 0;
constexpr bool CROSSED = false;
constexpr int PANEL_ROWS = 4, DOT_ROWS = 2, DOT_MAX = 4, DOT_MAX_GROUPED = 4, TABLE_ROWS = 2, TABLE_COLUMNS = 4;

inline F zero() { return F{}; }
inline F set1(float v) { return F{v, v, v, v}; }
inline F load(const float* p) { F v; memcpy(&v, p, sizeof v); return v; }
inline void store(float* p, F v) { memcpy(p, &v, sizeof v); }
inline F add(F a, F b) { return a + b; }
inline F mul(F a, F b) { return a * b; }
inline F fma(F a, F b, F c) { return a * b + c; }
inline float sum(F v) { return v[0] + v[1] + v[2] + v[3]; }

inline I words(const void* p) { I v; memcpy(&v, p, sizeof v); return v; }
inline void store_words(void* p, I v) { memcpy(p, &v, sizeof v); }
inline I word(int32_t v) { return I{v, v, v, v}; }
inline F to_float(I v) { return F{(float)v[0], (float)v[1], (float)v[2], (float)v[3]}; }
inline int32_t sum(I v) { return v[0] + v[1] + v[2] + v[3]; }
inline I dot(I acc, I w, I x) { return acc + w * x; }
inline I dot(I acc, I w, I V, I x, I Y) { return acc + w * x + V * Y; }
inline I constant(int code) { return word(code); }

inline I codes8(const uint8_t* p) { auto q = (const int8_t*)p; return I{q[0], q[1], q[2], q[3]}; }
inline I codes8(const uint8_t* p, i64 n) {
  uint8_t tail[4] = {};
  memcpy(tail, p, n);
  return codes8(tail);
}
template <int HIGH> inline I codes4(const uint8_t* p) { return ((I{p[0], p[1], p[2], p[3]} ^ 0x88) >> (HIGH ? 4 : 0)) & 15; }

inline void pack(const int8_t* p, i64 stride, int32_t* out) {
  for (int k = 0; k < 16; k++)
    for (int n = 0; n < 2 * W; n++) out[k * 2 * W + n] = p[n * stride + k];
}

inline I unsigned_words(const uint8_t* p) { return I{p[0], p[1], p[2], p[3]}; }
inline I signed_words(const uint8_t* p) { return codes8(p); }
inline F gather(const float* table, I at) { return F{table[at[0]], table[at[1]], table[at[2]], table[at[3]]}; }
inline F e5m2(const uint8_t* p, const float* table) { return gather(table, unsigned_words(p)); }
constexpr float E4M3_UNIT = 1;
inline F e4m3(const uint8_t* p, const float* table) { return gather(table, unsigned_words(p)); }
struct Table16 {
  const float* all;
  explicit Table16(const float* p) : all(p) {}
  F operator()(I at) const { return gather(all, at & 15); }
};
inline void store_bf16(uint16_t* p, F v) {
  for (int i = 0; i < W; i++) {
    uint32_t u;
    memcpy(&u, (const char*)&v + 4 * i, 4);
    p[i] = uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
  }
}

#endif

// The whole of a job's scratch memory is one aligned block, cut by `take`.
struct Scratch {
  char* base = nullptr;
  size_t used = 0;
  explicit Scratch(size_t bytes) : base((char*)std::aligned_alloc(64, (bytes + 64 * 16) / 64 * 64)) {}
  ~Scratch() { std::free(base); }
  Scratch(const Scratch&) = delete;
  template <class T> T* take(size_t count) {
    T* p = (T*)(base + used);
    used += (count * sizeof(T) + 63) / 64 * 64;
    return p;
  }
};

inline i64 ceil_div(i64 a, i64 b) { return (a + b - 1) / b; }

constexpr int DOT_COLUMNS = 4;  // rows of w that a dot kernel reads at once

// How many rows of x (1, 2, 4 or 6, at most `most`) make a block, by a model of its cost: R + what reading the weights costs.
inline i64 rows_per_block(i64 M, int most, int reading) {
  i64 best = 1;
  for (int R : {2, 4, 6})
    if (R <= most && ceil_div(M, R) * (R + reading) <= ceil_div(M, best) * (best + reading)) best = R;
  return best;
}

}  // namespace

extern "C" const char* qc_isa() { return ISA_NAME; }

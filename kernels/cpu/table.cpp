// Float activations times weights in codes (weight-only quantization), and codes back into floats:
//   w[n,k] = scale[n,g] * value(code[n,k]) + offset[n,g],   y = x @ w.T
// 4-bit codes index a table of 16 floats. 8-bit codes are integers, E4M3, E5M2, or index a table of 256 floats.
// The product is for few rows of x, where reading the weights is what costs; for many rows the host dequantizes blocks of rows of w.

namespace {

enum Kind { TABLE4, INT8, UINT8, E4M3, E5M2, TABLE8 };

struct Weight {
  const uint8_t* codes;
  const float *table, *scale, *offset;  // offset may be null
  i64 N, K, group, groups;
  i64 KP() const { return ceil_div(K, 128) * 128; }
};

// Rows are walked in blocks of 128 columns. W values from `column` (< 128) of a block on:
template <int KIND> struct Reader {
  static constexpr int BYTES = KIND == TABLE4 ? 64 : 128;  // of a block
  const float* table;
  Table16 table16;
  explicit Reader(const Weight& w) : table(w.table), table16(KIND == TABLE4 ? w.table : zeros) {}
  static constexpr float zeros[16] = {}, UNIT = KIND == E4M3 ? E4M3_UNIT : 1;  // UNIT: a value is so many times what is read
  F operator()(const uint8_t* block, int column) const {
    if constexpr (KIND == TABLE4)
      return column < 64 ? table16(unsigned_words(block + column)) : table16(unsigned_words(block + column - 64) >> 4);
    const uint8_t* p = block + column;
    if constexpr (KIND == INT8) return to_float(signed_words(p));
    if constexpr (KIND == UINT8) return to_float(unsigned_words(p));
    if constexpr (KIND == E4M3) return e4m3(p, table);
    if constexpr (KIND == E5M2) return e5m2(p, table);
    return gather(table, unsigned_words(p));
  }
};
template <int KIND> i64 row_bytes(const Weight& w) { return KIND == TABLE4 ? w.KP() / 2 : w.K; }

struct TableLinear {
  const Weight& w;
  const float* x;       // [rows][KP], zeros behind K and behind M
  const float* sums;    // [rows][groups]: of x over each group, if there is an offset
  const int32_t* at;    // [KP / 16]: the group of each 16 columns
  float* y;
  i64 M;
};

// WIDE: a group is whole blocks, so its scale can wait until the group's sum is there; otherwise every value is scaled by itself.
template <int KIND, bool WIDE, int R> [[gnu::flatten]] void table_block(const TableLinear& p, i64 m, i64 n) {
  constexpr int C = TABLE_COLUMNS;
  const Weight& w = p.w;
  const i64 ldx = w.KP(), ldw = row_bytes<KIND>(w);
  const Reader<KIND> read(w);
  const float* x = p.x + m * ldx;
  const uint8_t* codes[C];
  const float* scale[C];
  each<C>([&](int c) {
    const i64 row = std::min(n + c, w.N - 1);
    codes[c] = w.codes + row * ldw;
    scale[c] = w.scale + row * w.groups;
  });
  F acc[R][C], total[R][C];
  auto clear = [&](auto& sums) { each<R>([&](int r) { each<C>([&](int c) { sums[r][c] = zero(); }); }); };
  uint8_t tail[C][128] = {};
  auto block = [&](i64 k, const uint8_t* const* from) {  // from[c]: where the codes of row c lie
    for (int j = 0; j < 64; j += W)
      each<2>([&](int half) {
        const int column = j + 64 * half;
        F v[C];
        each<C>([&](int c) {
          v[c] = read(from[c], column);
          if constexpr (!WIDE) v[c] = mul(v[c], set1(scale[c][p.at[(k + column) / 16]] * read.UNIT));
        });
        each<R>([&](int r) {
          const F xv = load(x + r * ldx + k + column);
          each<C>([&](int c) { acc[r][c] = fma(v[c], xv, acc[r][c]); });
        });
      });
  };
  clear(acc);
  clear(total);
  const i64 whole = KIND == TABLE4 ? w.KP() : w.K / 128 * 128;
  for (i64 k = 0, g = 0; k < w.KP(); k += 128) {
    const i64 at = k / 128 * Reader<KIND>::BYTES;
    const uint8_t* from[C];
    each<C>([&](int c) {
      from[c] = codes[c] + at;
      if (k >= whole) from[c] = (const uint8_t*)memcpy(tail[c], from[c], w.K - k);
      for (int i = 0; i < Reader<KIND>::BYTES; i += 64) __builtin_prefetch(codes[c] + C * ldw + at + i, 0, 2);
    });
    block(k, from);
    if (WIDE && (k + 128 >= w.KP() || (g + 1) * w.group <= k + 128)) {
      each<C>([&](int c) {
        const F s = set1(scale[c][g] * read.UNIT);
        each<R>([&](int r) { total[r][c] = fma(acc[r][c], s, total[r][c]); });
      });
      clear(acc);
      g++;
    }
  }
  each<R>([&](int r) {
    each<C>([&](int c) {
      if (m + r >= p.M || n + c >= w.N) return;
      float y = sum(WIDE ? total[r][c] : acc[r][c]);
      if (w.offset)
        for (i64 g = 0; g < w.groups; g++) y += w.offset[(n + c) * w.groups + g] * p.sums[(m + r) * w.groups + g];
      p.y[(m + r) * w.N + n + c] = y;
    });
  });
}

template <int KIND, bool WIDE> auto choose_block(i64 R) {
  constexpr int MOST = TABLE_ROWS;
  return R == 1 ? table_block<KIND, WIDE, 1> : R == 2 ? table_block<KIND, WIDE, 2>
       : R == 4 ? table_block<KIND, WIDE, std::min(4, MOST)> : table_block<KIND, WIDE, MOST>;
}

template <int KIND> void table_linear(const Weight& w, const float* x, float* y, i64 M, int threads) {
  const i64 KP = w.KP(), R = rows_per_block(M, TABLE_ROWS, 3), rows = ceil_div(M, R) * R;
  Scratch scratch((rows * (KP + w.groups) + KP / 16) * 4);
  float *xs = scratch.take<float>(rows * KP), *sums = scratch.take<float>(rows * w.groups);
  int32_t* at = scratch.take<int32_t>(KP / 16);
  for (i64 i = 0; i < KP / 16; i++) at[i] = std::min(w.groups - 1, i * 16 / w.group);
  for (i64 m = 0; m < rows; m++) {
    const i64 columns = m < M ? w.K : 0;
    std::copy_n(x + m * w.K, columns, xs + m * KP);
    std::fill_n(xs + m * KP + columns, KP - columns, 0.f);
    if (w.offset)
      for (i64 g = 0; g < w.groups; g++) {
        double s = 0;
        for (i64 k = g * w.group, end = std::min(columns, k + w.group); k < end; k++) s += xs[m * KP + k];
        sums[m * w.groups + g] = (float)s;
      }
  }
  const TableLinear p{w, xs, sums, at, y, M};
  const auto block = w.groups == 1 || w.group % 128 == 0 ? choose_block<KIND, true>(R) : choose_block<KIND, false>(R);
  constexpr i64 chunk = 64;
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
  for (i64 first = 0; first < w.N; first += chunk)
    for (i64 n = first; n < std::min(w.N, first + chunk); n += TABLE_COLUMNS)
      for (i64 m = 0; m < M; m += R) block(p, m, n);
}

template <int KIND, class T> [[gnu::flatten]] void dequantize_row(const Weight& w, i64 n, T* out) {
  const Reader<KIND> read(w);
  const uint8_t* codes = w.codes + n * row_bytes<KIND>(w);
  const float *scale = w.scale + n * w.groups, *offset = w.offset ? w.offset + n * w.groups : nullptr;
  auto block = [&](i64 k, const uint8_t* from, T* to) {
    for (int j = 0; j < 64; j += W)
      each<2>([&](int half) {
        const int column = j + 64 * half;
        const i64 g = std::min(w.groups - 1, (k + column) / w.group);
        const F v = fma(read(from, column), set1(scale[g] * read.UNIT), offset ? set1(offset[g]) : zero());
        if constexpr (sizeof(T) == 2) store_bf16(to + column, v);
        else store(to + column, v);
      });
  };
  i64 k = 0;
  for (; k + 128 <= w.K; k += 128) block(k, codes + k / 128 * Reader<KIND>::BYTES, out + k);
  if (k < w.K) {
    uint8_t tail[128] = {};
    T columns[128];
    memcpy(tail, codes + k / 128 * Reader<KIND>::BYTES, KIND == TABLE4 ? 64 : w.K - k);
    block(k, tail, columns);
    memcpy(out + k, columns, (w.K - k) * sizeof(T));
  }
}

template <int KIND> void dequantize(const Weight& w, void* out, int bf16, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (i64 n = 0; n < w.N; n++)
    if (bf16) dequantize_row<KIND>(w, n, (uint16_t*)out + n * w.K);
    else dequantize_row<KIND>(w, n, (float*)out + n * w.K);
}

template <class Fn> void with_kind(int kind, Fn f) {
  switch (kind) {
    case TABLE4: return f(std::integral_constant<int, TABLE4>());
    case INT8: return f(std::integral_constant<int, INT8>());
    case UINT8: return f(std::integral_constant<int, UINT8>());
    case E4M3: return f(std::integral_constant<int, E4M3>());
    case E5M2: return f(std::integral_constant<int, E5M2>());
    default: return f(std::integral_constant<int, TABLE8>());
  }
}

}  // namespace

extern "C" void qc_table_linear(int kind, const float* x, const uint8_t* codes, const float* table, const float* scale,
                                const float* offset, float* y, i64 M, i64 N, i64 K, i64 group, int threads) {
  if (M == 0 || N == 0) return;
  if ((double)M * N * K < 65536) threads = 1;
  const Weight w{codes, table, scale, offset, N, K, group, ceil_div(K, group)};
  with_kind(kind, [&](auto k) { table_linear<k()>(w, x, y, M, threads); });
}

extern "C" void qc_dequantize(int kind, const uint8_t* codes, const float* table, const float* scale, const float* offset, void* out,
                              int bf16, i64 N, i64 K, i64 group, int threads) {
  if ((double)N * K < 65536) threads = 1;
  const Weight w{codes, table, scale, offset, N, K, group, ceil_div(K, group)};
  with_kind(kind, [&](auto k) { dequantize<k()>(w, out, bf16, threads); });
}

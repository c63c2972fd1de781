// Integer activations times integer weights:
//   y[m,n] = sx[m] * sum over groups g of sw[n,g] * (sum over k in g of x[m,k] * w[n,k]),   the inner sum exact in 32 bits.
// x: (M, K) int8. w: (N, K) int8, or (N, KP/2) bytes of nibbles in blocks of 128 columns (byte j: column j low, column j+64 high).
//
// Two ways. `dot_*` (few rows of x): weights are read where they lie, W * KS codes of one row at a time; a lane holds a part of one
// output, and lanes are summed at the end. `panel_*` (many rows of x): each thread first copies 2 * W weight rows, transposed, into
// a panel that stays in its second-level cache; a lane then is one output, so a group's scale costs one multiply per 2 * W outputs.

namespace {

struct IntLinear {
  int bits;
  const int8_t* x;
  const float* sx;
  const uint8_t* w;
  const float* sw;
  float* y;
  i64 M, N, K, group, groups;
  int threads;
  i64 KP() const { return ceil_div(K, 128) * 128; }
  i64 ldw() const { return bits == 4 ? KP() / 2 : K; }
  i64 group_end(i64 g) const { return g + 1 == groups ? KP() : (g + 1) * group; }  // columns up to KP: x is zero there
};

// ---- dot ----

// R rows of x times DOT_COLUMNS rows of w (behind the last: the last again). x: codes widened to X, KP of them per row, zeros behind
// K and behind M. start: what each lane's sum starts from.
template <int BITS, bool GROUPED, int R> [[gnu::flatten]] void dot_block(const IntLinear& p, const X* x, const int32_t* start, i64 m, i64 n) {
  constexpr int C = DOT_COLUMNS, STEP = W * KS;
  const i64 ldx = p.KP();
  const uint8_t* w[C];
  each<C>([&](int c) { w[c] = p.w + std::min(n + c, p.N - 1) * p.ldw(); });
  x += m * ldx;
  I acc[R][C];
  F total[R][C];
  each<R>([&](int r) { each<C>([&](int c) { total[r][c] = zero(); }); });
  auto step = [&](i64 k, auto codes) {  // codes(c): W * KS codes of weight row c, from column k on
    I wv[C];
    each<C>([&](int c) {
      wv[c] = codes(c);
      // The rows that come next, into the second-level cache: short rows are new streams too often for the hardware to see.
      __builtin_prefetch(w[c] + C * p.ldw() + (BITS == 8 ? k : k / 2), 0, 2);
    });
    each<R>([&](int r) {
      const I xv = words(x + r * ldx + k);
      each<C>([&](int c) { acc[r][c] = dot(acc[r][c], wv[c], xv); });
    });
  };
  for (i64 g = 0, k = 0; g < p.groups; g++) {
    each<R>([&](int r) { each<C>([&](int c) { acc[r][c] = words(start + ((m + r) * p.groups + g) * W); }); });
    const i64 end = p.group_end(g);
    if constexpr (BITS == 8) {
      const i64 whole = std::min(end, p.K / STEP * STEP);
      for (; k < whole; k += STEP) step(k, [&](int c) { return codes8(w[c] + k); });
      if (g + 1 == p.groups && k < p.K) step(k, [&](int c) { return codes8(w[c] + k, p.K - k); });
    } else {
      while (k < end) {  // a group is a multiple of 64 columns: half a block, or more
        const i64 block = k / 128 * 64;
        const bool low = k % 128 == 0, high = !low || end - k >= 128;
        for (int j = 0; j < 64; j += STEP) {
          if (low) step(2 * block + j, [&](int c) { return codes4<0>(w[c] + block + j); });
          if (high) step(2 * block + 64 + j, [&](int c) { return codes4<1>(w[c] + block + j); });
        }
        k += low && high ? 128 : 64;
      }
    }
    if constexpr (GROUPED)
      each<C>([&](int c) {
        const F s = set1(p.sw[std::min(n + c, p.N - 1) * p.groups + g]);
        each<R>([&](int r) { total[r][c] = fma(to_float(acc[r][c]), s, total[r][c]); });
      });
  }
  each<R>([&](int r) {
    each<C>([&](int c) {
      if (m + r < p.M && n + c < p.N)
        p.y[(m + r) * p.N + n + c] = p.sx[m + r] * (GROUPED ? sum(total[r][c]) : p.sw[n + c] * (float)sum(acc[r][c]));
    });
  });
}

template <int BITS, bool GROUPED> void dot_linear(const IntLinear& p) {
  constexpr int STEP = W * KS;
  const i64 KP = p.KP(), R = rows_per_block(p.M, DOT_ROWS, 1), rows = ceil_div(p.M, R) * R;
  const int bias = BITS == 4 ? 8 : BIAS;
  Scratch scratch((size_t)rows * (KP * sizeof(X) + p.groups * W * 4));
  int32_t* start = scratch.take<int32_t>(rows * p.groups * W);
  X* x = scratch.take<X>(rows * KP);
  for (i64 m = 0; m < rows; m++) {
    const i64 columns = m < p.M ? p.K : 0;
    std::copy_n(p.x + m * p.K, columns, x + m * KP);
    std::fill_n(x + m * KP + columns, KP - columns, X(0));
    for (i64 g = 0, k = 0; g < p.groups; g++) {
      I s = word(0);
      if (bias)
        for (; k < p.group_end(g); k += STEP) s = dot(s, constant(bias), words(x + m * KP + k));
      store_words(start + (m * p.groups + g) * W, -s);
    }
  }
  const auto block = R == 1 ? dot_block<BITS, GROUPED, 1> : R == 2 ? dot_block<BITS, GROUPED, 2>
                   : R == 4 ? dot_block<BITS, GROUPED, std::min(4, DOT_ROWS)> : dot_block<BITS, GROUPED, DOT_ROWS>;
  constexpr i64 chunk = 64;
#pragma omp parallel for schedule(dynamic) num_threads(p.threads) if (p.threads > 1)
  for (i64 first = 0; first < p.N; first += chunk)
    for (i64 n = first; n < std::min(p.N, first + chunk); n += DOT_COLUMNS)
      for (i64 m = 0; m < p.M; m += R) block(p, x, start, m, n);
}

// ---- panel ----

// What is made of 2 * W rows of w. words: [KP / KS] steps of 2 * W words, word n of a step being KS codes of weight row n. For each
// group of columns, [2 * W] each: its scales, and what its sums start from. Rows from N on are zeros.
struct Panel {
  int32_t* words;
  int32_t* starts;
  float* scales;
};

// Adds to what CROSSED sums start from, for 16 columns of a panel.
inline void crossed(const int32_t* columns, int32_t* starts) {
  each<2>([&](int side) {
    I sum = word(0);
    const int32_t* w = columns + side * W;
    for (int s = 0; s < 16 / KS; s += 2) sum = dot(sum, words(w + s * 2 * W), words(w + (s + 1) * 2 * W));
    store_words(starts + side * W, words(starts + side * W) - sum);
  });
}

void pack_panel(const IntLinear& p, i64 n0, const Panel& panel) {
  const i64 rows = std::min<i64>(2 * W, p.N - n0), ldw = p.ldw();
  alignas(64) int8_t block[2 * W * 128];
  if (CROSSED) std::fill_n(panel.starts, p.groups * 2 * W, 0);
  for (i64 k0 = 0, g = 0; k0 < p.KP(); k0 += 128) {
    const int8_t* from = (const int8_t*)p.w + n0 * ldw + k0;
    i64 stride = ldw;
    if (p.bits == 4) {
      for (i64 n = 0; n < rows; n++) {
        const uint8_t* bytes = p.w + (n0 + n) * ldw + k0 / 2;
        for (int j = 0; j < 64; j++) {
          block[n * 128 + j] = int8_t(((bytes[j] & 15) ^ 8) - 8);
          block[n * 128 + 64 + j] = int8_t(((bytes[j] >> 4) ^ 8) - 8);
        }
      }
    } else if (rows < 2 * W || k0 + 128 > p.K) {
      const i64 columns = std::min<i64>(128, p.K - k0);
      for (i64 n = 0; n < rows; n++) {
        memcpy(block + n * 128, from + n * ldw, columns);
        memset(block + n * 128 + columns, 0, 128 - columns);
      }
    }
    if (p.bits == 4 || rows < 2 * W || k0 + 128 > p.K) {
      memset(block + rows * 128, 0, (2 * W - rows) * 128);
      from = block, stride = 128;
    }
    for (i64 k = k0; k < k0 + 128; k += 16) {  // within one group
      int32_t* words = panel.words + k / KS * 2 * W;
      pack(from + k - k0, stride, words);
      if (k == p.group_end(g)) g++;
      if constexpr (CROSSED) crossed(words, panel.starts + g * 2 * W);
    }
  }
  for (i64 g = 0; g < p.groups; g++)
    for (i64 n = 0; n < 2 * W; n++) panel.scales[g * 2 * W + n] = n < rows ? p.sw[(n0 + n) * p.groups + g] : 0.f;
}

// A block of x: [KP / KS] steps of R words; start: [groups][R], what the sums start from. Rows from M on are zeros.
void pack_rows(const IntLinear& p, i64 m0, i64 rows, i64 R, int32_t* block, int32_t* start) {
  X* out = (X*)block;
  for (i64 r = 0; r < R; r++) {
    const int8_t* x = p.x + (m0 + r) * p.K;
    const i64 columns = r < rows ? p.K : 0, whole = columns / KS * KS;
    X* to = out + r * KS;
    for (i64 k = 0; k < whole; k += KS, to += R * KS)
      for (int i = 0; i < KS; i++) to[i] = x[k + i];
    for (i64 k = whole; k < p.KP(); k += KS, to += R * KS)
      for (int i = 0; i < KS; i++) to[i] = k + i < columns ? x[k + i] : 0;
    for (i64 g = 0; g < p.groups; g++) {
      int32_t s = 0;
      if (BIAS && r < rows)
        for (i64 k = g * p.group, end = std::min(p.K, p.group_end(g)); k < end; k++) s += BIAS * x[k];
      if (CROSSED)
        for (i64 k = g * p.group / KS, end = p.group_end(g) / KS; k < end; k += 2)
          for (int i = 0; i < KS; i++) s += out[(k * R + r) * KS + i] * out[((k + 1) * R + r) * KS + i];
      start[g * R + r] = -s;
    }
  }
}

template <int R>
[[gnu::flatten]] void panel_block(const IntLinear& p, const int32_t* x, const int32_t* start, const Panel& panel, i64 m0, i64 n0) {
  F y[R][2];
  each<R>([&](int r) { y[r][0] = y[r][1] = zero(); });
  for (i64 g = 0, s = 0; g < p.groups; g++) {
    I acc[R][2];
    each<R>([&](int r) {
      each<2>([&](int c) { acc[r][c] = CROSSED ? word(start[g * R + r]) + words(panel.starts + (g * 2 + c) * W) : word(start[g * R + r]); });
    });
    for (const i64 end = p.group_end(g) / KS; s < end; s += 2) {
      const int32_t* w = panel.words + s * 2 * W;
      const I w0 = words(w), w1 = words(w + W), v0 = words(w + 2 * W), v1 = words(w + 3 * W);
      each<R>([&](int r) {
        const I xv = word(x[s * R + r]), yv = word(x[(s + 1) * R + r]);
        acc[r][0] = dot(acc[r][0], w0, v0, xv, yv);
        acc[r][1] = dot(acc[r][1], w1, v1, xv, yv);
      });
    }
    const F s0 = load(panel.scales + g * 2 * W), s1 = load(panel.scales + g * 2 * W + W);
    each<R>([&](int r) {
      y[r][0] = fma(to_float(acc[r][0]), s0, y[r][0]);
      y[r][1] = fma(to_float(acc[r][1]), s1, y[r][1]);
    });
  }
  const i64 rows = std::min<i64>(R, p.M - m0), columns = std::min<i64>(2 * W, p.N - n0);
  for (i64 r = 0; r < rows; r++) {
    float out[2 * W];
    const F sx = set1(p.sx[m0 + r]);
    float* to = columns == 2 * W ? p.y + (m0 + r) * p.N + n0 : out;
    store(to, mul(y[r][0], sx));
    store(to + W, mul(y[r][1], sx));
    if (to == out) memcpy(p.y + (m0 + r) * p.N + n0, out, columns * 4);
  }
}

template <int R = PANEL_ROWS, class... A> void panel_rows(i64 rows, A... args) {
  if constexpr (R > 2)
    if (rows < R) return panel_rows<R - 2>(rows, args...);
  panel_block<R>(args...);
}

void panel_linear(const IntLinear& p) {
  const i64 KP = p.KP(), words_x = KP / KS, words_w = words_x * 2 * W;
  const i64 blocks = ceil_div(p.M, PANEL_ROWS), R = ceil_div(ceil_div(p.M, blocks), 2) * 2;  // an even number of rows per block
  const i64 panels = ceil_div(p.N, 2 * W);
  // As many panels per task as fit in 128 KB of the second-level cache, whose rest rows of x pass through, but enough tasks for the
  // threads; if still not enough, split M too.
  const i64 per_task = std::max<i64>(1, std::min<i64>({(1 << 17) / (words_w * 4), panels / (p.threads * 3), 8}));
  const i64 tasks_n = ceil_div(panels, per_task);
  const i64 tasks_m = tasks_n >= p.threads ? 1 : std::min<i64>(ceil_div(p.threads, tasks_n), ceil_div(blocks, 4));
  const i64 sums = p.groups * 2 * W, local = ceil_div(per_task * (words_w + 2 * sums) * 4, 64) * 64;  // bytes of panels, per thread
  Scratch scratch(blocks * (words_x + p.groups) * R * 4 + p.threads * local);
  int32_t* xs = scratch.take<int32_t>(blocks * words_x * R);
  int32_t* starts = scratch.take<int32_t>(blocks * p.groups * R);
  char* locals = scratch.take<char>(p.threads * local);
#pragma omp parallel num_threads(p.threads) if (p.threads > 1)
  {
#pragma omp for
    for (i64 b = 0; b < blocks; b++)
      pack_rows(p, b * R, std::min(R, p.M - b * R), R, xs + b * words_x * R, starts + b * p.groups * R);
    int32_t* mine = (int32_t*)(locals + omp_get_thread_num() * local);
    auto panel = [&](i64 i) {
      int32_t* starts = mine + per_task * words_w + 2 * i * sums;
      return Panel{mine + i * words_w, starts, (float*)starts + sums};
    };
#pragma omp for schedule(dynamic)
    for (i64 task = 0; task < tasks_n * tasks_m; task++) {
      const i64 first = task / tasks_m * per_task, count = std::min(per_task, panels - first);
      for (i64 i = 0; i < count; i++) pack_panel(p, (first + i) * 2 * W, panel(i));
      for (i64 b = blocks * (task % tasks_m) / tasks_m, end = blocks * (task % tasks_m + 1) / tasks_m; b < end; b++)
        for (i64 i = 0; i < count; i++)
          panel_rows(R, p, xs + b * words_x * R, starts + b * p.groups * R, panel(i), b * R, (first + i) * 2 * W);
    }
  }
}

}  // namespace

// bits: 8 or 4. group: columns per scale (a multiple of 16; K where there is one scale per row). way: 0 = choose, 1 = dot, 2 = panel.
extern "C" void qc_int_linear(int bits, const int8_t* x, const float* sx, const uint8_t* w, const float* sw, float* y,
                              i64 M, i64 N, i64 K, i64 group, int threads, int way) {
  if (M == 0 || N == 0) return;
  if ((double)M * N * K < 65536) threads = 1;  // waking a thread costs more
  const IntLinear p{bits, x, sx, w, sw, y, M, N, K, group, ceil_div(K, group), threads};
  const bool fits = p.groups == 1 || group % 64 == 0;  // a group must be whole steps of the dot kernel
  const i64 few = p.groups == 1 ? DOT_MAX : DOT_MAX_GROUPED;
  if (!fits || way == 2 || (way == 0 && M > few)) return panel_linear(p);
  if (bits == 8) return p.groups == 1 ? dot_linear<8, false>(p) : dot_linear<8, true>(p);
  return p.groups == 1 ? dot_linear<4, false>(p) : dot_linear<4, true>(p);
}

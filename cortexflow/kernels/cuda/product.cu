// A product of many rows, x [m, k] @ w [n, k] transposed, in tiles as wide as lets them fill the card once.
//
// A block computes ROWS x COLUMNS: one warp fetches blocks of both factors, 64 numbers of k at a time, through a ring
// of STAGES; each warpgroup multiplies 64 rows; another warp fetches what is needed at the end. CLUSTER blocks, one
// above the other, share the rows of w, of which each fetches a part for all. Blocks of w, which was there long ago,
// are fetched before the wait for the kernel ahead; AHEAD of them, as more would delay the first of x.
//
// NORM: rows are normed as if before the product. With mean u and r = rsqrt(variance + eps) of a row of x,
//     ((x - u) r) @ w + bias = r (x @ w) - r u (1 @ w) + bias,
// where `sums` is 1 @ w. Mean and variance come from the sums of x and x^2, which the product that made x wrote for
// each of its NORM tiles of columns (STATS). PARTS: k is split, and each part of k goes to `parts` in float32.

#define GROUPS (ROWS / 64)
#define STAGE ((ROWS + COLUMNS) * 128)  // bytes of a block of x and one of w
#define ENTRIES (COLUMNS / 2)           // of the result in a thread
#define OTHERS (GROUPS * 128 + 32)      // threads that meet before the end: warpgroups and the last warp

__device__ __forceinline__ void multiply(float (&d)[ENTRIES], u64 a, u64 b, int add) { @MULTIPLY@ }

// What GELU divides x by. Bounded, so that the product of two is finite; there x / 2^60 is nothing.
__device__ __forceinline__ float gelu_divisor(float x) { return 1.f + exp2_of(fminf(gelu_exponent(x), 60.f)); }
// One reciprocal for two: the special function unit is what the end of such a tile waits for.
__device__ __forceinline__ void gelu(float& x, float& y) {
  const float a = gelu_divisor(x), b = gelu_divisor(y), r = reciprocal(a * b);
  x *= b * r;
  y *= a * r;
}

extern "C" __global__ void __launch_bounds__(GROUPS * 128 + 64, 1)
product(const Map* x, const Map* w, const Map* out, const Map* residual, const u16* bias, const float* sums,
        const float2* stats, float2* new_stats, float* parts, int m, int n, int blocks, float share, float eps) {
  extern __shared__ unsigned char memory[];
  const u32 begin = shared_address(memory), base = (begin + 1023) & ~1023u;
  const u32 full = base + STAGES * STAGE, empty = full + STAGES * 8, added = empty + STAGES * 8;
  const u32 ends = (added + 8 + 127) & ~127u, before = (ends + COLUMNS * 8 + ROWS * 8 + 127) & ~127u;
  float* const bias_of = (float*)(memory + (ends - begin));
  float* const sum_of = bias_of + COLUMNS;
  float2* const norm_of = (float2*)(sum_of + COLUMNS);
  const unsigned char* const residual_of = memory + (before - begin);

  const int place = blockIdx.x % CLUSTER, tile = blockIdx.x / CLUSTER / SPLIT, part = blockIdx.x / CLUSTER % SPLIT;
  const int down = (m + ROWS * CLUSTER - 1) / (ROWS * CLUSTER);
  const int row = (tile % down * CLUSTER + place) * ROWS, column = tile / down * COLUMNS;
  const int each = (blocks + SPLIT - 1) / SPLIT, first = part * each, count = min(each, blocks - first);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; s++) {
      barrier_init(full + s * 8, 1);
      barrier_init(empty + s * 8, GROUPS * 4 * CLUSTER);
    }
    barrier_init(added, 1);
    barriers_are_there();
  }
  if (CLUSTER > 1) {
    cluster_arrive();
    cluster_wait();
  } else {
    __syncthreads();
  }

  if (warp == GROUPS * 4) {  // fetches
    if (lane != 0) return;
    fetch_map(x);
    fetch_map(out);
    const int head = min(AHEAD, count);
    auto fetch_w = [&](int c, int s) {
      const int mine = place * (COLUMNS / CLUSTER);
      const u32 to = base + s * STAGE + ROWS * 128 + mine * 128;
      expect(full + s * 8, STAGE);
      if (CLUSTER > 1)
        copy_in_to_all(to, w, (first + c) * 64, column + mine, full + s * 8, (1 << CLUSTER) - 1);
      else
        copy_in(to, w, (first + c) * 64, column, full + s * 8);
    };
    auto fetch_x = [&](int c, int s) { copy_in(base + s * STAGE, x, (first + c) * 64, row, full + s * 8); };
    for (int c = 0; c < head; c++) fetch_w(c, c);
    wait_for_previous();
#if RESIDUAL
    expect(added, ROWS * COLUMNS * 2);
    copy_in(before, residual, column, row, added);
#endif
    for (int c = 0; c < head; c++) fetch_x(c, c);
    for (int c = head; c < count; c++) {
      const int s = c % STAGES;
      if (c >= STAGES) barrier_wait(empty + s * 8, c / STAGES % 2 == 0);
      fetch_w(c, s);
      fetch_x(c, s);
    }
    return;
  }
#if !PARTS
  if (warp > GROUPS * 4) {  // fetches what the end needs
#if BIAS
    for (int i = lane; i < COLUMNS; i += 32) bias_of[i] = column + i < n ? low(bias[column + i]) : 0.f;
#endif
#if NORM
    for (int i = lane; i < COLUMNS; i += 32) sum_of[i] = column + i < n ? sums[column + i] : 0.f;
    wait_for_previous();
#pragma unroll
    for (int r = lane; r < ROWS; r += 32) {
      float2 given[NORM];
      float mean = 0.f, square = 0.f;
#pragma unroll
      for (int i = 0; i < NORM; i++)
        given[i] = row + r < m ? __ldcg(stats + (u64)i * m + row + r) : make_float2(0.f, 0.f);
#pragma unroll
      for (int i = 0; i < NORM; i++) {
        mean += given[i].x;
        square += given[i].y;
      }
      mean *= share;
      const float scale = rsqrtf(fmaxf(square * share - mean * mean, 0.f) + eps);
      norm_of[r] = make_float2(scale, -scale * mean);
    }
#endif
    asm volatile("bar.arrive 1, %0;" ::"n"(OTHERS) : "memory");
    return;
  }
#else
  if (warp > GROUPS * 4) return;
#endif

  float d[ENTRIES];
  const int group = warp / 4;
  for (int c = 0; c < count; c++) {
    const int s = c % STAGES;
    barrier_wait(full + s * 8, c / STAGES % 2);
    const u64 a = described<1>(base + s * STAGE + group * 8192, 1024);
    const u64 b = described<1>(base + s * STAGE + ROWS * 128, 1024);
    products_begin();
#pragma unroll
    for (int i = 0; i < 4; i++) multiply(d, a + 2 * i, b + 2 * i, c + i > 0);
    products_commit();
    if (c > 0) {
      products_wait<1>();
      if (c - 1 + STAGES < count && lane < CLUSTER) arrive_at(empty + (c - 1) % STAGES * 8, lane);
    }
  }
  settle(d);
  products_wait<0>();
  settle(d);
  let_next_start();  // not before: its programs would crowd where this kernel has left processors idle
  wait_for_previous();

  const int mine = group * 64 + warp % 4 * 16 + lane / 4, pair = lane % 4 * 2;  // rows `mine` and `mine` + 8
#if PARTS
  float* const to = parts + (u64)part * m * n;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int r = row + mine + half * 8;
    if (r < m) {
#pragma unroll
      for (int j = 0; j < COLUMNS / 8; j++) {
        const int c = column + j * 8 + pair;
        if (c < n) *(float2*)(to + (u64)r * n + c) = make_float2(d[4 * j + 2 * half], d[4 * j + 2 * half + 1]);
      }
    }
  }
#else
  asm volatile("bar.sync 1, %0;" ::"n"(OTHERS) : "memory");  // also: the ring is read, its place is free
#if NORM
  const float2 norm = norm_of[mine], norm8 = norm_of[mine + 8];
#endif
#if RESIDUAL
  barrier_wait(added, 0);
#endif
#if STATS
  float sum = 0.f, square = 0.f, sum8 = 0.f, square8 = 0.f;
#endif
  u32 packed[ENTRIES / 2];
#pragma unroll
  for (int j = 0; j < COLUMNS / 8; j++) {
    float e[4] = {d[4 * j], d[4 * j + 1], d[4 * j + 2], d[4 * j + 3]};
    float2 b = make_float2(0.f, 0.f);
#if BIAS
    b = *(const float2*)(bias_of + j * 8 + pair);
#endif
#if NORM
    const float2 s = *(const float2*)(sum_of + j * 8 + pair);
    e[0] = fmaf(e[0], norm.x, fmaf(norm.y, s.x, b.x));
    e[1] = fmaf(e[1], norm.x, fmaf(norm.y, s.y, b.y));
    e[2] = fmaf(e[2], norm8.x, fmaf(norm8.y, s.x, b.x));
    e[3] = fmaf(e[3], norm8.x, fmaf(norm8.y, s.y, b.y));
#else
    e[0] += b.x, e[1] += b.y, e[2] += b.x, e[3] += b.y;
#endif
#if GELU
    gelu(e[0], e[1]);
    gelu(e[2], e[3]);
#endif
#if RESIDUAL
    const u32 r = *(const u32*)(residual_of + (mine * COLUMNS + j * 8 + pair) * 2);
    const u32 r8 = *(const u32*)(residual_of + ((mine + 8) * COLUMNS + j * 8 + pair) * 2);
    e[0] += low(r), e[1] += high(r), e[2] += low(r8), e[3] += high(r8);
#endif
    const u32 p = pack(e[0], e[1]), p8 = pack(e[2], e[3]);
#if STATS
    if (column + j * 8 + pair < n) {
      sum += low(p) + high(p), square += low(p) * low(p) + high(p) * high(p);
      sum8 += low(p8) + high(p8), square8 += low(p8) * low(p8) + high(p8) * high(p8);
    }
#endif
    packed[2 * j] = p, packed[2 * j + 1] = p8;
  }
  const u32 tile_of = base + group * 64 * COLUMNS * 2;  // rows of COLUMNS numbers
  const u32 at = tile_of + (warp % 4 * 16 + lane % 16) * COLUMNS * 2 + lane / 16 * 16;
#pragma unroll
  for (int j = 0; j + 1 < COLUMNS / 8; j += 2)
    store_fragments(at + j * 16, packed[2 * j], packed[2 * j + 1], packed[2 * j + 2], packed[2 * j + 3]);
  if (COLUMNS / 8 % 2) store_fragments(at + COLUMNS * 2 - 16, packed[ENTRIES / 2 - 2], packed[ENTRIES / 2 - 1]);
  stores_are_visible_to_copies();
  asm volatile("bar.sync %0, 128;" ::"r"(2 + group) : "memory");
  if (threadIdx.x % 128 == 0) copy_out(out, column, row + group * 64, tile_of);
#if STATS
#pragma unroll
  for (int i = 1; i < 4; i *= 2) {
    sum += __shfl_xor_sync(~0u, sum, i), square += __shfl_xor_sync(~0u, square, i);
    sum8 += __shfl_xor_sync(~0u, sum8, i), square8 += __shfl_xor_sync(~0u, square8, i);
  }
  if (lane % 4 == 0) {
    float2* const to = new_stats + (u64)(column / COLUMNS) * m + row + mine;
    if (row + mine < m) to[0] = make_float2(sum, square);
    if (row + mine + 8 < m) to[8] = make_float2(sum8, square8);
  }
#endif
  if (threadIdx.x % 128 == 0) copies_have_read();
#endif
}

// A product of up to 16 rows that streams its weights: out = residual + gate * act(norm(x) @ w.T), w [n, k] by rows.
//
// A block computes COLUMNS columns of the result (with GLU, from as many rows of gate and of up); each multiprocessor
// has one. Its weights are on their way to shared memory, row by row through the copy engine, before it waits for the
// kernel ahead: that takes no registers, so that the next kernels' blocks are resident beside it and fetch theirs.
// After the wait there is one round of loads (the rows of x, straight into fragments), the products, and one exchange
// through shared memory in which the warps' parts of k are added. A thread's fragments are eight neighbours along k, of
// both factors alike. CLUSTER blocks share k, so that fewer rows of x are read: each finishes a part of the columns.
// HELD: weights are read from shared memory before the wait, where registers are enough for them.
//
// NORM: norm(x) * scale + shift, times w, is r * ((x * scale) @ w) + shift @ w with r = rsqrt(mean(x^2) + eps): `shift`
// stands in the last row of x (MODULATED), and r comes from sums of x^2 that the kernel ahead has written, SQUARES of
// them a row. SUMMED: this kernel writes such of its own result.
// ROTATE: the columns are heads of D numbers; a block has pairs of them, D / 2 apart, and rotates those below ROTATE.

#define WIDE (COLUMNS * (1 + GLU))        // rows of w in a block
#define TILES ((WIDE + 7) / 8)            // of one instruction
#define SUMS (TILES < 4 ? 4 / TILES : 1)  // accumulators of a tile, so that few products wait for each other
#define DEPTH (K / CLUSTER)               // numbers of k in a block
#define EACH (DEPTH / CHUNKS / WARPS)     // of a chunk, in a warp
#define STEPS (EACH / 32)                 // of two instructions each
#define PITCH (2 * DEPTH + 64)            // bytes from row to row: no two of a fragment's meet in a bank
#define MINE (COLUMNS / CLUSTER)          // columns that a block finishes
#define PAIRS (16 * MINE / 2)             // of neighbours in what it finishes
#define ROUNDS ((PAIRS + WARPS * 32 - 1) / (WARPS * 32))
#define GROUP (PIECE / (2 * DEPTH))       // rows of w that are asked for at a time
#define GROUPS ((WIDE + GROUP - 1) / GROUP)
#define SHARE (WARPS * 2)                 // threads that add the squares of a row
#define FOURS ((SQUARES + SHARE * 4 - 1) / (SHARE * 4))

__device__ __forceinline__ u32 times(u32 x, u32 y) {
  u32 r;
  asm("mul.rn." NUMBER "x2 %0, %1, %2;" : "=r"(r) : "r"(x), "r"(y));
  return r;
}
// To the same place in another block of the cluster, whose barrier counts the bytes.
__device__ __forceinline__ void send(u32 to, float x, float y, u32 barrier, int block) {
  asm volatile("{\n.reg .b32 there, counter;\nmapa.shared::cluster.u32 there, %0, %4;\n"
               "mapa.shared::cluster.u32 counter, %3, %4;\n"
               "st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [there], {%1, %2}, [counter];\n}"
               ::"r"(to), "f"(x), "f"(y), "r"(barrier), "r"(block) : "memory");
}
__device__ __forceinline__ float activated(float x) {
#if ACT == 1
  return x * reciprocal(1.f + exp2_of(gelu_exponent(x)));
#elif ACT == 2
  return x * reciprocal(1.f + exp2_of(x * -1.4426950409f));
#else
  return x;
#endif
}
__device__ __forceinline__ void weights_are_there(u32 barrier) {
#pragma unroll
  for (int g = 0; g < GROUPS; g++) barrier_wait(barrier + 8 * g, 0);
}

// Where a fragment's numbers stand: the row of w that tile t has for a thread, and k in it. Of the last tile some rows
// may not be there, in whose place any other will do.
__device__ __forceinline__ u32 line_of(int t, int row) {
  return (WIDE % 8 && t == TILES - 1 ? min(t * 8 + row, WIDE - 1) : t * 8 + row) * PITCH;
}
__device__ __forceinline__ u32 place_of(int c, int i, int first) { return (c * (DEPTH / CHUNKS) + i * 32 + first) * 2; }

// Where a warp keeps its sum of row m and some column: tiles begin at different rows, as whole ones meet in a bank. It
// takes the place of weights that the warp alone has read; of a tile in two of their rows, eight of the result in each.
__device__ __forceinline__ u32 kept_at(int column, int m) {
  return (column / 8 * 2 + m / 8) * PITCH + (m + column / 8 * 2) % 8 * 32 + column % 8 * 4;
}
__device__ __forceinline__ void add(float2& y, u32 from) {
  const float2 s = load_sums(from);
  y.x += s.x, y.y += s.y;
}

// Where column i of a block stands in w and in the result.
__device__ __forceinline__ int column_of(int tile, int i) {
#if ROTATE
  const int pair = tile / 2 + i % (COLUMNS / 2);
  return pair / (D / 2) * D + pair % (D / 2) + i / (COLUMNS / 2) * (D / 2);
#else
  return tile + i;
#endif
}

extern "C" __global__ void __maxnreg__(REGISTERS)
streaming(const u16* x, const u16* w, u16* out, const u16* residual, const u16* gate, const u16* scale,
          const u16* shift, const float* squares, float* new_squares, const float* cosine, const float* sine,
          int rows, int n, int x_row, int out_row, int residual_row, float eps) {
  extern __shared__ unsigned char memory[];
  const u32 weights = (shared_address(memory) + 127) & ~127u, scales = weights + WIDE * PITCH;
  const u32 norms = scales + MODULATED * 2 * DEPTH;  // f32 [16]
  const u32 sent = norms + 64;                       // f32 [CLUSTER - 1, 16, MINE]
  const u32 barrier = sent + (CLUSTER - 1) * 64 * MINE;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = lane / 4, quarter = lane % 4;
  const int tile = blockIdx.x / CLUSTER * COLUMNS, rank = blockIdx.x % CLUSTER, k0 = rank * DEPTH;
  let_next_start();
  if (tile >= n) {  // only there so that every multiprocessor has a block
    wait_for_previous();
    return;
  }
  if (threadIdx.x == 0) {
#pragma unroll
    for (int g = 0; g < GROUPS + (CLUSTER > 1); g++) barrier_init(barrier + 8 * g, 1);
    barriers_are_there();
  }
#if CLUSTER > 1
  cluster_arrive();
#endif
  __syncthreads();
  if (CLUSTER > 1 && threadIdx.x == 0) expect(barrier + 8 * GROUPS, (CLUSTER - 1) * rows * MINE * 4);
#pragma unroll 1
  for (int g = warp; g < GROUPS; g += WARPS) {  // a few rows at a time: more in flight would delay what others load
    if (g >= WINDOW) barrier_wait(barrier + 8 * (g - WINDOW), 0);
    const int r = g * GROUP + lane, count = min(GROUP, WIDE - g * GROUP);
    if (lane == 0) expect(barrier + 8 * g, (count + (MODULATED && g == 0)) * DEPTH * 2);
    __syncwarp();
    if (lane < count) {
      const int from = r < COLUMNS ? column_of(tile, r) : n + tile + r - COLUMNS;
      copy_line(weights + r * PITCH, w + (u64)from * K + k0, DEPTH * 2, barrier + 8 * g);
    }
    if (MODULATED && g == 0 && lane == 0) copy_line(scales, scale + k0, DEPTH * 2, barrier);
  }
  const int first = warp * EACH + quarter * 8;  // of k, in each chunk and step
  const bool low_there = row < rows, high_there = row + 8 < rows, last = MODULATED && row == 7;
  Four low[CHUNKS][STEPS], high[CHUNKS][STEPS];
#pragma unroll
  for (int i = 0; i < CHUNKS * STEPS; i++)
    high[i / STEPS][i % STEPS] = load(shift + k0 + first + i / STEPS * (DEPTH / CHUNKS) + i % STEPS * 32, last);
  u32 factors[ROUNDS];
  float angles[ROUNDS][2];
#pragma unroll
  for (int i = 0; i < ROUNDS; i++) {
    const int pair = i * WARPS * 32 + threadIdx.x, m = pair / (MINE / 2), p = pair % (MINE / 2);
    (void)m, (void)p;
#if GATE
    factors[i] = load_pair(gate + tile + rank * MINE + p * 2, m < rows);
#endif
#if ROTATE
    const int column = column_of(tile, p), at = m * (D / 2) + column % D;
    angles[i][0] = load_number(cosine + at, m < rows && column < ROTATE);
    angles[i][1] = load_number(sine + at, m < rows && column < ROTATE);
#endif
  }
#if HELD
  Four held[CHUNKS][STEPS][TILES];
  weights_are_there(barrier);
#pragma unroll
  for (int i = 0; i < CHUNKS * STEPS; i++)
#pragma unroll
    for (int t = 0; t < TILES; t++)
      held[i / STEPS][i % STEPS][t] = load_shared(weights + line_of(t, row) + place_of(i / STEPS, i % STEPS, first));
#endif
#if CLUSTER > 1
  cluster_wait();  // the others' barriers are there
#endif
  wait_for_previous();

  const u16* const low_from = x + row * x_row + k0 + first;
  const u16* const high_from = low_from + 8 * x_row;
#pragma unroll
  for (int c = 0; c < AHEAD; c++)
#pragma unroll
    for (int i = 0; i < STEPS; i++) {
      const int k = c * (DEPTH / CHUNKS) + i * 32;
      low[c][i] = load(low_from + k, low_there);
      high[c][i] = load(high_from + k, high_there, high[c][i]);
    }
  u32 before[ROUNDS];
#if RESIDUAL
#pragma unroll
  for (int i = 0; i < ROUNDS; i++) {
    const int pair = i * WARPS * 32 + threadIdx.x, m = pair / (MINE / 2), p = pair % (MINE / 2);
    before[i] = load_pair(residual + m * residual_row + tile + rank * MINE + p * 2, m < rows);
  }
#endif
#if NORM
  Four numbers[FOURS];  // of row threadIdx.x / SHARE
#pragma unroll
  for (int j = 0; j < FOURS; j++) {
    const int m = threadIdx.x / SHARE, at = (j * SHARE + threadIdx.x % SHARE) * 4;
    numbers[j] = load((const u16*)(squares + m * SQUARES + at), m < rows && at < SQUARES);
  }
#endif
  if (!HELD) weights_are_there(barrier);
  float sums[SUMS][TILES][4] = {};
#pragma unroll
  for (int c = 0; c < CHUNKS; c++) {
#pragma unroll
    for (int i = 0; i < STEPS; i++) {
      const Four a = low[c][i], b = high[c][i];
      Four v[TILES];
#pragma unroll
      for (int t = 0; t < TILES; t++)
#if HELD
        v[t] = held[c][i][t];
#else
        v[t] = load_shared(weights + line_of(t, row) + place_of(c, i, first));
#endif
#if MODULATED
      const Four f = load_shared(scales + place_of(c, i, first));
#endif
#pragma unroll
      for (int j = 0; j < 2; j++) {
        u32 a0 = j ? a.c : a.a, a1 = j ? b.c : b.a, a2 = j ? a.d : a.b, a3 = j ? b.d : b.b;
#if MODULATED
        a0 = times(a0, j ? f.c : f.a), a2 = times(a2, j ? f.d : f.b);
        const u32 one = HALF ? 0x3c003c00 : 0x3f803f80;
        a1 = times(a1, last ? one : j ? f.c : f.a), a3 = times(a3, last ? one : j ? f.d : f.b);
#endif
#pragma unroll
        for (int t = 0; t < TILES; t++)
          multiply_few(sums[(2 * i + j) % SUMS][t], a0, a1, a2, a3, j ? v[t].c : v[t].a, j ? v[t].d : v[t].b);
      }
    }
    if (c + AHEAD < CHUNKS)
#pragma unroll
      for (int i = 0; i < STEPS; i++) {
        const int k = (c + AHEAD) * (DEPTH / CHUNKS) + i * 32;
        low[c + AHEAD][i] = load(low_from + k, low_there);
        high[c + AHEAD][i] = load(high_from + k, high_there, high[c + AHEAD][i]);
      }
  }

#if NORM
  float square_sum = 0.f, norm;
#pragma unroll
  for (int j = 0; j < FOURS; j++) {
    const Four v = numbers[j];
    square_sum += (__uint_as_float(v.a) + __uint_as_float(v.b)) + (__uint_as_float(v.c) + __uint_as_float(v.d));
  }
#pragma unroll
  for (int j = SHARE / 2; j; j /= 2) square_sum += __shfl_xor_sync(~0u, square_sum, j);
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(norm) : "f"(square_sum * (1.f / K) + eps));
  if (threadIdx.x % SHARE == 0) store_sum(norms + threadIdx.x / SHARE * 4, norm);
  __syncthreads();
  const float r_low = load_sum(norms + row * 4), r_high = load_sum(norms + row * 4 + 32);
#endif
  __syncwarp();
  const u32 place = weights + warp * EACH * 2;
#pragma unroll
  for (int t = 0; t < TILES; t++) {
    float* const s = sums[0][t];
#pragma unroll
    for (int o = 1; o < SUMS; o++)
#pragma unroll
      for (int i = 0; i < 4; i++) s[i] += sums[o][t][i];
#if MODULATED
    const float shift0 = __shfl_sync(~0u, s[2], 28 + quarter), shift1 = __shfl_sync(~0u, s[3], 28 + quarter);
    s[0] = s[0] * r_low + shift0, s[1] = s[1] * r_low + shift1;
    s[2] = s[2] * r_high + shift0, s[3] = s[3] * r_high + shift1;
#elif NORM
    s[0] *= r_low, s[1] *= r_low, s[2] *= r_high, s[3] *= r_high;
#endif
    store_sums(place + kept_at(t * 8 + quarter * 2, row), s[0], s[1]);
    store_sums(place + kept_at(t * 8 + quarter * 2, row + 8), s[2], s[3]);
  }
  __syncthreads();
#if CLUSTER > 1
#pragma unroll
  for (int i = 0; i < (16 * (COLUMNS - MINE) / 2 + WARPS * 32 - 1) / (WARPS * 32); i++) {  // what others finish
    const int pair = i * WARPS * 32 + threadIdx.x, m = pair / ((COLUMNS - MINE) / 2), p = pair % ((COLUMNS - MINE) / 2);
    const int to = (rank + 1 + p / (MINE / 2)) % CLUSTER, q = p % (MINE / 2) * 2, column = to * MINE + q;
    if (m < rows) {
      float2 y = {0.f, 0.f};
#pragma unroll
      for (int v = 0; v < WARPS; v++) add(y, weights + kept_at(column, m) + v * EACH * 2);
      const int slot = (rank - to - 1 + CLUSTER) % CLUSTER;  // the sender's, of those that the receiver has
      send(sent + ((slot * 16 + m) * MINE + q) * 4, y.x, y.y, barrier + 8 * GROUPS, to);
    }
  }
#endif
#pragma unroll
  for (int i = 0; i < ROUNDS; i++) {
    const int pair = i * WARPS * 32 + threadIdx.x, m = pair / (MINE / 2), p = pair % (MINE / 2);
    const bool there = m < rows;
    float square = 0.f;
    if (there) {
      float2 y = {0.f, 0.f}, z = {0.f, 0.f};
      (void)z;
#if ROTATE
      const u32 from = weights + kept_at(p, m), other = weights + kept_at(p + COLUMNS / 2, m);
#pragma unroll
      for (int v = 0; v < WARPS; v++) y.x += load_sum(from + v * EACH * 2), y.y += load_sum(other + v * EACH * 2);
      const int column = column_of(tile, p);
      u32 both = pack(y.x, y.y);
      if (column < ROTATE) {
        const float y1 = ::low(both), y2 = ::high(both);  // rounded before the rotation, as where it is a kernel's own
        const float c = angles[i][0], s = angles[i][1];
        both = pack(y1 * c - y2 * s, y2 * c + y1 * s);
      }
      out[m * out_row + column] = (u16)both, out[m * out_row + column + D / 2] = (u16)(both >> 16);
#else
      const int column = rank * MINE + p * 2;
#pragma unroll
      for (int v = 0; v < WARPS; v++) {
        add(y, weights + kept_at(column, m) + v * EACH * 2);
        if (GLU) add(z, weights + kept_at(COLUMNS + column, m) + v * EACH * 2);
      }
#if CLUSTER > 1
      barrier_wait(barrier + 8 * GROUPS, 0);
#pragma unroll
      for (int v = 0; v < CLUSTER - 1; v++) add(y, sent + ((v * 16 + m) * MINE + p * 2) * 4);
#endif
      y.x = activated(y.x), y.y = activated(y.y);
#if GLU
      y.x *= z.x, y.y *= z.y;
#endif
#if GATE
      y.x *= ::low(factors[i]), y.y *= ::high(factors[i]);
#endif
#if RESIDUAL
      y.x += ::low(before[i]), y.y += ::high(before[i]);
#endif
      const u32 both = pack(y.x, y.y);
      *(u32*)(out + m * out_row + tile + column) = both;
      square = ::low(both) * ::low(both) + ::high(both) * ::high(both);
#endif
    }
#if SUMMED
#pragma unroll
    for (int j = 1; j < MINE / 2; j *= 2) square += __shfl_xor_sync(~0u, square, j);
    if (there && p == 0) new_squares[m * (n / MINE) + tile / MINE + rank] = square;
#endif
  }
}

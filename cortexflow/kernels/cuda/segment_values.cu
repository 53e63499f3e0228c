// Attention of few tokens to a cache and to themselves, second half: 16 rows of the result, COLUMNS numbers of a head.
//
// The weights of all parts of 32 keys, each below its own largest logit, times the values; a warp has every eighth.
// The cache's values are fetched before the wait and stand in registers behind it.

#define KEYS 32
#define WARPS 8
#define COLUMNS 16
#define LINE 48  // bytes of a key's values in shared memory
#define ROUNDS ((PARTS + WARPS - 1) / WARPS)
#define SHARED ((PARTS + WARPS * 2 - 1) / (WARPS * 2))

__device__ __forceinline__ float2 load_stats(const float2* from) {
  float2 r;
  asm volatile("ld.global.cg.v2.f32 {%0, %1}, [%2];" : "=f"(r.x), "=f"(r.y) : "l"(from) : "memory");
  return r;
}
// Half the values of a key of some part, zero where there is no such key.
__device__ __forceinline__ void fetch(u32 values_at, int part, int line, int half, const u16* from, int stride,
                                      int count) {
  const int key = part * KEYS + line, own = part == PARTS - 1 ? line : key;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(values_at + key * LINE + half * 16),
               "l"(from + (u64)(own < count ? own : 0) * stride + half * 8), "r"(own < count ? 16 : 0) : "memory");
}
__device__ __forceinline__ void fetched() {
  asm volatile("cp.async.commit_group;\ncp.async.wait_group 0;" ::: "memory");
}
// Fragments of 16 keys and 16 columns; keys in the order in which a thread loads weights, eight neighbours.
__device__ __forceinline__ Four transposed(u32 values_at, int part, int j, int lane) {
  const int line = lane % 8, key = part * KEYS + line / 2 * 8 + j * 4 + line % 2 + lane / 8 % 2 * 2;
  Four v;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.a), "=r"(v.b), "=r"(v.c), "=r"(v.d) : "r"(values_at + key * LINE + lane / 16 * 16) : "memory");
  return v;
}

extern "C" __global__ void __launch_bounds__(WARPS * 32)
segment_values(const u16* weights, const float2* stats, const u16* own_v, const u16* cached_v, u16* out, int tokens,
               int cached, int tiles, int v_row, int cached_row, int out_row) {
  extern __shared__ __align__(16) unsigned char memory[];
  const u32 values_at = shared_address(memory), sums_at = values_at + PARTS * KEYS * LINE;  // f32 [WARPS, 2, 16, 8]
  const u32 shares_at = sums_at + WARPS * 1024, tops_at = shares_at + PARTS * 64;  // [PARTS, 16], [WARPS, 16]
  const u32 totals_at = tops_at + WARPS * 64;                                      // [WARPS, 16]
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = lane / 4, quarter = lane % 4;
  const int tile = blockIdx.x / (D / COLUMNS), column0 = blockIdx.x % (D / COLUMNS) * COLUMNS, rows = tokens * HEADS;
  let_next_start();
  if (tile >= tiles) {  // only there so that every multiprocessor has a block
    wait_for_previous();
    return;
  }
  for (int i = threadIdx.x; i < (PARTS - 1) * KEYS * 2; i += WARPS * 32)
    fetch(values_at, i / 2 / KEYS, i / 2 % KEYS, i % 2, cached_v + column0, cached_row, cached);
  fetched();
  __syncthreads();
  Four v[ROUNDS][2];
#pragma unroll
  for (int i = 0; i < ROUNDS; i++) {
    const int part = warp + i * WARPS;
    if (part >= PARTS - 1) continue;
#pragma unroll
    for (int j = 0; j < 2; j++) v[i][j] = transposed(values_at, part, j, lane);
  }
  wait_for_previous();

  const int low_row = tile * 16 + row, high_row = low_row + 8, height = tiles * 16;
  Four low[ROUNDS], high[ROUNDS];
#pragma unroll
  for (int i = 0; i < ROUNDS; i++) {
    const int part = warp + i * WARPS;
    if (part >= PARTS) continue;
    const u16* const from = weights + part * KEYS + quarter * 8;
    low[i] = load(from + (u64)low_row * PARTS * KEYS, low_row < rows);
    high[i] = load(from + (u64)high_row * PARTS * KEYS, high_row < rows);
  }
  float2 each_part[SHARED];  // of row threadIdx.x % 16
#pragma unroll
  for (int i = 0; i < SHARED; i++) {
    const int part = i * WARPS * 2 + threadIdx.x / 16, line = tile * 16 + threadIdx.x % 16;
    each_part[i] = part < PARTS ? load_stats(stats + part * height + line) : make_float2(-3e38f, 0.f);
  }
  if (warp == (PARTS - 1) % WARPS) {
#pragma unroll
    for (int h = 0; h < 2; h++) fetch(values_at, PARTS - 1, lane, h, own_v + column0, v_row, tokens);
    fetched();
    __syncwarp();
#pragma unroll
    for (int j = 0; j < 2; j++) v[ROUNDS - 1][j] = transposed(values_at, PARTS - 1, j, lane);
  }
  // Of each row the largest logit: in a warp two threads have some parts of it each.
  float top = -3e38f;
#pragma unroll
  for (int i = 0; i < SHARED; i++) top = fmaxf(top, each_part[i].x);
  top = fmaxf(top, __shfl_xor_sync(~0u, top, 16));
  if (lane < 16) store_sum(tops_at + (warp * 16 + lane) * 4, top);
  __syncthreads();
#pragma unroll
  for (int w = 0; w < WARPS; w++) top = fmaxf(top, load_sum(tops_at + (w * 16 + lane % 16) * 4));
#pragma unroll
  for (int i = 0; i < SHARED; i++) {
    const int part = i * WARPS * 2 + threadIdx.x / 16;
    const float share = exp2_of(each_part[i].x - top);
    if (part < PARTS) store_sum(shares_at + (part * 16 + threadIdx.x % 16) * 4, share);
    each_part[i].y *= share;
  }
  float total = 0.f;
#pragma unroll
  for (int i = 0; i < SHARED; i++) total += each_part[i].y;
  total += __shfl_xor_sync(~0u, total, 16);
  if (lane < 16) store_sum(totals_at + (warp * 16 + lane) * 4, total);
  __syncthreads();
  float sums[2][4] = {};
#pragma unroll
  for (int i = 0; i < ROUNDS; i++) {
    if (warp + i * WARPS >= PARTS) continue;
    float each[2][4] = {};
    multiply_few(each[0], low[i].a, high[i].a, low[i].b, high[i].b, v[i][0].a, v[i][0].b);
    multiply_few(each[1], low[i].a, high[i].a, low[i].b, high[i].b, v[i][0].c, v[i][0].d);
    multiply_few(each[0], low[i].c, high[i].c, low[i].d, high[i].d, v[i][1].a, v[i][1].b);
    multiply_few(each[1], low[i].c, high[i].c, low[i].d, high[i].d, v[i][1].c, v[i][1].d);
    const u32 share = shares_at + ((warp + i * WARPS) * 16 + row) * 4;
    const float low_share = load_sum(share), high_share = load_sum(share + 32);
#pragma unroll
    for (int t = 0; t < 2; t++) {
      sums[t][0] += low_share * each[t][0], sums[t][1] += low_share * each[t][1];
      sums[t][2] += high_share * each[t][2], sums[t][3] += high_share * each[t][3];
    }
  }
#pragma unroll
  for (int t = 0; t < 2; t++) {
    store_sums(sums_at + (warp * 2 + t) * 512 + lane * 8, sums[t][0], sums[t][1]);
    store_sums(sums_at + (warp * 2 + t) * 512 + 256 + lane * 8, sums[t][2], sums[t][3]);
  }
  __syncthreads();
  const int m = threadIdx.x / (COLUMNS / 2), column = threadIdx.x % (COLUMNS / 2) * 2, mine = tile * 16 + m;
  if (m >= 16 || mine >= rows) return;
  float2 y = {0.f, 0.f};
#pragma unroll
  for (int w = 0; w < WARPS; w++) {
    const float2 s = load_sums(sums_at + (w * 2 + column / 8) * 512 + m * 32 + column % 8 * 4);
    y.x += s.x, y.y += s.y;
  }
  float whole = 0.f;
#pragma unroll
  for (int w = 0; w < WARPS; w++) whole += load_sum(totals_at + (w * 16 + m) * 4);
  const float r = 1.f / whole;
  *(u32*)(out + (u64)(mine / HEADS) * out_row + mine % HEADS * D + column0 + column) = pack(y.x * r, y.y * r);
}

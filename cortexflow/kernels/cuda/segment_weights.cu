// Attention of few tokens to a cache and to themselves, first half: the weights of a part of KEYS keys, for 16 rows.
//
// A row is a head of a token. The warps share the D numbers of a head; their sums meet in shared memory. What is stored
// are exponentials below the part's own largest logit, and that logit with their sum: the second half makes one of all.

#define KEYS 32
#define WARPS (D / 64)
#define ROUNDS (WARPS < 4 ? 4 / WARPS : 1)
#define LINE 160  // bytes of a row of sums: two rounds of banks for a warp's

extern "C" __global__ void __launch_bounds__(WARPS * 32)
segment_weights(const u16* q, const u16* own_k, const u16* cached_k, const unsigned char* mask, u16* weights,
                float2* stats, int tokens, int cached, int tiles, int parts, int q_row, int k_row, int cached_row,
                int mask_row, float scale) {
  __shared__ __align__(16) unsigned char memory[WARPS * 16 * LINE];
  const u32 sums_at = shared_address(memory);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = lane / 4, quarter = lane % 4;
  const int part = blockIdx.x / tiles, tile = blockIdx.x % tiles, rows = tokens * HEADS;
  let_next_start();
  if (part >= parts) {  // only there so that every multiprocessor has a block
    wait_for_previous();
    return;
  }
  const bool own = part == parts - 1;
  const int first = warp * 64 + quarter * 8, key0 = own ? 0 : part * KEYS, count = own ? tokens : cached;
  const u16* const k_from = (own ? own_k : cached_k) + first;
  const int stride = own ? k_row : cached_row;
  Four k[4][2];
  if (own) wait_for_previous();
#pragma unroll
  for (int t = 0; t < 4; t++)
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int key = key0 + t * 8 + row;
      k[t][i] = load(k_from + (u64)key * stride + i * 32, key < count);
    }
  if (!own) wait_for_previous();
  const int low_row = tile * 16 + row, high_row = low_row + 8;
  const u16* const low_from = q + (u64)(low_row / HEADS) * q_row + low_row % HEADS * D + first;
  const u16* const high_from = q + (u64)(high_row / HEADS) * q_row + high_row % HEADS * D + first;
  Four low[2], high[2];
#pragma unroll
  for (int i = 0; i < 2; i++) {
    low[i] = load(low_from + i * 32, low_row < rows);
    high[i] = load(high_from + i * 32, high_row < rows);
  }
  bool seen[ROUNDS][4];  // at the end a thread has four keys of a row
#pragma unroll
  for (int j = 0; j < ROUNDS; j++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int at = j * WARPS * 32 + threadIdx.x, m = tile * 16 + at / 8, key = key0 + at % 8 * 4 + i;
      seen[j][i] = at < 128 && m < rows && key < count && mask[m / HEADS * mask_row + (own ? cached : 0) + key];
    }
  float sums[4][4] = {};
#pragma unroll
  for (int i = 0; i < 2; i++)
#pragma unroll
    for (int t = 0; t < 4; t++) {
      multiply_few(sums[t], low[i].a, high[i].a, low[i].b, high[i].b, k[t][i].a, k[t][i].b);
      multiply_few(sums[t], low[i].c, high[i].c, low[i].d, high[i].d, k[t][i].c, k[t][i].d);
    }
  const u32 at = sums_at + (warp * 16 + row) * LINE + quarter * 8;
#pragma unroll
  for (int t = 0; t < 4; t++) {
    store_sums(at + t * 32, sums[t][0], sums[t][1]);
    store_sums(at + 8 * LINE + t * 32, sums[t][2], sums[t][3]);
  }
  __syncthreads();
#pragma unroll
  for (int j = 0; j < ROUNDS; j++) {
    const int at = j * WARPS * 32 + threadIdx.x, m = tile * 16 + at / 8, column = at % 8 * 4;
    if (at >= 128) break;
    float logits[4] = {};
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
      const Four s = load_shared(sums_at + (w * 16 + at / 8) * LINE + column * 4);
      logits[0] += __uint_as_float(s.a), logits[1] += __uint_as_float(s.b);
      logits[2] += __uint_as_float(s.c), logits[3] += __uint_as_float(s.d);
    }
    float top = -3e38f;  // a key that is not there is less than one that is not seen, which is less than all seen
#pragma unroll
    for (int i = 0; i < 4; i++) {
      logits[i] = seen[j][i] ? logits[i] * scale : key0 + column + i < count ? -1e30f : -3e38f;
      top = fmaxf(top, logits[i]);
    }
#pragma unroll
    for (int i = 1; i < 8; i *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, i));
    float total = 0.f;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      logits[i] = key0 + column + i < count ? exp2_of(logits[i] - top) : 0.f;
      total += logits[i];
    }
#pragma unroll
    for (int i = 1; i < 8; i *= 2) total += __shfl_xor_sync(~0u, total, i);
    if (m >= rows) continue;
    *(uint2*)(weights + (u64)m * parts * KEYS + part * KEYS + column) =
        make_uint2(pack(logits[0], logits[1]), pack(logits[2], logits[3]));
    if (column == 0) stats[part * tiles * 16 + m] = make_float2(top, total);
  }
}

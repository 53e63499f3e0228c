// Attention without a mask to few keys, which all stand in shared memory and whose logits all stand in registers.
//
// A block computes 64 queries of one head: one warpgroup, up to 256 keys. Heads are 64 + 16 numbers wide, zero behind
// the WIDTH that there are: two pieces, as a row of swizzled shared memory is 128 or 32 bytes. Logits of 128 keys at
// a time are a product of their own; weights go from the fragments of these products straight into those of the next.

#define KEYS 256
#define WIDE_GROUP 1024  // bytes of 8 rows of the piece of 64 numbers
#define NARROW_GROUP 256

__device__ __forceinline__ void logits_of(float (&d)[64], u64 a, u64 b, int add) { @LOGITS@ }
__device__ __forceinline__ void weigh_wide(float (&d)[32], const u32 (&a)[4], u64 b, int add) { @WIDE@ }
__device__ __forceinline__ void weigh_narrow(float (&d)[8], const u32 (&a)[4], u64 b, int add) { @NARROW@ }

extern "C" __global__ void __launch_bounds__(128, 1)
attention(const Map* q_wide, const Map* q_narrow, const Map* k_wide, const Map* k_narrow, const Map* v_wide,
          const Map* v_narrow, const Map* out, int n, int heads, int tiles, float scale) {
  extern __shared__ unsigned char memory[];
  const u32 k0 = (shared_address(memory) + 1023) & ~1023u, v0 = k0 + KEYS * 128, q0 = v0 + KEYS * 128;
  const u32 k1 = q0 + 64 * 128, v1 = k1 + KEYS * 32, q1 = v1 + KEYS * 32, result = q1 + 64 * 32;
  const u32 barrier = result + 64 * WIDTH * 2;  // of queries and the first keys; the other keys; the values
  const int tile = blockIdx.x % tiles, head = blockIdx.x / tiles % heads, sample = blockIdx.x / tiles / heads;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, pair = lane % 4 * 2;
  let_next_start();  // the next kernel fits beside this one, where its weights can be on their way
  if (threadIdx.x == 0) {
    const Map* const maps[] = {q_wide, q_narrow, k_wide, k_narrow, v_wide, v_narrow, out};
#pragma unroll
    for (int i = 0; i < 7; i++) fetch_map(maps[i]);
    for (int i = 0; i < 3; i++) barrier_init(barrier + 8 * i, 1);
    barriers_are_there();
    expect(barrier, (64 + 128) * 160);
    expect(barrier + 8, 128 * 160);
    expect(barrier + 16, KEYS * 160);
    wait_for_previous();
    copy_in(q0, q_wide, 0, head, tile * 64, sample, barrier);
    copy_in(k0, k_wide, 0, head, 0, sample, barrier);
    copy_in(q1, q_narrow, 64, head, tile * 64, sample, barrier);
    copy_in(k1, k_narrow, 64, head, 0, sample, barrier);
    copy_in(k0 + 128 * 128, k_wide, 0, head, 128, sample, barrier + 8);
    copy_in(k1 + 128 * 32, k_narrow, 64, head, 128, sample, barrier + 8);
    for (int i = 0; i < 2; i++) {
      copy_in(v0 + i * 128 * 128, v_wide, 0, head, i * 128, sample, barrier + 16);
      copy_in(v1 + i * 128 * 32, v_narrow, 64, head, i * 128, sample, barrier + 16);
    }
  }
  __syncthreads();

  float s[2][64];  // of rows lane / 4 and lane / 4 + 8 of a warp's 16: in fours, two columns of each
#pragma unroll
  for (int h = 0; h < 2; h++) {
    barrier_wait(barrier + 8 * h, 0);
    const u64 a = described<1>(q0, WIDE_GROUP), b = described<1>(k0 + h * 128 * 128, WIDE_GROUP);
    products_begin();
#pragma unroll
    for (int i = 0; i < 4; i++) logits_of(s[h], a + 2 * i, b + 2 * i, i);
    logits_of(s[h], described<3>(q1, NARROW_GROUP), described<3>(k1 + h * 128 * 32, NARROW_GROUP), 1);
    products_commit();
  }
  float top = -1e30f, top8 = -1e30f;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    if (h == 0)
      products_wait<1>();
    else
      products_wait<0>();
    settle(s[h]);
#pragma unroll
    for (int j = 0; j < 16; j++) {
#if RAGGED
#pragma unroll
      for (int i = 0; i < 2; i++)
        if (h * 128 + j * 8 + pair + i >= n) s[h][4 * j + i] = s[h][4 * j + 2 + i] = -1e30f;
#endif
      top = fmaxf(top, fmaxf(s[h][4 * j], s[h][4 * j + 1]));
      top8 = fmaxf(top8, fmaxf(s[h][4 * j + 2], s[h][4 * j + 3]));
    }
  }
#pragma unroll
  for (int i = 1; i < 4; i *= 2) {
    top = fmaxf(top, __shfl_xor_sync(~0u, top, i));
    top8 = fmaxf(top8, __shfl_xor_sync(~0u, top8, i));
  }
  top *= scale, top8 *= scale;

  float total = 0.f, total8 = 0.f, wide[32], narrow[8];
  u32 p[2][8][4];
  barrier_wait(barrier + 16, 0);
#pragma unroll
  for (int h = 0; h < 2; h++) {
#pragma unroll
    for (int j = 0; j < 16; j++) {
      const float a = exp2_of(fmaf(s[h][4 * j], scale, -top)), b = exp2_of(fmaf(s[h][4 * j + 1], scale, -top));
      const float c = exp2_of(fmaf(s[h][4 * j + 2], scale, -top8)), d = exp2_of(fmaf(s[h][4 * j + 3], scale, -top8));
      total += a + b, total8 += c + d;
      p[h][j / 2][j % 2 * 2] = pack(a, b), p[h][j / 2][j % 2 * 2 + 1] = pack(c, d);
    }
    products_begin();
#pragma unroll
    for (int i = 0; i < 8; i++) {
      weigh_wide(wide, p[h][i], described<1>(v0 + (h * 8 + i) * 16 * 128, WIDE_GROUP), h + i);
      weigh_narrow(narrow, p[h][i], described<3>(v1 + (h * 8 + i) * 16 * 32, NARROW_GROUP), h + i);
    }
    products_commit();
  }
#pragma unroll
  for (int i = 1; i < 4; i *= 2) {
    total += __shfl_xor_sync(~0u, total, i);
    total8 += __shfl_xor_sync(~0u, total8, i);
  }
  total = 1.f / total, total8 = 1.f / total8;
  products_wait<0>();
  settle(wide);
  settle(narrow);

  u32 packed[20];  // eight columns in two numbers
#pragma unroll
  for (int j = 0; j < 10; j++) {
    const float* e = j < 8 ? wide + 4 * j : narrow + 4 * (j - 8);
    packed[2 * j] = pack(e[0] * total, e[1] * total), packed[2 * j + 1] = pack(e[2] * total8, e[3] * total8);
  }
  const u32 at = result + (warp * 16 + lane % 16) * WIDTH * 2 + lane / 16 * 16;
#pragma unroll
  for (int j = 0; j + 1 < WIDTH / 8; j += 2)
    store_fragments(at + j * 16, packed[2 * j], packed[2 * j + 1], packed[2 * j + 2], packed[2 * j + 3]);
  if (WIDTH / 8 % 2) store_fragments(at + WIDTH * 2 - 16, packed[WIDTH / 4 - 2], packed[WIDTH / 4 - 1]);
  stores_are_visible_to_copies();
  __syncthreads();
  if (threadIdx.x == 0) {
    copy_out(out, 0, head, tile * 64, sample, result);
    copies_have_read();
  }
}

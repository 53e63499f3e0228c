// What the kernels of this room share: Hopper's barriers, bulk copies and warpgroup products, as PTX. No headers.

typedef unsigned u32;
typedef unsigned long long u64;
typedef unsigned short u16;
struct alignas(64) Map { u64 words[16]; };  // a tensor map: how the copy engine finds a block of a matrix

#if HALF
#define NUMBER "f16"
#else
#define NUMBER "bf16"
#endif

__device__ __forceinline__ u32 shared_address(const void* p) {
  u32 a;
  asm("{ .reg .u64 t; cvta.to.shared.u64 t, %1; cvt.u32.u64 %0, t; }" : "=r"(a) : "l"(p));
  return a;
}

// ---- programmatic dependent launch -------------------------------------------------------------------

__device__ __forceinline__ void let_next_start() { asm volatile("griddepcontrol.launch_dependents;"); }
__device__ __forceinline__ void wait_for_previous() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// ---- barriers in shared memory -----------------------------------------------------------------------

__device__ __forceinline__ void barrier_init(u32 barrier, u32 arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void barriers_are_there() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
// One arrival that also announces so many bytes of copies.
__device__ __forceinline__ void expect(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
  asm volatile(
      "{\n.reg .pred p;\nAGAIN: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@p bra DONE;\nbra AGAIN;\nDONE:\n}"
      ::"r"(barrier), "r"(parity) : "memory");
}
// The default order, of one block: with the cluster's the compiler adds a fence of the whole card, 0.3 us a block of k.
// What is handed back was read by the matrix units and is overwritten by the copy engine.
__device__ __forceinline__ void arrive_at(u32 barrier, u32 block_of_cluster) {
  asm volatile("{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
               "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(barrier), "r"(block_of_cluster) : "memory");
}

// ---- clusters ----------------------------------------------------------------------------------------

__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// ---- bulk copies -------------------------------------------------------------------------------------

__device__ __forceinline__ void fetch_map(const Map* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
// So many bytes, at multiples of 16, of what is read once: the cache that all share gives it up before anything else.
__device__ __forceinline__ void copy_line(u32 to, const u16* from, int bytes, u32 barrier) {
  u64 policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
               "[%0], [%1], %2, [%3], %4;" ::"r"(to), "l"(from), "r"(bytes), "r"(barrier), "l"(policy) : "memory");
}
__device__ __forceinline__ void copy_in(u32 to, const Map* map, int column, int row, u32 barrier) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
               ::"r"(to), "l"(map), "r"(column), "r"(row), "r"(barrier) : "memory");
}
// To the same place in several blocks of the cluster.
__device__ __forceinline__ void copy_in_to_all(u32 to, const Map* map, int column, int row, u32 barrier, u16 blocks) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
               "[%0], [%1, {%2, %3}], [%4], %5;"
               ::"r"(to), "l"(map), "r"(column), "r"(row), "r"(barrier), "h"(blocks) : "memory");
}
__device__ __forceinline__ void copy_in(u32 to, const Map* map, int d, int head, int row, int sample, u32 barrier) {
  asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
               "[%0], [%1, {%2, %3, %4, %5}], [%6];"
               ::"r"(to), "l"(map), "r"(d), "r"(head), "r"(row), "r"(sample), "r"(barrier) : "memory");
}
__device__ __forceinline__ void copy_out(const Map* map, int column, int row, u32 from) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];"
               ::"l"(map), "r"(column), "r"(row), "r"(from) : "memory");
}
__device__ __forceinline__ void copy_out(const Map* map, int d, int head, int row, int sample, u32 from) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%1, %2, %3, %4}], [%5];"
               ::"l"(map), "r"(d), "r"(head), "r"(row), "r"(sample), "r"(from) : "memory");
}
__device__ __forceinline__ void stores_are_visible_to_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// Until shared memory may be given up; what was copied is visible when the kernel has ended.
__device__ __forceinline__ void copies_have_read() {
  asm volatile("cp.async.bulk.commit_group;\ncp.async.bulk.wait_group.read 0;" ::: "memory");
}

// ---- warpgroup products ------------------------------------------------------------------------------

// A matrix in shared memory: SWIZZLE 1 for rows of 128 bytes, 3 for rows of 32; `group`: bytes of 8 rows.
template <int SWIZZLE>
__device__ __forceinline__ u64 described(u32 address, u32 group) {
  return (u64)((address & 0x3FFFF) >> 4) | (1ull << 16) | ((u64)(group >> 4) << 32) | ((u64)SWIZZLE << 62);
}
__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING>
__device__ __forceinline__ void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
// The compiler may not take these registers for ready before, or change them under a product that runs.
template <int N>
__device__ __forceinline__ void settle(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i])::"memory");
}

// ---- numbers -----------------------------------------------------------------------------------------

__device__ __forceinline__ u32 pack(float low, float high) {
  u32 r;
  asm("cvt.rn." NUMBER "x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
#if HALF
__device__ __forceinline__ float low(u32 x) {
  float f;
  asm("{ .reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, l; }" : "=f"(f) : "r"(x));
  return f;
}
__device__ __forceinline__ float high(u32 x) {
  float f;
  asm("{ .reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, h; }" : "=f"(f) : "r"(x));
  return f;
}
#else
__device__ __forceinline__ float low(u32 x) { return __uint_as_float(x << 16); }
__device__ __forceinline__ float high(u32 x) { return __uint_as_float(x & 0xffff0000u); }
#endif
__device__ __forceinline__ float exp2_of(float x) {
  float e;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(x));
  return e;
}
// Four matrices of 8 x 8 from a warp's fragments to rows in shared memory; a lane gives the place of one row.
__device__ __forceinline__ void store_fragments(u32 at, u32 a, u32 b, u32 c, u32 d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
               ::"r"(at), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}
__device__ __forceinline__ void store_fragments(u32 at, u32 a, u32 b) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1, %2};" ::"r"(at), "r"(a), "r"(b) : "memory");
}
__device__ __forceinline__ float reciprocal(float x) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}
// -2 log2(e) y, where GELU's tanh form is x / (1 + exp(-2 y)), y = sqrt(2 / pi) (x + 0.044715 x^3).
__device__ __forceinline__ float gelu_exponent(float x) { return x * (-2.302208198f - 0.1029432397f * x * x); }

// ---- products of few rows: fragments in registers ----------------------------------------------------

struct Four { u32 a, b, c, d; };

// Of what other kernels write: not by way of the multiprocessor's own cache.
__device__ __forceinline__ Four load(const u16* from, bool there, Four r = {0, 0, 0, 0}) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %5, 0;\n@p ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];\n}"
               : "+r"(r.a), "+r"(r.b), "+r"(r.c), "+r"(r.d) : "l"(from), "r"((int)there) : "memory");
  return r;
}
__device__ __forceinline__ u32 load_pair(const u16* from, bool there) {
  u32 r = 0;
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %2, 0;\n@p ld.global.cg.u32 %0, [%1];\n}"
               : "+r"(r) : "l"(from), "r"((int)there) : "memory");
  return r;
}
__device__ __forceinline__ float load_number(const float* from, bool there) {
  float r = 0.f;
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %2, 0;\n@p ld.global.cg.f32 %0, [%1];\n}"
               : "+f"(r) : "l"(from), "r"((int)there) : "memory");
  return r;
}
__device__ __forceinline__ Four load_shared(u32 from) {
  Four r;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(r.a), "=r"(r.b), "=r"(r.c), "=r"(r.d) : "r"(from) : "memory");
  return r;
}
__device__ __forceinline__ float load_sum(u32 from) {
  float r;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(r) : "r"(from) : "memory");
  return r;
}
__device__ __forceinline__ float2 load_sums(u32 from) {
  float2 r;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(r.x), "=f"(r.y) : "r"(from) : "memory");
  return r;
}
__device__ __forceinline__ void store_sum(u32 to, float x) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(to), "f"(x) : "memory");
}
__device__ __forceinline__ void store_sums(u32 to, float x, float y) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(to), "f"(x), "f"(y) : "memory");
}
// d [16, 8] += a [16, 16] @ b [16, 8]. Of a, rows lane / 4 and lane / 4 + 8 in turn; of b, column lane / 4.
__device__ __forceinline__ void multiply_few(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32." NUMBER "." NUMBER ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};" : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

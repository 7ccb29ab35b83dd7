// The CUDA kernels of Memory3: reading, decoding, codes, and the choice of tokens.
//
//     nvcc -arch=native -O3 -shared -Xcompiler -fPIC kernels.cu -o libkernels.so     (make kernels)
//
// The story. Attention is where a memory is read, and there the work is odd: a chunk of 64 tokens
// attends 5 memories of 8 keys, next to its ordinary causal attention over thousands. PyTorch's
// fused kernels cannot do both at once. The rest takes little arithmetic and moves much data, so
// each kernel below is judged by the bytes that it must move:
//
//     a.  memory attention, plainly: 30 lines, one thread a query; it says what the fast one means
//     b.  tensor cores: how tiles of 16 x 16 lie in the registers of a warp
//     c.  memory attention, fast: forward, dq, and dk dv
//     d.  decode attention: one new token over the cache
//     e.  codes of the bank become keys and values in the cache
//     f.  which tokens of a reference are kept (sec. 3.3)
//
// These are plain C functions of raw pointers, sizes and a stream; kernels.py calls them through
// ctypes. Each has a PyTorch equivalent in memory.py or quantize.py. Data is bfloat16, sums are
// float32. The tests run all but the PTX on a CPU, where tests/cuda_on_cpu.h stands in for a GPU.

#ifdef __CUDACC__  // otherwise tests/cuda_on_cpu.h has all this, and says what it does
#include <cuda_bf16.h>
#include <cuda_pipeline.h>
#define UNROLL _Pragma("unroll")  // an array lies in registers only if its loops are unrolled
#endif

typedef __nv_bfloat16 bf16;
typedef long long i64;
extern __shared__ __align__(128) unsigned char smem[];  // all shared memory is dynamic

__device__ inline float2 unpack(unsigned u) {  // two bfloat16, the first in the lower half
    return make_float2(__uint_as_float(u << 16), __uint_as_float(u & 0xffff0000));
}

// Starts `blocks` blocks of `threads`, each with `bytes` of shared memory. 0, or CUDA's error.
template <class... P, class... A>
int launch(void (*kernel)(P...), i64 blocks, int threads, size_t bytes, void* stream, A... args) {
    if (blocks == 0) return 0;
#ifdef __CUDACC__
    if (bytes > 48 << 10)  // a kernel must ask for more than that
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes);
    kernel<<<blocks, threads, bytes, (cudaStream_t)stream>>>(args...);
#else
    emulator::launch(blocks, threads, bytes, [=] { kernel(args...); });
#endif
    return cudaGetLastError();
}

// Runs a statement with head_dim as the constant DH, so that arrays of dh numbers lie in registers.
#define CASE(d, ...) case d: { const int DH = d; __VA_ARGS__; }
#define FOR_HEAD_DIM(dh, ...)                                                                   \
    switch (dh) { CASE(16, __VA_ARGS__) CASE(32, __VA_ARGS__) CASE(48, __VA_ARGS__)             \
        CASE(64, __VA_ARGS__) CASE(80, __VA_ARGS__) CASE(96, __VA_ARGS__)                       \
        CASE(112, __VA_ARGS__) CASE(128, __VA_ARGS__) default: return 1; }

// -- a. Memory attention, plainly --------------------------------------------------------------
//
// A chunk of the context, C tokens, reads R memories of S keys each: 64 by 40 in the 2.4b model.
// PyTorch has computed the causal part: out and lse, the logarithm of the sum of exp(score). The
// memories join the same softmax (eq. 3.1). With their scores s_j and values v_j:
//
//     exp(lse') = exp(lse) + sum_j exp(s_j)
//     out' = exp(lse - lse') out + sum_j exp(s_j - lse') v_j
//
// q, out, dout, dq are (B, H, n, dh), with any strides between rows of dh numbers: copying all
// queries would cost as much as reading the memories. lse, delta (B, H, n); mem_k mem_v
// (M, Hkv, S, dh), mem_m numbers from one memory to the next; count (M, Hkv): filled slots; recall
// (B, c, R), -1 = none, for c chunks of C tokens. n = P + T tokens, P of them header.

struct Query { int b, head, t; };  // t = -1: there is none
struct Rows {  // strides: how many numbers from one sequence, head, token to the next
    i64 b, h, t;
    __device__ i64 at(Query x) const { return x.t < 0 ? -1 : x.b * b + x.head * h + x.t * t; }
};

struct Call {  // the arguments of a call
    bf16 *out, *dq, *dmem_k, *dmem_v;
    float *lse, *delta;
    const bf16 *q, *dout, *mem_k, *mem_v;
    const i64 *count, *recall, *uses, *first;
    Rows in_q, in_out, in_dout, in_dq;  // at(query): where its numbers lie; -1: nowhere
    i64 mem_m;
    int B, M, H, Hkv, n, S, c, R, C, P;  // c: chunks of a sequence, C = chunk_len, P = n_header

    __device__ i64 in_lse(Query x) const {  // and in delta
        return x.t < 0 ? -1 : ((i64)x.b * H + x.head) * n + x.t;
    }
    // Where the key and value of slot s lie, of the r-th memory that a chunk reads; -1: empty.
    __device__ i64 in_memory(int b, int chunk, int r, int h, int s, int dh) const {
        i64 m = recall[((i64)b * c + chunk) * R + r];
        return m < 0 || s >= count[m * Hkv + h] ? -1 : m * mem_m + ((i64)h * S + s) * dh;
    }
};

__device__ inline float number(bf16 x) { return __bfloat162float(x); }

// Version 1, one thread a query. Right, and slow: each thread walks through memory on its own path.
__global__ void __launch_bounds__(128) plain_forward(Call x, int dh) {
    const i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;  // of (B, H, T)
    const int T = x.n - x.P, chunk = i % T / x.C, b = (int)(i / T / x.H);
    const Query query = {b, (int)(i / T % x.H), x.P + (int)(i % T)};
    if (b >= x.B) return;
    const bf16* q = x.q + x.in_q.at(query);
    bf16* out = x.out + x.in_out.at(query);
    float& lse = x.lse[x.in_lse(query)];
    const int h = query.head / (x.H / x.Hkv);
    // lse is infinite where there is no key yet: -inf, or from PyTorch's CUDA +inf
    float score[128], top = isinf(lse) ? -1e30f : lse, sum = 0;
    for (int j = 0; j < x.R * x.S; j++) {
        const i64 key = x.in_memory(b, chunk, j / x.S, h, j % x.S, dh);
        score[j] = key < 0 ? -INFINITY : 0;
        for (int d = 0; key >= 0 && d < dh; d++)
            score[j] += number(q[d]) * number(x.mem_k[key + d]);
        score[j] /= sqrtf(dh);
        top = fmaxf(top, score[j]);
    }
    const float before = isinf(lse) ? 0 : expf(lse - top);  // the share of the causal part
    for (int j = 0; j < x.R * x.S; j++) sum += expf(score[j] - top);
    if (sum == 0) return;  // no memory: all stays as it is
    for (int d = 0; d < dh; d++) {
        float y = before == 0 ? 0 : before * number(out[d]);
        for (int j = 0; j < x.R * x.S; j++) {
            const i64 value = x.in_memory(b, chunk, j / x.S, h, j % x.S, dh);
            if (value >= 0) y += expf(score[j] - top) * number(x.mem_v[value + d]);
        }
        out[d] = __float2bfloat16(y / (before + sum));
    }
    lse = top + logf(before + sum);
}

// strides: three each of q and out (and dout, dq), then that from memory to memory.
inline Rows rows(const i64* strides) { return {strides[0], strides[1], strides[2]}; }

extern "C" int memory_attention_plain(
    bf16* out, const bf16* q, const bf16* mem_k, const bf16* mem_v, float* lse, const i64* count,
    const i64* recall, const i64* strides, int B, int M, int H, int Hkv, int n, int dh, int S,
    int c, int R, int C, int P, void* stream) {
    Call x = {out, 0, 0, 0, lse, 0, q, 0, mem_k, mem_v, count, recall, 0, 0, rows(strides),
              rows(strides + 3), {}, {}, strides[6], B, M, H, Hkv, n, S, c, R, C, P};
    return R * S > 128 ? 1 : launch(
        plain_forward, ((i64)B * H * (n - P) + 127) / 128, 128, 0, stream, x, dh);
}

// -- b. Tensor cores ---------------------------------------------------------------------------
//
// A tensor core multiplies tiles: mma adds the product of a (16, 16) and a (16, 8) tile to a third
// one (16, 8), and the 32 lanes of a warp hold the numbers. ldmatrix brings tiles from shared
// memory. Both exist in PTX only.

#ifdef __CUDACC__
__device__ inline unsigned pack(float lo, float hi) {
    unsigned u;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(u) : "f"(hi), "f"(lo));
    return u;
}
#define LDMATRIX(name, how)                                                                     \
    __device__ inline void name(unsigned r[4], const void* row) {                               \
        asm volatile("ldmatrix.sync.aligned.m8n8.x4" how ".shared.b16 {%0, %1, %2, %3}, [%4];"  \
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])                           \
                     : "r"((unsigned)__cvta_generic_to_shared(row)) : "memory");                \
    }
LDMATRIX(ldmatrix, "")
LDMATRIX(ldmatrix_trans, ".trans")
__device__ inline void mma(float* c, const unsigned a[4], unsigned b0, unsigned b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
        "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
#endif

// A tile of 16 rows lies in a warp as mma's left factor and its result do: lane l has parts of rows
// l/4 and l/4 + 8, and of every 8 columns the two that begin at 2(l%4). Element e of a lane is in
// row l/4 + 8 side(e), column(e); elements 2i and 2i+1 share register i of a left factor.
__device__ inline constexpr int side(int e) { return e / 2 % 2; }
__device__ inline int column(int e) { return e / 4 * 8 + threadIdx.x % 4 * 2 + e % 2; }

// Load and store 16 rows. at[0], at[1]: where this lane's two rows begin; -1: zeros, not stored.
template <int N> __device__ void load(unsigned (&a)[N], const bf16* x, const i64* at) {
    UNROLL for (int i = 0; i < N; i++)
        a[i] = at[i % 2] < 0 ? 0 : *(const unsigned*)(x + at[i % 2] + column(2 * i));
}
template <int N> __device__ void load(float (&sum)[N], const bf16* x, const i64* at) {
    unsigned a[N / 2];
    load(a, x, at);
    UNROLL for (int e = 0; e < N; e++) sum[e] = e % 2 ? unpack(a[e / 2]).y : unpack(a[e / 2]).x;
}
template <int N> __device__ void store(bf16* x, const float (&sum)[N], const i64* at) {
    UNROLL for (int e = 0; e < N; e += 2)
        if (at[side(e)] >= 0)
            *(unsigned*)(x + at[side(e)] + column(e)) = pack(sum[e], sum[e + 1]);
}

// Rows in shared memory are 8 numbers longer than they need be: an odd multiple of 16 bytes, so
// that the 8 rows that ldmatrix reads at once lie in different banks.
template <int DH> constexpr int LD = DH + 8;
template <int DH> __device__ float scale() { return 1 / sqrtf(DH); }

// A left factor a (16, DH) from 16 rows in shared memory.
template <int DH> __device__ void load_shared(unsigned (&a)[DH / 4], const bf16* rows) {
    const int l = threadIdx.x % 32;
    UNROLL for (int k = 0; k < DH; k += 16)
        ldmatrix(a + k / 4, rows + l % 16 * LD<DH> + l / 16 * 8 + k);
}
// s (16, 16) += a (16, DH) times the transpose of 16 rows in shared memory.
template <int DH>
__device__ void times_transposed(float (&s)[8], const unsigned (&a)[DH / 4], const bf16* rows) {
    const int l = threadIdx.x % 32;
    UNROLL for (int k = 0; k < DH; k += 16) {
        unsigned b[4];
        ldmatrix(b, rows + (l % 8 + l / 16 * 8) * LD<DH> + l / 8 % 2 * 8 + k);
        mma(s, a + k / 4, b[0], b[1]);
        mma(s + 4, a + k / 4, b[2], b[3]);
    }
}
// sum (16, DH) += a (16, 16) times 16 rows in shared memory.
template <int DH>
__device__ void times(float (&sum)[DH / 2], const float (&a)[8], const bf16* rows) {
    const int l = threadIdx.x % 32;
    unsigned left[4] = {pack(a[0], a[1]), pack(a[2], a[3]), pack(a[4], a[5]), pack(a[6], a[7])};
    UNROLL for (int k = 0; k < DH; k += 16) {
        unsigned b[4];
        ldmatrix_trans(b, rows + l % 16 * LD<DH> + l / 16 * 8 + k);
        mma(sum + k / 2, left, b[0], b[1]);
        mma(sum + k / 2 + 4, left, b[2], b[3]);
    }
}
__device__ inline float quad_sum(float x) {  // over the four lanes that share a row
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}
__device__ inline float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
    return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

// One step of the online softmax, by 16 more keys: scores s (16, 16) become exp(s - m), and the
// running maximum m, sum l and output `sum` are scaled to the new m. m begins at NOTHING, not at
// -inf, for -inf - -inf is nan. Each lane has a share of l: the quad_sum of l is the row's.
const float NOTHING = -1e30f;
template <int N>
__device__ void softmax(float (&s)[8], float (&m)[2], float (&l)[2], float (&sum)[N]) {
    UNROLL for (int i = 0; i < 2; i++) {
        float top = fmaxf(fmaxf(s[2 * i], s[2 * i + 1]), fmaxf(s[2 * i + 4], s[2 * i + 5]));
        top = fmaxf(m[i], quad_max(top));
        float keep = __expf(m[i] - top);
        m[i] = top, l[i] *= keep;
        UNROLL for (int e = 0; e < N; e++) if (side(e) == i) sum[e] *= keep;
    }
    UNROLL for (int e = 0; e < 8; e++) s[e] = __expf(s[e] - m[side(e)]), l[side(e)] += s[e];
}

// -- c. Memory attention, fast -----------------------------------------------------------------
//
// The G = H / Hkv query heads of a key-value head read the same keys, so a job (sequence, key-value
// head, chunk) has G*C queries. A block takes 64 of them, 16 a warp. By the recall table it fetches
// keys and values from the pool straight into shared memory, for the tensor cores.
//
// A flash kernel goes over the keys in blocks and keeps, for each query, the largest score m so
// far, l = the sum of exp(score - m), and the output times l. Here the causal part, computed by
// PyTorch, is simply the first block: m = lse, l = 1, output = out. The memories are the next, 16
// keys a block, and the merge by log-sum-exp needs no code of its own.
//
// Floor times (bytes, then arithmetic, then what is moved), with BW = bytes/s, F = bfloat16
// operations/s, N = B H T queries, K = R S padded to 16s:
//   forward  (6 dh N + 8 N + 4 M Hkv S dh) / BW     4 dh N K / F    q; out, lse in and out; pool
//   dq       (10 dh N + 8 N + 4 M Hkv S dh) / BW    6 dh N K / F    q, dout, out; dq in and out
//   dk dv    (4 dh + 8) N R / BW (mostly from L2)   8 dh N R 16 ceil(S / 16) / F       q, dout
// Shared memory: 4 K (dh + 9) bytes, at most 68.5 KB; dk dv 576 (dh + 8), at most 77 KB.

const int WARPS = 4;  // of a block

// The shape of the jobs of a call.
struct Jobs : Call {
    __host__ __device__ int keys() const { return (R * S + 15) / 16 * 16; }  // of a chunk
    __host__ __device__ int tiles() const { return (H / Hkv * C + 16 * WARPS - 1) / (16 * WARPS); }
    i64 blocks() const { return (i64)B * Hkv * c * tiles(); }

    // Query r of the job (b, h, chunk): the heads of a token are neighbours, as they are in memory.
    __device__ Query query(int b, int h, int chunk, int r) const {
        const int G = H / Hkv, t = P + chunk * C + r / G;
        return {b, h * G + r % G, r < G * C && t < n ? t : -1};
    }
};

// How forward and dq begin: they find their queries, and start to copy keys and values to shared
// memory; wait() waits for that. Empty slots (no memory, a short one, padding to 16s) become zeros
// and not what happened to lie there, since 0 * nan is nan; a bias of -inf takes them out of the
// softmax.
template <int DH> struct Job {
    bf16 *k, *v;     // (keys, LD)
    float* bias;     // (keys,)
    Query query[2];  // this lane's

    __device__ Job(const Jobs& x) {
        const int job = blockIdx.x / x.tiles(), chunk = job % x.c, h = job / x.c % x.Hkv;
        const int b = job / x.c / x.Hkv, tile = blockIdx.x % x.tiles() * WARPS + threadIdx.x / 32;
        for (int i = 0; i < 2; i++)
            query[i] = x.query(b, h, chunk, tile * 16 + threadIdx.x % 32 / 4 + 8 * i);
        k = (bf16*)smem, v = k + x.keys() * LD<DH>, bias = (float*)(v + x.keys() * LD<DH>);
        for (int i = threadIdx.x; i < x.keys() * DH / 8; i += blockDim.x) {  // 16 bytes
            const int j = i / (DH / 8), d = i % (DH / 8) * 8;
            i64 at = j < x.R * x.S ? x.in_memory(b, chunk, j / x.S, h, j % x.S, DH) : -1;
            const int zeros = at < 0 ? 16 : 0;
            at = at < 0 ? 0 : at + d;
            __pipeline_memcpy_async(k + j * LD<DH> + d, x.mem_k + at, 16, zeros);
            __pipeline_memcpy_async(v + j * LD<DH> + d, x.mem_v + at, 16, zeros);
            if (d == 0) bias[j] = zeros ? -INFINITY : 0;
        }
        __pipeline_commit();
    }
    __device__ void wait() const {
        __pipeline_wait_prior(0);
        __syncthreads();
    }
};

template <int DH> __global__ void __launch_bounds__(32 * WARPS) memory_forward(Jobs x) {
    const Job<DH> job(x);
    unsigned q[DH / 4];
    float sum[DH / 2], m[2], l[2];      // l: this lane's share of the row's
    i64 in_q[2], in_lse[2], in_out[2];  // where this lane's queries lie
    i64 before[2];                      // the same as in_out, if the row had a key before
    for (int i = 0; i < 2; i++) {
        in_q[i] = x.in_q.at(job.query[i]), in_lse[i] = x.in_lse(job.query[i]);
        in_out[i] = x.in_out.at(job.query[i]);
        m[i] = in_lse[i] < 0 ? INFINITY : x.lse[in_lse[i]];
        before[i] = isinf(m[i]) ? -1 : in_out[i];  // no key: -inf, or +inf from PyTorch's CUDA
        if (before[i] < 0) m[i] = NOTHING;
        l[i] = before[i] >= 0 && threadIdx.x % 4 == 0;
    }
    load(q, x.q, in_q);
    load(sum, x.out, before);
    job.wait();
    for (int j = 0; j < x.keys(); j += 16) {
        float s[8] = {};
        times_transposed<DH>(s, q, job.k + j * LD<DH>);
        UNROLL for (int e = 0; e < 8; e++) s[e] = s[e] * scale<DH>() + job.bias[j + column(e)];
        softmax(s, m, l, sum);
        times<DH>(sum, s, job.v + j * LD<DH>);
    }
    for (int i = 0; i < 2; i++) {
        l[i] = quad_sum(l[i]);
        if (l[i] == 0) in_out[i] = in_lse[i] = -1;  // still nothing: leave it as it was
        if (in_lse[i] >= 0 && threadIdx.x % 4 == 0) x.lse[in_lse[i]] = m[i] + logf(l[i]);
        l[i] = 1 / l[i];
    }
    UNROLL for (int e = 0; e < DH / 2; e++) sum[e] *= l[side(e)];
    store(x.out, sum, in_out);
}

// The backward of a softmax, given the MERGED out and lse: p = exp(score - lse) is a key's share of
// the whole softmax, delta = dout . out, ds = p (dout . v - delta). So
//     dq += ds k        dk = ds^T q        dv = p^T dout
// are the memories' share of each gradient; the causal part's own backward gives the rest.
template <int DH> __global__ void __launch_bounds__(32 * WARPS) memory_dq(Jobs x) {
    const Job<DH> job(x);
    unsigned q[DH / 4], d[DH / 4];
    float sum[DH / 2], lse[2], delta[2] = {};
    i64 at[2], in_lse[2];
    for (int i = 0; i < 2; i++) {
        in_lse[i] = x.in_lse(job.query[i]);
        lse[i] = in_lse[i] < 0 ? INFINITY : x.lse[in_lse[i]];
        at[i] = x.in_dout.at(job.query[i]);
    }
    load(d, x.dout, at);
    for (int i = 0; i < 2; i++) at[i] = x.in_out.at(job.query[i]);
    load(sum, x.out, at);
    for (int i = 0; i < 2; i++) at[i] = x.in_q.at(job.query[i]);
    load(q, x.q, at);
    UNROLL for (int i = 0; i < DH / 4; i++)
        delta[i % 2] += sum[2 * i] * unpack(d[i]).x + sum[2 * i + 1] * unpack(d[i]).y;
    for (int i = 0; i < 2; i++) {
        delta[i] = quad_sum(delta[i]);
        at[i] = x.in_dq.at(job.query[i]);
        if (isinf(lse[i])) lse[i] = INFINITY, at[i] = in_lse[i] = -1;  // exp(score - inf) = 0
        if (in_lse[i] >= 0 && threadIdx.x % 4 == 0) x.delta[in_lse[i]] = delta[i];  // for dk
    }
    load(sum, x.dq, at);
    job.wait();
    for (int j = 0; j < x.keys(); j += 16) {
        float s[8] = {}, dp[8] = {};
        times_transposed<DH>(s, q, job.k + j * LD<DH>);
        times_transposed<DH>(dp, d, job.v + j * LD<DH>);
        UNROLL for (int e = 0; e < 8; e++) {
            float p = __expf(s[e] * scale<DH>() + job.bias[j + column(e)] - lse[side(e)]);
            s[e] = p * (dp[e] - delta[side(e)]) * scale<DH>();
        }
        times<DH>(sum, s, job.k + j * LD<DH>);
    }
    store(x.dq, sum, at);
}

// One block for 16 slots of a memory and a key-value head. It walks over the chunks that use the
// memory, in order; each warp takes a tile of 16 queries at a time. Here slots are the rows and
// queries the columns. At the end the warps' sums are added in order, without atomics: every run
// gives the same bits.
//
// Two lanes fetch a query, taking turns at 16 bytes of q and of dout, into the warp's own shared
// memory. It has two halves: while the warp computes with one, the next tile arrives in the other.
struct Fetched { float lse, delta; };  // of this lane's query; lse = inf: it is not there

template <int DH>
__device__ Fetched fetch(const Jobs& x, i64 m, int h, i64 tile, int tiles, bf16* q_s, bf16* d_s) {
    const int lane = threadIdx.x % 32, row = lane / 2;
    const i64 use = x.uses[x.first[m] + tile / tiles];
    const Query query = x.query(use / x.R / x.c, h, use / x.R % x.c, tile % tiles * 16 + row);
    const i64 in_q = x.in_q.at(query), in_dout = x.in_dout.at(query), in_lse = x.in_lse(query);
    const int zeros = in_lse < 0 ? 16 : 0;
    for (int d = lane % 2 * 8; d < DH; d += 16) {
        const bf16* q = zeros ? x.q : x.q + in_q + d;
        const bf16* dout = zeros ? x.dout : x.dout + in_dout + d;
        __pipeline_memcpy_async(q_s + row * LD<DH> + d, q, 16, zeros);
        __pipeline_memcpy_async(d_s + row * LD<DH> + d, dout, 16, zeros);
    }
    Fetched got = {INFINITY, 0};
    if (in_lse >= 0) got = {x.lse[in_lse], x.delta[in_lse]};
    if (isinf(got.lse)) got = {INFINITY, 0};  // no key at all: memory_dq left no delta
    return got;
}

template <int DH> __global__ void __launch_bounds__(32 * WARPS) memory_dk_dv(Jobs x) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, blocks = (x.S + 15) / 16;
    const int slot = blockIdx.x % blocks * 16, h = blockIdx.x / blocks % x.Hkv;
    const i64 m = blockIdx.x / blocks / x.Hkv, pair = m * x.Hkv + h;
    const int tiles = (x.H / x.Hkv * x.C + 15) / 16;  // of a use
    const i64 todo = (x.first[m + 1] - x.first[m]) * tiles;
    const int filled = (int)min((i64)x.S, x.count[pair]) - slot;  // of these 16 slots, or more
    const int TILE = 16 * LD<DH>;
    bf16 *k_s = (bf16*)smem, *v_s = k_s + TILE, *stages = v_s + TILE + warp * 4 * TILE;

    for (int i = threadIdx.x; i < 16 * DH / 8; i += blockDim.x) {  // the slots' keys and values
        const int j = i / (DH / 8), d = i % (DH / 8) * 8, zeros = j < filled ? 0 : 16;
        const i64 at = zeros ? 0 : m * x.mem_m + ((i64)h * x.S + slot + j) * DH + d;
        __pipeline_memcpy_async(k_s + j * LD<DH> + d, x.mem_k + at, 16, zeros);
        __pipeline_memcpy_async(v_s + j * LD<DH> + d, x.mem_v + at, 16, zeros);
    }
    __pipeline_commit();
    __pipeline_wait_prior(0);
    __syncthreads();

    float dk[DH / 2] = {}, dv[DH / 2] = {};
    Fetched now = {INFINITY, 0}, next = {INFINITY, 0};
    int half = 0;  // of the warp's shared memory: q, dout of this tile, q, dout of the next
    if (warp < todo) next = fetch<DH>(x, m, h, warp, tiles, stages, stages + TILE);
    __pipeline_commit();
    for (i64 i = warp; i < todo; i += WARPS, half ^= 1) {
        now = next;
        const bf16 *q_s = stages + half * 2 * TILE, *d_s = q_s + TILE;
        bf16* other = stages + (half ^ 1) * 2 * TILE;
        if (i + WARPS < todo) next = fetch<DH>(x, m, h, i + WARPS, tiles, other, other + TILE);
        __pipeline_commit();
        __pipeline_wait_prior(1);  // this tile is there; the next may still be on its way
        __syncwarp();
        unsigned a[DH / 4];
        float s[8] = {}, dp[8] = {};  // (slots, queries)
        load_shared<DH>(a, k_s);
        times_transposed<DH>(s, a, q_s);
        load_shared<DH>(a, v_s);
        times_transposed<DH>(dp, a, d_s);
        UNROLL for (int e = 0; e < 8; e++) {
            const float lse = __shfl_sync(~0u, now.lse, 2 * column(e));
            const float delta = __shfl_sync(~0u, now.delta, 2 * column(e));
            s[e] = lane / 4 + 8 * side(e) < filled ? __expf(s[e] * scale<DH>() - lse) : 0;
            dp[e] = s[e] * (dp[e] - delta) * scale<DH>();
        }
        times<DH>(dv, s, d_s);
        times<DH>(dk, dp, q_s);
        __syncwarp();  // before the tile after the next overwrites this one
    }
    __pipeline_wait_prior(0);
    float* sums = (float*)smem;  // (WARPS, 16, DH)
    UNROLL for (int which = 0; which < 2; which++) {  // dk, then dv, through shared memory
        __syncthreads();                              // all have read what lay here
        UNROLL for (int e = 0; e < DH / 2; e++)
            sums[(warp * 16 + lane / 4 + 8 * side(e)) * DH + column(e)] = which ? dv[e] : dk[e];
        __syncthreads();
        bf16* to = (which ? x.dmem_v : x.dmem_k) + (pair * x.S + slot) * DH;
        for (int i = threadIdx.x; i < min(16, x.S - slot) * DH; i += blockDim.x) {
            float sum = 0;
            for (int w = 0; w < WARPS; w++) sum += sums[w * 16 * DH + i];
            to[i] = __float2bfloat16(sum);
        }
    }
}

extern "C" int memory_attention(
    bf16* out, const bf16* q, const bf16* mem_k, const bf16* mem_v, float* lse, const i64* count,
    const i64* recall, const i64* strides, int B, int M, int H, int Hkv, int n, int dh, int S,
    int c, int R, int C, int P, void* stream) {
    Jobs x = {{out, 0, 0, 0, lse, 0, q, 0, mem_k, mem_v, count, recall, 0, 0, rows(strides),
               rows(strides + 3), {}, {}, strides[6], B, M, H, Hkv, n, S, c, R, C, P}};
    FOR_HEAD_DIM(dh, return launch(memory_forward<DH>, x.blocks(), 32 * WARPS,
                                   x.keys() * (4 * LD<DH> + 4), stream, x))
}

// dmem_k dmem_v (M, Hkv, S, dh). uses: the B*c*R places of the recall table, sorted by the memory
// that stands there; those of memory m are uses[first[m]] to uses[first[m + 1] - 1]. delta is
// scratch.
extern "C" int memory_attention_backward(
    bf16* dq, const bf16* dout, bf16* out, bf16* dmem_k, bf16* dmem_v, const bf16* q,
    const bf16* mem_k, const bf16* mem_v, float* delta, float* lse, const i64* count,
    const i64* recall, const i64* uses, const i64* first, const i64* strides, int B, int M, int H,
    int Hkv, int n, int dh, int S, int c, int R, int C, int P, void* stream) {
    Jobs x = {{out, dq, dmem_k, dmem_v, lse, delta, q, dout, mem_k, mem_v, count, recall, uses,
               first, rows(strides), rows(strides + 3), rows(strides + 6), rows(strides + 9),
               strides[12], B, M, H, Hkv, n, S, c, R, C, P}};
    i64 blocks = (i64)M * Hkv * ((S + 15) / 16);
    FOR_HEAD_DIM(dh, int error = launch(memory_dq<DH>, x.blocks(), 32 * WARPS,
                                        x.keys() * (4 * LD<DH> + 4), stream, x);
                 return error ? error : launch(memory_dk_dv<DH>, blocks, 32 * WARPS,
                                               (2 + 4 * WARPS) * 32 * LD<DH>, stream, x))
}

// -- d. Decode attention -----------------------------------------------------------------------
//
// One new token of each sequence joins a layer's buffer [header | memory slots | context], as key
// number length - 1, and attends all keys there. The work is to read each key and value once: floor
// time 4 dh B Hkv length / BW. The ladder to there:
//   1. a block for each query head: but the G heads of a group read the same keys again and again;
//   2. a block for each group, its heads the rows of one mma: but batch 1 has 8 groups for the 132
//      units of the GPU;
//   3. tiles of 64 keys are dealt to `parts` blocks. Each leaves (out, lse) in scratch, and the
//      last to finish merges them in order: the same bits in every run;
//   4. here: the next tile arrives while a warp computes with one.
// The length is read on the GPU, so one captured graph serves all lengths up to N, the buffer's.

__device__ int finished[1 << 14];  // parts of each group; 0 between launches, of one stream only

// Merges element i of n results, each over other keys; a result is (G, dh), then its G lse.
__device__ inline float merge(const float* x, int n, int G, int dh, int i, float& lse) {
    const int size = G * (dh + 1), of = G * dh + i / dh;
    float top = NOTHING, sum = 0, out = 0;
    for (int j = 0; j < n; j++) top = fmaxf(top, x[j * size + of]);
    for (int j = 0; j < n; j++) {
        float weight = __expf(x[j * size + of] - top);
        sum += weight, out += weight * x[j * size + i];
    }
    lse = top + __logf(sum);  // -inf without any key
    return sum > 0 ? out / sum : 0;
}

struct Buffer {  // a layer of the cache and the new token, as decode_attention is given them
    const bf16 *q, *k, *v;  // (B, H or Hkv, dh), numbers from a sequence to the next: q_b, k_b, v_b
    bf16 *keys, *values;    // (B, Hkv, N, dh)
    const bool* valid;      // (B, Hkv, slots): which of the keys from `first` on count
    const i64* length;
    i64 q_b, k_b, v_b, keys_b, keys_h;
    int Hkv, G, N, first, slots, parts;
};

// Starts to copy keys at to at + 15 and their values; returns which of them count, one bit each.
// The others become zeros, as in part c. The new key is not in the buffer yet: it is put there.
template <int DH>
__device__ unsigned fetch(const Buffer& x, int pair, int n, int at, bf16* k_s, bf16* v_s) {
    const int lane = threadIdx.x % 32, b = pair / x.Hkv, h = pair % x.Hkv;
    const int key = at + lane % 16, slot = key - x.first;
    const bool counts = slot < 0 || slot >= x.slots || x.valid[(i64)pair * x.slots + slot];
    const unsigned live = __ballot_sync(~0u, key < n && counts);
    for (int i = lane; i < 16 * DH / 8; i += 32) {
        const int j = i / (DH / 8), d = i % (DH / 8) * 8, zeros = live >> j & 1 ? 0 : 16;
        const i64 there = zeros ? 0 : b * x.keys_b + h * x.keys_h + (i64)(at + j) * DH + d;
        const bf16 *key = x.keys + there, *value = x.values + there;
        if (at + j == n - 1) {
            key = x.k + b * x.k_b + h * DH + d, value = x.v + b * x.v_b + h * DH + d;
            *(uint4*)(x.keys + there) = *(const uint4*)key;
            *(uint4*)(x.values + there) = *(const uint4*)value;
        }
        __pipeline_memcpy_async(k_s + j * LD<DH> + d, key, 16, zeros);
        __pipeline_memcpy_async(v_s + j * LD<DH> + d, value, 16, zeros);
    }
    return live;
}

template <int DH>
__global__ void __launch_bounds__(32 * WARPS) decode_kernel(bf16* y, float* scratch, Buffer x) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, G = x.G, size = G * (DH + 1);
    const int pair = blockIdx.x / x.parts, part = blockIdx.x % x.parts, b = pair / x.Hkv;
    const int n = (int)min((i64)x.N, *x.length), STEP = 16 * WARPS;
    const int used = min(x.parts, (n + STEP - 1) / STEP);
    if (part >= used) return;  // the buffer is not that full yet
    const int TILE = 16 * LD<DH>;
    bf16* tiles = (bf16*)smem + warp * 4 * TILE;  // the warp's own: keys, values, and the next ones
    unsigned a[DH / 4], live = 0, next = 0;
    float sum[DH / 2] = {}, m[2] = {NOTHING, NOTHING}, l[2] = {};
    i64 row[2];  // where this lane's query heads begin
    for (int i = 0; i < 2; i++) {
        const int head = lane / 4 + 8 * i;
        row[i] = head < G ? b * x.q_b + (pair % x.Hkv * G + head) * DH : -1;
    }
    load(a, x.q, row);
    int at = part * STEP + warp * 16, half = 0;
    if (at < n) next = fetch<DH>(x, pair, n, at, tiles, tiles + TILE);
    __pipeline_commit();
    for (; at < n; at += used * STEP, half ^= 1) {
        bf16 *k_s = tiles + half * 2 * TILE, *other = tiles + (half ^ 1) * 2 * TILE;
        live = next;
        if (at + used * STEP < n)
            next = fetch<DH>(x, pair, n, at + used * STEP, other, other + TILE);
        __pipeline_commit();
        __pipeline_wait_prior(1);  // this tile is there; the next may still be on its way
        __syncwarp();
        float s[8] = {};
        times_transposed<DH>(s, a, k_s);
        UNROLL for (int e = 0; e < 8; e++)
            s[e] = live >> column(e) & 1 ? s[e] * scale<DH>() : -INFINITY;
        softmax(s, m, l, sum);
        times<DH>(sum, s, k_s + TILE);
        __syncwarp();  // before the tile after the next overwrites this one
    }
    __pipeline_wait_prior(0);
    // The warps' results go to shared memory and are merged into scratch; the last block merges the
    // parts' results there into y.
    __syncthreads();
    float *result = (float*)smem + warp * size, *all = scratch + (i64)pair * x.parts * size, lse;
    UNROLL for (int i = 0; i < 2; i++) {
        l[i] = quad_sum(l[i]);  // 0, or 1 at least: the largest has exp(0)
        if (row[i] >= 0) result[G * DH + lane / 4 + 8 * i] = m[i] + __logf(l[i]);
        UNROLL for (int e = 0; e < DH / 2; e++)
            if (side(e) == i && row[i] >= 0)
                result[(lane / 4 + 8 * i) * DH + column(e)] = sum[e] * (1 / fmaxf(l[i], 1));
    }
    __syncthreads();
    for (int i = threadIdx.x; i < G * DH; i += blockDim.x) {
        all[part * size + i] = merge((float*)smem, WARPS, G, DH, i, lse);
        if (i % DH == 0) all[part * size + G * DH + i / DH] = lse;
    }
    __threadfence();  // others must see what this thread wrote before they see the count
    __syncthreads();
    if (threadIdx.x == 0) *(int*)smem = atomicAdd(finished + pair, 1);
    __syncthreads();
    if (*(int*)smem != used - 1) return;
    __threadfence();
    finished[pair] = 0;
    for (int i = threadIdx.x; i < G * DH; i += blockDim.x)
        y[pair * G * DH + i] = __float2bfloat16(merge(all, used, G, DH, i, lse));
}

// y (B, H, dh); strides: q_b, k_b, v_b, keys_b, keys_h; length (1,); scratch B H parts (dh + 1).
extern "C" int decode_attention(bf16* y, const bf16* q, const bf16* k, const bf16* v, bf16* keys,
                                bf16* values, float* scratch, const i64* length, const bool* valid,
                                const i64* strides, int B, int H, int Hkv, int N, int dh, int first,
                                int slots, int parts, void* stream) {
    if (H / Hkv > 16 || B * Hkv > 1 << 14) return 1;
    Buffer x = {q, k, v, keys, values, valid, length, strides[0], strides[1], strides[2],
                strides[3], strides[4], Hkv, H / Hkv, N, first, slots, parts};
    FOR_HEAD_DIM(dh, return launch(decode_kernel<DH>, B * Hkv * parts, 32 * WARPS,
                                   WARPS * 128 * LD<DH>, stream, y, scratch, x))
}

// -- e. Codes ----------------------------------------------------------------------------------
//
// A vector's code names F rows of a table (quantize.py); their float32 sum goes to the memory slots
// of the cache. A block unpacks the numbers of 128 vectors; then dh / 4 threads add up each vector.
// Bytes of a vector: its code in, 2 dh out, and 4 F dh from the table by way of L2. 160 memories of
// the 2.4b model are 450,560 vectors: 6.3 MB in, 72 MB out, 1.4 GB from a table of 13 MB. Floor
// time: the larger of (in + out) / BW and (bytes from the table) / (bandwidth of L2).

__global__ void __launch_bounds__(256)
codes_kernel(bf16* kv, const unsigned char* codes, const float* table, const int* fields,
             const i64* rows, int B, int Hkv, int N, int dh, int S, int bytes, int F, int R,
             int first, int vectors) {  // vectors of a memory
    const int groups = (vectors + 127) / 128, v0 = blockIdx.x % groups * 128;
    const int here = min(128, vectors - v0), place = blockIdx.x / groups;  // in rows
    const i64 memory = rows[place];
    int* row = (int*)smem;  // (128, F), of the table
    if (memory < 0) return;
    for (int i = threadIdx.x; i < here * F; i += blockDim.x) {
        const int *field = fields + i % F * 3, byte = field[0] / 8;
        const unsigned char* code = codes + (memory * vectors + v0 + i / F) * bytes + byte;
        unsigned word = code[0];  // three bytes hold any 16 bits, wherever they begin
        for (int k = 1; k < 3 && byte + k < bytes; k++) word |= code[k] << 8 * k;
        row[i] = field[2] + (word >> field[0] % 8 & ((1u << field[1]) - 1));
    }
    __syncthreads();
    for (int i = threadIdx.x; i < here * dh / 4; i += blockDim.x) {
        const int v = i / (dh / 4), d = i % (dh / 4) * 4, s = (v0 + v) % S, h = (v0 + v) / S % Hkv;
        const i64 head = ((v0 + v) / S / Hkv * (i64)B + place / R) * Hkv + h;  // (Lm, 2, B, Hkv)
        float4 sum = make_float4(0, 0, 0, 0);
        for (int f = 0; f < F; f++) {
            const float4 x = *(const float4*)(table + (i64)row[v * F + f] * dh + d);
            sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
        }
        *(uint2*)(kv + (head * N + first + place % R * S + s) * dh + d) =
            make_uint2(pack(sum.x, sum.y), pack(sum.z, sum.w));
    }
}

// kv (Lm, 2, B, Hkv, N, dh), codes (M, Lm, 2, Hkv, S, bytes), table (_, dh), fields (F, 3): first
// bit, bits, first row; rows (B, R): whose codes come to keys first + r S and on, -1: nobody's.
extern "C" int decode_codes(bf16* kv, const unsigned char* codes, const float* table,
                            const int* fields, const i64* rows, int Lm, int B, int Hkv, int N,
                            int dh, int S, int bytes, int F, int R, int first, void* stream) {
    const int n = Lm * 2 * Hkv * S;
    return dh % 4 ? 1 : launch(
        codes_kernel, (i64)B * R * ((n + 127) / 128), 256, 512 * F, stream, kv, codes, table,
        fields, rows, B, Hkv, N, dh, S, bytes, F, R, first, n);
}

// -- f. Which tokens to keep -------------------------------------------------------------------
//
// w_j = sum over query heads and tokens i of softmax_j(q_i . k_j / sqrt(dh)), then the s largest. A
// block has one reference and one key-value head, with its keys in shared memory. A warp computes
// 16 rows of scores at a time, all n <= 128 columns in registers, and adds them to its column sums:
// no n x n matrix leaves the chip. Floor times: 2 N (H + Hkv) n dh / BW for the bytes,
// 2 N H n n dh / F for the products, and N H n n exponentials, of which a unit does 16 a clock.

template <int DH>
__global__ void __launch_bounds__(32 * WARPS)
select_kernel(float* weights, i64* chosen, const bf16* q, const bf16* k, const bool* mask, int Hkv,
              int G, int n, int s, int approximate) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, tiles = (n + 15) / 16;
    const i64 pair = blockIdx.x;
    bf16* k_s = (bf16*)smem;                                   // (16 tiles, LD)
    float* bias = (float*)(k_s + 16 * tiles * LD<DH>);         // (128,)
    float *w_s = bias + 128, *peaks = w_s + WARPS * 128;       // (WARPS, 128), (WARPS,)
    mask += pair / Hkv * n, k += pair * n * DH, q += pair * G * n * DH;
    for (int i = threadIdx.x; i < 16 * tiles * DH / 8; i += blockDim.x) {
        const int r = i / (DH / 8), d = i % (DH / 8) * 8;
        const uint4 none = make_uint4(0, 0, 0, 0);
        *(uint4*)(k_s + r * LD<DH> + d) = r < n ? *(const uint4*)(k + r * DH + d) : none;
    }
    const int j = threadIdx.x;
    bias[j] = j < n && mask[j] ? 0 : -INFINITY;
    float sum[32] = {}, peak = NOTHING;  // of this lane's columns, 16 rows after 16
    __syncthreads();
    for (int t = warp; t < G * tiles; t += WARPS) {
        unsigned a[DH / 4];
        float x[8][8] = {}, top[2] = {NOTHING, NOTHING}, l[2] = {}, keep = 1;
        i64 row[2];
        for (int i = 0; i < 2; i++) {
            const int r = t % tiles * 16 + lane / 4 + 8 * i;
            row[i] = bias[r] == 0 ? (t / tiles * n + r) * DH : -1;
        }
        load(a, q, row);
        UNROLL for (int c = 0; c < 8; c++)
            if (c < tiles) times_transposed<DH>(x[c], a, k_s + c * 16 * LD<DH>);
        UNROLL for (int e = 0; e < 64; e++) {
            float& p = x[e / 8][e % 8];
            p = row[side(e)] < 0 ? -INFINITY : p * scale<DH>() + bias[column(e)];
            top[side(e)] = fmaxf(top[side(e)], p);
        }
        top[0] = quad_max(top[0]), top[1] = quad_max(top[1]);
        if (approximate) {  // one shift for all rows, the largest score so far, and no division
            float now = fmaxf(peak, fmaxf(top[0], top[1]));
            for (int i = 4; i < 32; i *= 2) now = fmaxf(now, __shfl_xor_sync(~0u, now, i));
            keep = __expf(peak - now);
            peak = top[0] = top[1] = now;
        }
        UNROLL for (int e = 0; e < 64; e++)
            l[side(e)] += x[e / 8][e % 8] = __expf(x[e / 8][e % 8] - top[side(e)]);
        UNROLL for (int i = 0; i < 2; i++)  // a row of padding has the sum 0: 0 / 1e-30
            l[i] = approximate ? 1 : 1 / fmaxf(quad_sum(l[i]), 1e-30f);
        UNROLL for (int i = 0; i < 32; i++) {
            const float* p = x[i / 4] + i / 2 % 2 * 4 + i % 2;
            sum[i] = sum[i] * keep + p[0] * l[0] + p[2] * l[1];
        }
    }
    UNROLL for (int i = 0; i < 32; i++) {
        for (int j = 4; j < 32; j *= 2) sum[i] += __shfl_xor_sync(~0u, sum[i], j);
        if (lane < 4) w_s[warp * 128 + column(i / 2 * 4 + i % 2)] = sum[i];
    }
    if (lane == 0) peaks[warp] = peak;
    __syncthreads();
    float w = 0;  // from here on, thread j handles token j
    for (int i = 0; i < WARPS; i++) peak = fmaxf(peak, peaks[i]);
    for (int i = 0; i < WARPS; i++) w += w_s[i * 128 + j] * __expf(peaks[i] - peak);
    if (j < n) weights[pair * n + j] = w;
    w_s[j] = w = bias[j] == 0 ? w : -1;  // no token: less than any
    for (int i = j; i < s; i += blockDim.x) chosen[pair * s + i] = -1;
    __syncthreads();
    int rank = 0, before = 0, *ranks = (int*)w_s + 128;
    for (int i = 0; i < n; i++) rank += w_s[i] > w || (w_s[i] == w && i < j);
    ranks[j] = w < 0 ? s : rank;
    __syncthreads();
    for (int i = 0; i < j; i++) before += ranks[i] < s;
    if (ranks[j] < s) chosen[pair * s + before] = j;
}

// weights (N, Hkv, n), chosen (N, Hkv, s), q (N, H, n, dh), k (N, Hkv, n, dh), mask (N, n).
extern "C" int select_tokens(const bf16* q, const bf16* k, float* weights, i64* chosen,
                             const bool* mask, int N, int H, int Hkv, int n, int dh, int s,
                             int approximate, void* stream) {
    if (n > 32 * WARPS) return 1;
    FOR_HEAD_DIM(dh, return launch(
        select_kernel<DH>, (i64)N * Hkv, 32 * WARPS, (n + 15) / 16 * 32 * LD<DH> + WARPS * 644,
        stream, weights, chosen, q, k, mask, Hkv, H / Hkv, n, s, approximate))
}

// -- What kernels.py asks first ----------------------------------------------------------------

extern "C" int memory3_kernels_version() { return 2; }  // of these functions; as in kernels.py
extern "C" const char* memory3_kernels_trouble() {  // null, or why no kernel can run
#ifdef __CUDACC__
    cudaFuncAttributes x;
    cudaFuncGetAttributes(&x, codes_kernel);  // no GPU, one of another kind, an old driver
    if (cudaError_t error = cudaGetLastError()) return cudaGetErrorString(error);
#endif
    return nullptr;
}

// Runs the kernels of kernels.cu on a CPU, all but their PTX, one thread at a time.
//
//     g++ -x c++ -O1 -fno-strict-aliasing -shared -fPIC -include tests/cuda_on_cpu.h
//         kernels.cu -o kernels_on_cpu.so
//
// makes a library with the same C functions that take ordinary pointers. The tests call it where
// there is no GPU; with -g -O0 a debugger steps through a kernel, and printf works in it.
//
// A GPU runs the threads of a block at once; here each is a fiber (a stack of its own) that runs
// until it must wait for others: at __syncthreads for the block, at a shuffle, an mma or an
// ldmatrix for its warp. Blocks run one after the other. Three things are stricter than on a GPU:
//   - shared memory is NaN before each block, and writing past the size asked for is an error;
//   - a barrier that some thread of the block (or warp) never reaches is an error, not a hang, and
//     so are two threads of a warp that wait at different collectives;
//   - emulator_reverse(1) runs threads and blocks last to first. What a kernel computes must not
//     depend on it: where it does, a __syncthreads or __syncwarp is missing.
// Compiled with -fsanitize=alignment,bounds -fsanitize-undefined-trap-on-error, as the tests do, a
// misaligned vector load and an index past a register array are errors, too.
//
// What this cannot show: a race inside the time between two barriers that either order hides,
// reads past a tensor's end, registers and occupancy, the order in which tensor cores add, speed.

#include <math.h>
#include <setjmp.h>
#include <signal.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <utility>
#include <vector>

// -- What CUDA's headers declare ----------------------------------------------------------------

#define __global__
#define __device__
#define __host__
#define __shared__
#define __launch_bounds__(...)
#define UNROLL
#define __align__(n) __attribute__((aligned(n)))

using std::max;
using std::min;

struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

inline struct { unsigned x; } threadIdx, blockIdx, blockDim, gridDim;
alignas(128) inline unsigned char smem[100 << 10];   // kernels.cu: extern __shared__ ... smem[]

inline float __uint_as_float(unsigned u) { float x; memcpy(&x, &u, 4); return x; }
inline unsigned __float_as_uint(float x) { unsigned u; memcpy(&u, &x, 4); return u; }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }

// bfloat16: the upper half of a float32, rounded to nearest, ties to even.
struct __nv_bfloat16 { uint16_t x; };
inline __nv_bfloat16 __float2bfloat16(float x) {
    unsigned u = __float_as_uint(x);
    return {(uint16_t)(x != x ? 0x7fff : (u + 0x7fff + (u >> 16 & 1)) >> 16)};
}
inline float __bfloat162float(__nv_bfloat16 x) { return __uint_as_float((unsigned)x.x << 16); }

// -- Fibers -------------------------------------------------------------------------------------

namespace emulator {

const int STACK = 128 << 10, MOST = 99 << 10;  // MOST: shared memory a block may have on any sm_8x
struct alignas(16) Slot { char bytes[32]; };  // what a lane hands to its warp
struct Barrier { unsigned arrived = 0, passed = 0; const char* what = ""; };
struct Warp { Barrier barrier; Slot slots[2][32]; };
struct Copy { void* to; const void* from; size_t read, zeros; unsigned group; };
struct Fiber {
    ucontext_t start;
    jmp_buf at;
    char* stack;
    bool begun, done;
    std::vector<Copy> copies;
    unsigned groups;  // committed so far
};

inline Fiber fibers[1024];
inline Warp warps[32];
inline Barrier block;
inline std::function<void()> body;
inline jmp_buf scheduler;
inline unsigned self, progress;  // the running thread; barriers passed and threads done
inline int error = 0;
inline bool reverse = false;

// A GPU would say as little as "unspecified launch failure" (719).
inline void report(const char* what) {
    fprintf(stderr, "cuda_on_cpu: block %u, thread %u: %s\n", blockIdx.x, self, what);
    error = 719;
}

// The thread gives way, and goes on here when it is its turn again. After an error it never is.
__attribute__((noinline)) inline void yield() {
    if (!_setjmp(fibers[self].at)) _longjmp(scheduler, 1);
}
inline void fail(const char* what) { report(what), yield(); }
inline void trapped(int signal) {
    fail(signal == SIGSEGV ? "an address that is not ours" : "misaligned access or bad index");
}

inline void wait(Barrier& b, unsigned threads, const char* what) {
    if (b.arrived && strcmp(b.what, what)) fail("threads wait at different collectives");
    b.what = what;
    unsigned passed = b.passed;
    if (++b.arrived == threads) b.arrived = 0, b.passed++, progress++;
    while (b.passed == passed) yield();
}

// Every lane of a warp gives one value and receives all 32. Two sets of slots in turn: who writes
// the next value knows that all have read the one before the last.
template <class T>
std::array<T, 32> exchange(const T& mine, const char* what, unsigned mask = ~0u) {
    static_assert(sizeof(T) <= sizeof(Slot));
    if (mask != ~0u) fail("only whole warps are emulated: the mask must be 0xffffffff");
    Warp& warp = warps[self / 32];
    Slot* slots = warp.slots[warp.barrier.passed % 2];
    memcpy(slots + self % 32, &mine, sizeof mine);
    wait(warp.barrier, 32, what);
    std::array<T, 32> all;
    for (int lane = 0; lane < 32; lane++) memcpy(&all[lane], slots + lane, sizeof mine);
    return all;
}

inline void entry() {
    body();
    fibers[self].done = true, progress++;
    _longjmp(scheduler, 1);
}

__attribute__((noinline)) inline void resume(unsigned thread) {
    self = threadIdx.x = thread;
    if (_setjmp(scheduler)) return;  // it gave way, ended or failed
    if (fibers[thread].begun) _longjmp(fibers[thread].at, 1);
    fibers[thread].begun = true;
    setcontext(&fibers[thread].start);
}

inline void run_block(unsigned threads, size_t bytes) {
    memset(smem, 0xff, sizeof smem);  // NaN as float and as bfloat16
    block = Barrier();
    for (unsigned i = 0; i < threads; i++) {
        Fiber& fiber = fibers[i];
        if (i % 32 == 0) warps[i / 32] = Warp();
        if (!fiber.stack) fiber.stack = (char*)malloc(STACK);
        getcontext(&fiber.start);
        fiber.start.uc_stack.ss_sp = fiber.stack;
        fiber.start.uc_stack.ss_size = STACK;
        makecontext(&fiber.start, entry, 0);
        fiber.begun = fiber.done = false, fiber.groups = 0;
        fiber.copies.clear();
    }
    for (unsigned left = threads, before; left && !error;) {
        before = progress;
        for (unsigned i = 0; i < threads && !error; i++) {
            unsigned thread = reverse ? threads - 1 - i : i;
            if (fibers[thread].done) continue;
            resume(thread);
            left -= fibers[thread].done;
        }
        if (before == progress && !error) report("waits at a barrier that others never reach");
    }
    bool clean = std::all_of(smem + bytes, smem + sizeof smem, [](int x) { return x == 0xff; });
    if (!clean && !error) report("wrote past the shared memory that it asked for");
}

// kernel<<<blocks, threads, bytes>>>. An error stays until cudaGetLastError asks for it.
inline void launch(unsigned blocks, unsigned threads, size_t bytes, std::function<void()> kernel) {
    struct sigaction trap = {}, saved[3];
    const int signals[3] = {SIGILL, SIGTRAP, SIGSEGV};
    if (threads == 0 || threads > 1024 || threads % 32 || bytes > MOST) error = 9;
    gridDim.x = blocks, blockDim.x = threads, body = kernel;
    trap.sa_handler = trapped;
    trap.sa_flags = SA_NODEFER;
    for (int i = 0; i < 3; i++) sigaction(signals[i], &trap, &saved[i]);
    for (unsigned i = 0; i < blocks && !error; i++) {
        blockIdx.x = reverse ? blocks - 1 - i : i;
        run_block(threads, bytes);
    }
    for (int i = 0; i < 3; i++) sigaction(signals[i], &saved[i], nullptr);
}

}  // namespace emulator

extern "C" void emulator_reverse(int on) { emulator::reverse = on; }
inline int cudaGetLastError() { return std::exchange(emulator::error, 0); }

// -- What threads do together -------------------------------------------------------------------

inline void __syncthreads() { emulator::wait(emulator::block, blockDim.x, "syncthreads"); }
inline void __syncwarp() { emulator::exchange(0, "syncwarp"); }
inline void __threadfence() {}  // one thread runs at a time

// Asynchronous copies arrive no earlier than when their thread waits for them.
inline void __pipeline_memcpy_async(void* to, const void* from, size_t n, size_t zeros = 0) {
    auto& me = emulator::fibers[emulator::self];
    if ((n != 4 && n != 8 && n != 16) || ((size_t)to | (size_t)from) % n)
        emulator::fail("an asynchronous copy of 4, 8 or 16 bytes, aligned to as many");
    me.copies.push_back({to, from, n - zeros, zeros, me.groups});
}
inline void __pipeline_commit() { emulator::fibers[emulator::self].groups++; }
inline void __pipeline_wait_prior(unsigned n) {  // for all groups but the last n
    auto& me = emulator::fibers[emulator::self];
    for (auto& copy : me.copies) {
        if (copy.group + n >= me.groups) continue;
        memcpy(copy.to, copy.from, copy.read);
        memset((char*)copy.to + copy.read, 0, copy.zeros);
        copy.read = copy.zeros = 0;
    }
}

template <class T> T __shfl_sync(unsigned mask, T x, int lane) {
    return emulator::exchange(x, "shfl", mask)[lane % 32];
}
template <class T> T __shfl_xor_sync(unsigned mask, T x, int lanes) {
    return emulator::exchange(x, "shfl_xor", mask)[(emulator::self ^ lanes) % 32];
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
    auto all = emulator::exchange(predicate, "ballot", mask);
    unsigned votes = 0;
    for (int lane = 0; lane < 32; lane++) votes |= (unsigned)(all[lane] != 0) << lane;
    return votes;
}
template <class T> T atomicAdd(T* p, T x) { return std::exchange(*p, *p + x); }

// -- Tensor cores: the stand-ins for kernels.cu's PTX (PTX manual, "Matrix fragments") ----------

inline unsigned pack(float lo, float hi) {
    return __float2bfloat16(lo).x | (unsigned)__float2bfloat16(hi).x << 16;
}

// Four 8 x 8 matrices of bfloat16. Lane l names row l % 8 of matrix l / 8 (16 bytes) and receives,
// of each matrix i, in r[i], the elements (l / 4, 2 (l % 4)) and the one to its right; transposed:
// (2 (l % 4), l / 4) and the one below.
inline void ldmatrix(unsigned r[4], const void* row, bool transposed = false) {
    size_t at = (const unsigned char*)row - smem;
    if (at % 16 || at + 16 > sizeof smem) emulator::fail("ldmatrix: not 16 bytes of shared memory");
    struct Row { uint16_t x[8]; } mine;
    memcpy(&mine, row, 16);
    auto rows = emulator::exchange(mine, transposed ? "ldmatrix.trans" : "ldmatrix");
    int lane = emulator::self % 32, i = lane / 4, j = lane % 4 * 2;
    for (int m = 0; m < 4; m++) {
        unsigned lo = transposed ? rows[8 * m + j].x[i] : rows[8 * m + i].x[j];
        unsigned hi = transposed ? rows[8 * m + j + 1].x[i] : rows[8 * m + i].x[j + 1];
        r[m] = lo | hi << 16;
    }
}
inline void ldmatrix_trans(unsigned r[4], const void* row) { ldmatrix(r, row, true); }

// c (16, 8) += a (16, 16) b (16, 8). Two neighbours in a row of a, or in a column of b, lie in one
// register; the lane that holds a pair is (row % 8) * 4 + (pair % 4) of a, the same by column of b.
inline void mma(float* c, const unsigned a[4], unsigned b0, unsigned b1) {
    struct Mine { unsigned a[4], b[2]; } mine = {{a[0], a[1], a[2], a[3]}, {b0, b1}};
    auto all = emulator::exchange(mine, "mma");
    int lane = emulator::self % 32;
    for (int e = 0; e < 4; e++) {  // c[e] is row lane / 4 + 8 (e / 2), column 2 (lane % 4) + e % 2
        int column = lane % 4 * 2 + e % 2;
        for (int pair = 0; pair < 8; pair++) {  // k = 2 pair and 2 pair + 1
            unsigned x = all[lane / 4 * 4 + pair % 4].a[e / 2 + pair / 4 * 2];
            unsigned y = all[column * 4 + pair % 4].b[pair / 4];
            c[e] += __uint_as_float(x << 16) * __uint_as_float(y << 16);
            c[e] += __uint_as_float(x & 0xffff0000) * __uint_as_float(y & 0xffff0000);
        }
    }
}

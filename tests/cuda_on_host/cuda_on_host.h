// CUDA's names for a host compiler, as far as batchnorm.cu uses them, so that tests execute the kernel's own
// source. The threads of a block are fibers that run one at a time; only barriers hand over to the next, so
// what a kernel computes without the barrier it needs comes out wrong. A barrier that not all of its threads
// reach ends the launch with a message. Rounding follows the compiler: -ffp-contract=off and no fast math.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __shared__ static  // blocks run one after the other

using std::fma;
using std::sqrt;

struct Coordinates {
    unsigned x, y, z;
};
inline Coordinates threadIdx, blockIdx, blockDim, gridDim;

// --- the threads of a block -------------------------------------------------------------------------------

namespace cuda_on_host {

constexpr int WARP = 32;
constexpr size_t STACK = 64 << 10;

struct Thread {
    enum State { READY, AT_WARP, AT_BLOCK, RETURNED };

    State state;
    int line;            // of the barrier where it waits
    unsigned mask;       // lanes that have to come to the warp's barrier
    int source;          // lane whose value it asks for there
    uint64_t given, got;
    jmp_buf place;  // in its code
    std::unique_ptr<char[]> stack;
};

// Leaves off here and goes on there: swapcontext would ask the kernel for the signal mask each time.
__attribute__((noinline)) inline void hand_over(jmp_buf here, jmp_buf there)
{
    if (!_setjmp(here)) _longjmp(there, 1);
}

class Block {
public:
    // Runs body() in all threads, the warps in ascending or descending order, each as far as it gets before
    // the next. Returns what went wrong, or nothing; after an error the block is of no more use.
    std::string run(int threads, bool descending, std::function<void()> body)
    {
        body_ = std::move(body);
        threads_.resize(threads);
        for (Thread& thread : threads_) {
            if (!thread.stack) start(thread);
            thread.state = Thread::READY;
        }
        const int warps = (threads + WARP - 1) / WARP;
        for (bool progress = true; progress;) {
            progress = false;
            for (int i = 0; i < warps; ++i)
                while (run_warp(descending ? warps - 1 - i : i, descending)) progress = true;
            progress = release_block() || progress;
        }
        for (int t = 0; t < threads; ++t)
            if (threads_[t].state != Thread::RETURNED) return explain(t);
        return error_;
    }

    // Called by the running thread: hands over to the others until its barrier is complete.
    void wait(Thread::State state, int line)
    {
        Thread& own = current();
        own.state = state;
        own.line = line;
        hand_over(own.place, scheduler_);
    }

    Thread& current() { return threads_[threadIdx.x]; }

private:
    // What a fiber runs: the body of one block after the other.
    static void serve(unsigned high, unsigned low)
    {
        Block& block = *reinterpret_cast<Block*>(uintptr_t(high) << 16 << 16 | low);
        for (Thread& own = *block.starting_;; block.body_()) {
            own.state = Thread::RETURNED;
            hand_over(own.place, block.scheduler_);
        }
    }

    __attribute__((noinline)) void start(Thread& thread)
    {
        ucontext_t fiber;
        getcontext(&fiber);
        thread.stack.reset(new char[STACK]);
        fiber.uc_stack.ss_sp = thread.stack.get();
        fiber.uc_stack.ss_size = STACK;
        const uintptr_t address = reinterpret_cast<uintptr_t>(this);
        makecontext(&fiber, reinterpret_cast<void (*)()>(serve), 2, unsigned(address >> 16 >> 16),
                    unsigned(address));  // which passes on nothing longer than int
        starting_ = &thread;
        if (!_setjmp(scheduler_)) setcontext(&fiber);
    }

    // Whether a thread of the warp ran, or a barrier opened for some.
    bool run_warp(int warp, bool descending)
    {
        const int first = warp * WARP, lanes = std::min(WARP, int(threads_.size()) - first);
        bool progress = false;
        for (int i = 0; i < lanes; ++i) {
            const int t = first + (descending ? lanes - 1 - i : i);
            if (threads_[t].state != Thread::READY) continue;
            threadIdx = {unsigned(t), 0, 0};
            hand_over(scheduler_, threads_[t].place);
            progress = true;
        }
        for (int i = 0; i < lanes; ++i) progress = release_warp(first, lanes, threads_[first + i]) || progress;
        return progress;
    }

    bool release_warp(int first, int lanes, const Thread& caller)
    {
        if (caller.state != Thread::AT_WARP) return false;
        const unsigned mask = caller.mask;
        const int line = caller.line;
        for (int lane = 0; lane < WARP; ++lane) {
            if (!(mask >> lane & 1)) continue;
            if (lane >= lanes) return false;
            const Thread& other = threads_[first + lane];
            if (other.state != Thread::AT_WARP || other.mask != mask || other.line != line) return false;
        }
        for (int lane = 0; lane < lanes; ++lane) {
            if (!(mask >> lane & 1)) continue;
            Thread& other = threads_[first + lane];
            if (!(mask >> other.source & 1)) error_ = "a lane asks for the value of one outside the mask";
            other.got = threads_[first + other.source].given;
            other.state = Thread::READY;
        }
        return true;
    }

    bool release_block()
    {
        for (const Thread& thread : threads_)
            if (thread.state != Thread::AT_BLOCK || thread.line != threads_[0].line) return false;
        for (Thread& thread : threads_) thread.state = Thread::READY;
        return true;
    }

    std::string describe(int t) const
    {
        const Thread& thread = threads_[t];
        const std::string name = "thread " + std::to_string(t);
        if (thread.state == Thread::RETURNED) return name + " has returned";
        return name + " waits for its " + (thread.state == Thread::AT_WARP ? "warp" : "block") + " in line " +
               std::to_string(thread.line);
    }

    std::string explain(int waiting) const
    {
        std::string text = "divergent barrier: " + describe(waiting);
        for (int t = 0; t < int(threads_.size()); ++t)
            if (threads_[t].state != threads_[waiting].state || threads_[t].line != threads_[waiting].line)
                return text + ", " + describe(t);
        return text;
    }

    std::function<void()> body_;
    std::vector<Thread> threads_;
    Thread* starting_;
    jmp_buf scheduler_;
    std::string error_;
};

inline Block* block;

// --- kernels, called with the addresses of their arguments ------------------------------------------------

template <typename P>
std::string kind()
{
    if constexpr (std::is_pointer_v<P>)
        return "*" + kind<std::remove_const_t<std::remove_pointer_t<P>>>();
    const char* letter = std::is_floating_point_v<P> ? "f" : std::is_integral_v<P> ? "i" : "V";
    return letter + std::to_string(sizeof(P));
}

// The parameters as NumPy spells their types, structs as V, with a * in front of a pointer's.
template <typename... P>
std::string parameters(void (*)(P...))
{
    std::string text;
    ((text += kind<P>() + " "), ...);
    return text;
}

template <typename... P, size_t... I>
std::string launch(void (*kernel)(P...), unsigned grid, unsigned threads, void** arguments, bool descending,
                   std::index_sequence<I...>)
{
    Block fibers;
    block = &fibers;
    gridDim = {grid, 1, 1};
    blockDim = {threads, 1, 1};
    for (unsigned b = 0; b < grid; ++b) {
        blockIdx = {b, 0, 0};
        const std::string error = fibers.run(threads, descending, [&] {
            kernel(*static_cast<std::remove_reference_t<P>*>(arguments[I])...);
        });
        if (!error.empty()) return "block " + std::to_string(b) + ": " + error;
    }
    return "";
}

template <typename... P>
std::string launch(void (*kernel)(P...), unsigned grid, unsigned threads, void** arguments, bool descending)
{
    return launch(kernel, grid, threads, arguments, descending, std::index_sequence_for<P...>());
}

}  // namespace cuda_on_host

// Exports an instance of a kernel: its parameters, and the launch, which returns an error or "".
#define CUDA_ON_HOST_KERNEL(number, ...)                                                                    \
    extern "C" const char* parameters_##number()                                                            \
    {                                                                                                       \
        static const std::string text = cuda_on_host::parameters(&__VA_ARGS__);                             \
        return text.c_str();                                                                                \
    }                                                                                                       \
    extern "C" const char* launch_##number(unsigned grid, unsigned threads, void** arguments, bool reverse) \
    {                                                                                                       \
        static std::string error;                                                                           \
        error = cuda_on_host::launch(&__VA_ARGS__, grid, threads, arguments, reverse);                      \
        return error.c_str();                                                                               \
    }

// --- what device code calls -------------------------------------------------------------------------------

inline void __syncthreads(int line = __builtin_LINE())
{
    cuda_on_host::block->wait(cuda_on_host::Thread::AT_BLOCK, line);
}

template <typename V>
V __shfl_down_sync(unsigned mask, V value, unsigned delta, int line = __builtin_LINE())
{
    static_assert(std::is_arithmetic_v<V> && sizeof(V) <= 8);
    cuda_on_host::Thread& own = cuda_on_host::block->current();
    const int lane = threadIdx.x % cuda_on_host::WARP;
    own.mask = mask;
    own.source = lane + delta < cuda_on_host::WARP ? lane + delta : lane;
    std::memcpy(&own.given, &value, sizeof(V));
    cuda_on_host::block->wait(cuda_on_host::Thread::AT_WARP, line);
    std::memcpy(&value, &own.got, sizeof(V));
    return value;
}

struct __half {
    uint16_t bits;
};

inline float __half2float(__half h)
{
    const int exponent = h.bits >> 10 & 31, fraction = h.bits & 1023;
    const float magnitude = exponent == 31  ? (fraction ? NAN : INFINITY)
                            : exponent == 0 ? std::ldexp(float(fraction), -24)
                                            : std::ldexp(float(fraction + 1024), exponent - 25);
    return h.bits >> 15 ? -magnitude : magnitude;
}

// To nearest, ties to even, which is what rint does.
inline __half __float2half_rn(float value)
{
    const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
    if (std::isnan(value)) return {0x7fff};
    const double magnitude = std::fabs(value);
    if (magnitude >= 65520) return {uint16_t(sign | 0x7c00)};
    // The fraction's unit is 2^(exponent - 25); a fraction that rounds up to 2048 carries into the exponent.
    const int exponent = magnitude < std::ldexp(1, -14) ? 1 : std::ilogb(magnitude) + 15;
    const int fraction = int(std::rint(std::ldexp(magnitude, 25 - exponent)));
    return {uint16_t(sign | ((exponent - 1) * 1024 + fraction))};
}

struct __nv_bfloat16 {
    uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 b)
{
    const uint32_t bits = uint32_t(b.bits) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline __nv_bfloat16 __float2bfloat16_rn(float value)
{
    if (std::isnan(value)) return {0x7fff};
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

namespace cuda_on_host {
template <>
inline std::string kind<__half>() { return "f2"; }
template <>
inline std::string kind<__nv_bfloat16>() { return "u2"; }
}  // namespace cuda_on_host

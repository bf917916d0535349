// BatchNorm by Welford's algorithm, of (N, C, *) tensors in any memory format. One kernel per step:
//
//     training    moments, statistics, normalize      gradients    gradient_sums, parameter_gradients,
//     inference   normalize                                        input_gradient
//
// T is the type in which x, y and their gradients are stored. Everything is computed in A: float, or double
// where T is double.
//
// What differs numerically from the textbook, and why:
//
// * There is not one recurrence over the channel, but one in each thread of blocks_of(n) blocks, over at most
//   64 elements: errors of a long recurrence grow with its length. The threads' results are merged by Chan's
//   formula in a fixed tree: within the warp, across the block's warps, across the channel's blocks.
// * The thread that gets an element, and the place of that thread in the tree, follow from n and from the
//   element's place in its channel: not from the GPU, the memory format, T or the other channels. The same
//   values give the same bits everywhere. With channels_last that costs coalesced reads, and so be it.
// * A mean only ever moves by a fraction of a difference, also in a merge, where the textbook also has
//   (na * mean_a + nb * mean_b) / n. So a channel of equal values has exactly their mean and the variance 0,
//   and a large mean is never multiplied by a count. Counts are integers; a float would end at 2^24.
// * A thread without elements has no mean, and is left out of a merge. With a weight of 0 instead, its part
//   of the sum of squares would be 0 * inf where the square of the other's mean overflows.
// * Division and square root are IEEE's. Many kernels multiply by 1 / count, which is rounded already, and
//   take rsqrt, which may be 2 ulp off, for 1 / sqrt(var + eps).
// * y and x's gradient are rounded to T once, at the end.
//
// Compile with -fmad=false and -ftz=false (division and square root are correctly rounded unless options say
// otherwise): then each operation below is rounded once, subnormal results too, and `welford` in
// backends/_numpy.py, which has the same operations in the same order, returns the same bits.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

using Index = long long;  // a tensor may have more than 2^31 elements

constexpr int WARP = 32;
constexpr int THREADS = 256;  // of every block
constexpr int WARPS = THREADS / WARP;
constexpr int LONGEST = 64;  // elements of a thread

// --- elements, and which thread has which -----------------------------------------------------------------

__device__ float widen(__half value) { return __half2float(value); }
__device__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ float widen(float value) { return value; }
__device__ double widen(double value) { return value; }

__device__ void store(__half& to, float value) { to = __float2half_rn(value); }
__device__ void store(__nv_bfloat16& to, float value) { to = __float2bfloat16_rn(value); }
__device__ void store(float& to, float value) { to = value; }
__device__ void store(double& to, double value) { to = value; }

// Where a tensor's elements lie: the number of spatial positions, and strides in elements.
struct Layout {
    Index positions, image, channel, position;

    // Place of element i of channel c, where i counts N first and then the positions in C order. A division
    // per element is slow, but right for every format and size; this kernel is here for its rounding.
    __device__ Index at(Index c, Index i) const
    {
        return i / positions * image + c * channel + i % positions * position;
    }
};

// Blocks that share a channel of n elements.
__device__ Index blocks_of(Index n)
{
    return (n + THREADS * LONGEST - 1) / (THREADS * LONGEST);
}

// The elements of this thread: first, first + step, ... of channel c.
struct Slice {
    Index c, first, step;

    __device__ explicit Slice(Index n)
    {
        const Index blocks = blocks_of(n);
        c = blockIdx.x / blocks;
        first = blockIdx.x % blocks * THREADS + threadIdx.x;
        step = blocks * THREADS;
    }
};

// --- what is reduced, and how -----------------------------------------------------------------------------

constexpr unsigned ALL = 0xffffffff;  // lanes of a warp

// Of some elements: their number, their mean, and the sum of their squared distances from it.
template <typename A>
struct Moments {
    Index count;
    A mean, m2;
};

template <typename A>
__device__ Moments<A> merge(Moments<A> a, Moments<A> b)
{
    if (b.count == 0) return a;
    if (a.count == 0) return b;
    const Index count = a.count + b.count;
    const A share = A(b.count) / A(count);
    const A delta = b.mean - a.mean;
    return {count, a.mean + delta * share, a.m2 + b.m2 + delta * delta * (A(a.count) * share)};
}

template <typename A>
__device__ Moments<A> from_lane_above(Moments<A> own, int distance)
{
    return {__shfl_down_sync(ALL, own.count, distance), __shfl_down_sync(ALL, own.mean, distance),
            __shfl_down_sync(ALL, own.m2, distance)};
}

// Sums over some elements: of the gradient g of y, and of g times the normalized x.
template <typename A>
struct Sums {
    A g, g_xhat;
};

template <typename A>
__device__ Sums<A> merge(Sums<A> a, Sums<A> b)
{
    return {a.g + b.g, a.g_xhat + b.g_xhat};
}

template <typename A>
__device__ Sums<A> from_lane_above(Sums<A> own, int distance)
{
    return {__shfl_down_sync(ALL, own.g, distance), __shfl_down_sync(ALL, own.g_xhat, distance)};
}

// Merges the values of a warp's first `width` lanes into lane 0's, second halves into first. All lanes take
// part in the shuffles; what those from `half` on are left with is not used.
template <typename V>
__device__ V merge_warp(V value, int width)
{
    for (int half = width / 2; half > 0; half /= 2) value = merge(value, from_lane_above(value, half));
    return value;
}

// Merges the values of all threads into thread 0's. All threads have to call it, and once in a kernel.
template <typename V>
__device__ V merge_block(V value)
{
    __shared__ V of_warp[WARPS];
    const int lane = threadIdx.x % WARP;
    value = merge_warp(value, WARP);
    if (lane == 0) of_warp[threadIdx.x / WARP] = value;
    __syncthreads();
    if (threadIdx.x < WARP) value = merge_warp(of_warp[lane % WARPS], WARPS);
    return value;
}

// Merges what the blocks of channel blockIdx.x left into thread 0's value. empty: the value of no elements.
template <typename V>
__device__ V merge_channel(const V* partial, Index n, V empty)
{
    const Index blocks = blocks_of(n);
    V value = empty;
    for (Index b = threadIdx.x; b < blocks; b += THREADS)
        value = merge(value, partial[blockIdx.x * blocks + b]);
    return merge_block(value);
}

// How channel c is normalized.
template <typename A>
struct Normalization {
    A mean, invstd;

    __device__ Normalization(const A* means, const A* vars, A eps, Index c)
        : mean(means[c]), invstd(A(1) / sqrt(vars[c] + eps))
    {
    }

    __device__ A operator()(A value) const { return (value - mean) * invstd; }
};

// --- the kernels: blocks of THREADS, blocks_of(n) of them per channel ---------------------------------------

template <typename T, typename A>
__global__ void moments(const T* x, Layout x_layout, Index n, Moments<A>* partial)
{
    const Slice own(n);
    Moments<A> some = {0, 0, 0};
    for (Index i = own.first; i < n; i += own.step) {
        const A value = widen(x[x_layout.at(own.c, i)]);
        const A delta = value - some.mean;
        some.count += 1;
        some.mean += delta / A(some.count);
        some.m2 += delta * (value - some.mean);
    }
    some = merge_block(some);
    if (threadIdx.x == 0) partial[blockIdx.x] = some;
}

// One block per channel. Writes the batch's mean and biased variance, and updates the running statistics:
// what they were times `old`, plus the batch's times `recent`, its variance times `correction` before.
template <typename A>
__global__ void statistics(const Moments<A>* partial, Index n, A old, A recent, A correction, A* mean, A* var,
                           A* running_mean, A* running_var)
{
    const Moments<A> all = merge_channel(partial, n, Moments<A>{0, 0, 0});
    if (threadIdx.x != 0) return;
    const Index c = blockIdx.x;
    const A biased = all.m2 / A(n);
    mean[c] = all.mean;
    var[c] = biased;
    running_mean[c] = running_mean[c] * old + all.mean * recent;
    running_var[c] = running_var[c] * old + biased * correction * recent;
}

// weight and bias may be null.
template <typename T, typename A>
__global__ void normalize(const T* x, Layout x_layout, Index n, const A* mean, const A* var, A eps,
                          const A* weight, const A* bias, T* y, Layout y_layout)
{
    const Slice own(n);
    const Normalization<A> xhat(mean, var, eps, own.c);
    for (Index i = own.first; i < n; i += own.step) {
        A value = xhat(widen(x[x_layout.at(own.c, i)]));
        if (weight) value *= weight[own.c];
        if (bias) value += bias[own.c];
        store(y[y_layout.at(own.c, i)], value);
    }
}

template <typename T, typename A>
__global__ void gradient_sums(const T* x, Layout x_layout, Index n, const T* grad, Layout grad_layout,
                              const A* mean, const A* var, A eps, Sums<A>* partial)
{
    const Slice own(n);
    const Normalization<A> xhat(mean, var, eps, own.c);
    Sums<A> some = {0, 0};
    for (Index i = own.first; i < n; i += own.step) {
        const A g = widen(grad[grad_layout.at(own.c, i)]);
        some.g += g;
        some.g_xhat += g * xhat(widen(x[x_layout.at(own.c, i)]));
    }
    some = merge_block(some);
    if (threadIdx.x == 0) partial[blockIdx.x] = some;
}

// One block per channel.
template <typename A>
__global__ void parameter_gradients(const Sums<A>* partial, Index n, A* grad_weight, A* grad_bias)
{
    const Sums<A> all = merge_channel(partial, n, Sums<A>{0, 0});
    if (threadIdx.x != 0) return;
    grad_weight[blockIdx.x] = all.g_xhat;
    grad_bias[blockIdx.x] = all.g;
}

// weight may be null. grad_weight and grad_bias are null in inference, where mean and var do not depend on x.
template <typename T, typename A>
__global__ void input_gradient(const T* x, Layout x_layout, Index n, const T* grad, Layout grad_layout,
                               const A* mean, const A* var, A eps, const A* weight, const A* grad_weight,
                               const A* grad_bias, T* grad_input, Layout input_layout)
{
    const Slice own(n);
    const Normalization<A> xhat(mean, var, eps, own.c);
    const A slope = weight ? xhat.invstd * weight[own.c] : xhat.invstd;
    const A by_mean = grad_bias ? grad_bias[own.c] / A(n) : A(0);
    const A by_var = grad_weight ? grad_weight[own.c] / A(n) : A(0);
    for (Index i = own.first; i < n; i += own.step) {
        A g = widen(grad[grad_layout.at(own.c, i)]);
        if (grad_bias) g = g - by_mean - xhat(widen(x[x_layout.at(own.c, i)])) * by_var;
        store(grad_input[input_layout.at(own.c, i)], g * slope);
    }
}

# mypy: ignore-errors
import torch
import triton
import triton.language as tl


@triton.jit
def kernel(x, y, mean, var, w, b, n, size, sn, sc, ss, momentum, eps, training: tl.constexpr):
    c, k = tl.program_id(0), tl.arange(0, 1024)
    old_m, old_v = tl.load(mean + c).to(tl.float32), tl.load(var + c).to(tl.float32)
    m, v = old_m, old_v
    if training:
        m = 0.0
        for _ in tl.static_range(2):  # the second time about the mean that the first time found
            first, second = tl.zeros([1024], tl.float32), tl.zeros([1024], tl.float32)
            for i in range(0, n, 1024):
                at = c * sc + (i + k) // size * sn + (i + k) % size * ss
                d = tl.where(i + k < n, tl.load(x + at, i + k < n, 0.0).to(tl.float32) - m, 0.0)
                first, second = first + d, second + d * d
            error = tl.sum(first) / n
            m, v = m + error, tl.sum(second) / n - error * error
        tl.store(mean + c, old_m + momentum * (m - old_m))
        tl.store(var + c, old_v + momentum * (v * n / tl.maximum(n - 1, 1) - old_v))
    scale, shift = tl.load(w + c) / tl.sqrt(v + eps), tl.load(b + c)
    for i in range(0, n, 1024):
        at = c * sc + (i + k) // size * sn + (i + k) % size * ss
        d = tl.load(x + at, i + k < n, 0.0).to(tl.float32) - m
        tl.store(y + at, d * scale + shift, i + k < n)


def batch_norm(x, weight, bias, running_mean, running_var, *, training, momentum, eps, **_):
    if x.dtype == torch.float64 or x.numel() == 0 or weight is None:
        raise NotImplementedError("float32 arithmetic, at least one value, weight and bias")
    y, n = x.new_empty_strided(x.shape, x.stride()), x.numel() // x.shape[1]
    rest = (n, n // len(x), *x.stride()[:2], x.stride(-1), momentum, eps, training)
    kernel[(x.shape[1],)](x, y, running_mean, running_var, weight, bias, *rest)
    return y


batch_norm.tensors = "torch"

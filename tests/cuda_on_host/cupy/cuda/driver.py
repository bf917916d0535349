"""The CUDA driver's errors."""


class CUDADriverError(RuntimeError):
    pass

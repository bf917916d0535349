"""The built-in backends, by name. A literal table: nothing registers itself.

Each module is imported only when one of its backends is asked for. It holds the named functions, which
have the signature of a plug-in (see `bnaudit.worker.protocol`), and `unavailable(name)`, which says why a
backend cannot run here, or None. A function may carry these attributes:

* `widened = True`: 16-bit tensors arrive exactly widened to float32, per-channel arrays in the statistics
  dtype; y and grad_input are returned in float32 or float64 and rounded once to the case's dtype by the
  worker. Otherwise arrays arrive and return as they are stored, bfloat16 as uint16 bits.
* `counts_steps = True`: it is given `step`, counted from 1, and momentum as the case has it (None:
  cumulative) instead of the resolved weight of the batch.
* `running_var_correction` (0 or 1) and `running_update` ("ema" or "caffe"), as for plug-ins.
"""

from __future__ import annotations

from typing import NamedTuple


class Backend(NamedTuple):
    """One built-in backend.

    module, function: where it is, below this package. kind: "real" (a framework, gated by default) or
    "specimen". default: runs when no backend is asked for. library: backends of one library share a worker
    process. summary: what is numerically its own, in one line.
    """

    module: str
    function: str
    kind: str
    default: bool
    library: str
    summary: str


BACKENDS = {
    "exact@cpu": Backend(
        "_exact",
        "exact",
        "specimen",
        False,
        "numpy",
        "the right answer, rounded once: no better output exists",
    ),
    "one-pass@cpu": Backend(
        "_numpy",
        "one_pass",
        "specimen",
        False,
        "numpy",
        "variance as E[x²] − E[x]², pairwise sums: cancels when the mean is large",
    ),
    "two-pass@cpu": Backend(
        "_numpy",
        "two_pass",
        "specimen",
        False,
        "numpy",
        "mean, then squared deviations, pairwise sums",
    ),
    "two-pass-sequential@cpu": Backend(
        "_numpy",
        "two_pass_sequential",
        "specimen",
        False,
        "numpy",
        "mean, then squared deviations, each in one long running sum",
    ),
    "welford@cpu": Backend(
        "_numpy",
        "welford",
        "specimen",
        True,
        "numpy",
        "Welford updates in regions, joined by Chan's merges: constant channels stay exact",
    ),
    "welford-sequential@cpu": Backend(
        "_numpy",
        "welford_sequential",
        "specimen",
        False,
        "numpy",
        "Welford updates, element after element",
    ),
    "shifted@cpu": Backend(
        "_numpy",
        "shifted",
        "specimen",
        False,
        "numpy",
        "one pass over x minus the channel's first value: as good as that value is typical",
    ),
    "gemm@cpu": Backend(
        "_gemm",
        "gemm",
        "specimen",
        True,
        "numpy",
        "two passes as matrix products on the BLAS under NumPy, as Caffe's GPU layer had them",
    ),
    "gemm@cuda": Backend(
        "_cupy",
        "gemm",
        "specimen",
        True,
        "cupy",
        "the gemv and gemm calls of Caffe's GPU layer on cuBLAS, in float32 or float64",
    ),
    "gemm-tf32@cuda": Backend(
        "_cupy",
        "gemm_tf32",
        "specimen",
        False,
        "cupy",
        "gemm with cuBLAS's TF32 mode on: its products may keep 11 bits of the mean",
    ),
    "welford@cuda": Backend(
        "_welford_cuda",
        "welford",
        "specimen",
        True,
        "cupy",
        "Welford in CUDA: one recurrence per thread, merged by warp, block and grid",
    ),
    "chainer-2016@cuda": Backend(
        "_cupy",
        "chainer_2016",
        "specimen",
        False,
        "cupy",
        "Chainer's layer of 2016 on CuPy's reductions; its running variance holds eps",
    ),
    "caffe-2016@cpu": Backend(
        "_caffe",
        "caffe_2016",
        "specimen",
        False,
        "numpy",
        "Caffe's layer of 2016, bit for bit, in the order of ATLAS's sums",
    ),
    "torch@cpu": Backend(
        "_torch",
        "torch_cpu",
        "real",
        True,
        "torch",
        "torch.nn.functional.batch_norm: another kernel for each memory format",
    ),
    "torch@cuda": Backend(
        "_torch",
        "torch_cuda",
        "real",
        True,
        "torch",
        "torch.nn.functional.batch_norm on the GPU: cuDNN or torch's own kernel, as torch chooses",
    ),
    "torch-compile@cpu": Backend(
        "_torch",
        "torch_compile_cpu",
        "real",
        False,
        "torch",
        "torch.compile of batch_norm: Inductor's fused Welford; compiles for each shape",
    ),
    "torch-compile@cuda": Backend(
        "_torch",
        "torch_compile_cuda",
        "real",
        False,
        "torch",
        "torch.compile of batch_norm on the GPU: Inductor's Triton kernels",
    ),
    "torch-native@cuda": Backend(
        "_torch",
        "torch_native_cuda",
        "real",
        False,
        "torch",
        "torch's own GPU kernel, cuDNN switched off",
    ),
    "torch-cudnn@cuda": Backend(
        "_torch", "torch_cudnn_cuda", "real", False, "torch", "cuDNN through torch, or an error"
    ),
    "torch-cudnn-benchmark@cuda": Backend(
        "_torch",
        "torch_cudnn_benchmark_cuda",
        "real",
        False,
        "torch",
        "cuDNN through torch with torch.backends.cudnn.benchmark on",
    ),
    "torch-cudnn-deterministic@cuda": Backend(
        "_torch",
        "torch_cudnn_deterministic_cuda",
        "real",
        False,
        "torch",
        "cuDNN through torch with torch.backends.cudnn.deterministic on",
    ),
    "torch-sync@cpu": Backend(
        "_torch_sync",
        "torch_sync_2_cpu",
        "real",
        False,
        "torch-sync",
        "SyncBatchNorm's merge over gloo: 2 ranks that share the batch 2 to 1",
    ),
    "torch-sync-4@cpu": Backend(
        "_torch_sync",
        "torch_sync_4_cpu",
        "real",
        False,
        "torch-sync",
        "SyncBatchNorm's merge over gloo: 4 ranks with shares 3, 0, 2 and 1 of the batch",
    ),
    "torch-sync@cuda": Backend(
        "_torch_sync",
        "torch_sync_cuda",
        "real",
        False,
        "torch-sync",
        "SyncBatchNorm over nccl: one rank per GPU, the batch split unequally",
    ),
}

"""The built-in backends, by name. A literal table: nothing registers itself.

Each module is imported only when one of its backends is asked for. It holds the named functions, which
have the signature of a plug-in (see `bnaudit.worker.plugin`), and `unavailable(name)`, which says why a
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
    "welford-regions-64@cpu": Backend(
        "_numpy",
        "welford_regions_64",
        "specimen",
        False,
        "numpy",
        "Welford updates in runs of 64 elements, neighbours joined by Chan's merges",
    ),
    "welford-regions-1024@cpu": Backend(
        "_numpy",
        "welford_regions_1024",
        "specimen",
        False,
        "numpy",
        "welford-regions-64 with runs of 1024",
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
        "Caffe's layer of 2016, bit for bit, in the order of ATLAS's sums; 1/m on the first gemv",
    ),
    "caffe-2016-gemv2@cpu": Backend(
        "_caffe",
        "caffe_2016_gemv2",
        "specimen",
        False,
        "numpy",
        "caffe-2016 with 1/m on the second gemv, which adds one sum for each image",
    ),
    "caffe-2016-split@cpu": Backend(
        "_caffe",
        "caffe_2016_split",
        "specimen",
        False,
        "numpy",
        "caffe-2016 with 1/S on the first gemv and 1/N on the second",
    ),
    "caffe-2016-reference@cpu": Backend(
        "_caffe",
        "caffe_2016_reference",
        "specimen",
        False,
        "numpy",
        "caffe-2016 in the order of netlib's BLAS: one chain, then the factor",
    ),
    "caffe-2016-openblas-nehalem@cpu": Backend(
        "_caffe",
        "caffe_2016_openblas_nehalem",
        "specimen",
        False,
        "numpy",
        "caffe-2016 in OpenBLAS's order on Nehalem: 4 lanes, the rest of a row scaled first",
    ),
    "caffe-2016-openblas-sandybridge@cpu": Backend(
        "_caffe",
        "caffe_2016_openblas_sandybridge",
        "specimen",
        False,
        "numpy",
        "caffe-2016 in OpenBLAS's order on Sandy Bridge: 16 lanes, the rest of a row scaled first",
    ),
    "caffe-2016-openblas-haswell@cpu": Backend(
        "_caffe",
        "caffe_2016_openblas_haswell",
        "specimen",
        False,
        "numpy",
        "caffe-2016 in OpenBLAS's order on Haswell: 8 lanes, a fused axpy; float32 only",
    ),
    "caffe-2016-cblas@cpu": Backend(
        "_cblas",
        "caffe_2016_cblas",
        "specimen",
        False,
        "cblas",
        "caffe-2016 on the CBLAS library that BNAUDIT_CBLAS names, or the system's",
    ),
    "borisgin-0.15@cpu": Backend(
        "_nvcaffe",
        "borisgin_0_15",
        "specimen",
        False,
        "numpy",
        "Caffe rewritten: 1/m after both sums, times the inverse root, biased running variance",
    ),
    "bn-apr20@cpu": Backend(
        "_nvcaffe",
        "bn_apr20",
        "specimen",
        False,
        "numpy",
        "borisgin-0.15, the variance clipped to a quarter and four times the running one from step 201",
    ),
    "nvcaffe-0.15@cpu": Backend(
        "_nvcaffe",
        "nvcaffe_0_15",
        "specimen",
        False,
        "numpy",
        "borisgin-0.15, the first step copied, the variance clipped by the channels' average from step 201",
    ),
    "bn-may4@cpu": Backend(
        "_nvcaffe",
        "bn_may4",
        "specimen",
        False,
        "numpy",
        "nvcaffe-0.15 with clipping off and the inverse root rounded twice",
    ),
    "chainer-2016@cpu": Backend(
        "_chainer",
        "chainer_2016",
        "specimen",
        False,
        "numpy",
        "Chainer's layer of 2016 on NumPy's pairwise sums; its running variance holds eps",
    ),
    "chainer-2016-gpu@cpu": Backend(
        "_chainer",
        "chainer_2016_gpu",
        "specimen",
        False,
        "numpy",
        "chainer-2016 in the order of its GPU kernel: blocks of up to 512 threads",
    ),
    "mxnet-2016@cpu": Backend(
        "_mxnet",
        "mxnet_2016",
        "specimen",
        False,
        "numpy",
        "MXNet's layer of 2016: one chain per sum; only backward moves the running statistics",
    ),
    "mxnet-2016-gpu@cpu": Backend(
        "_mxnet",
        "mxnet_2016_gpu",
        "specimen",
        False,
        "numpy",
        "mxnet-2016 in the order of its GPU kernel: blocks of 256 threads",
    ),
    "mxnet-2016-fix-gamma@cpu": Backend(
        "_mxnet",
        "mxnet_2016_fix_gamma",
        "specimen",
        False,
        "numpy",
        "mxnet-2016 with fix_gamma: y ignores the weight, parts of the gradient do not",
    ),
    "cudnn-v4@cpu": Backend(
        "_cudnn",
        "cudnn_v4",
        "specimen",
        False,
        "numpy",
        "a model of cuDNN 4: sums by 512 threads; its running variance is an average of 1/std",
    ),
    "cudnn-v5@cpu": Backend(
        "_cudnn",
        "cudnn_v5",
        "specimen",
        False,
        "numpy",
        "a model of cuDNN 5: sums by 512 threads, running variance unbiased",
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
    "onnxruntime@cpu": Backend(
        "_onnxruntime",
        "onnxruntime_cpu",
        "real",
        False,
        "onnxruntime",
        "ONNX's BatchNormalization node, training_mode included; biased running variance, no gradients",
    ),
    "chainer@cpu": Backend(
        "_chainer_real",
        "chainer_cpu",
        "real",
        False,
        "chainer",
        "Chainer 7 on NumPy: 16-bit parameters make its statistics 16-bit, too",
    ),
    "mxnet@cpu": Backend(
        "_mxnet_real",
        "mxnet_cpu",
        "real",
        False,
        "mxnet",
        "MXNet 1.9: the running variance is rebuilt as 1/invstd² − eps, and only backward moves it",
    ),
    "mlx@cpu": Backend(
        "_mlx",
        "mlx_cpu",
        "real",
        False,
        "mlx",
        "mlx.nn.BatchNorm: statistics in x's dtype, also in 16 bits",
    ),
    "tinygrad@cpu": Backend(
        "_tinygrad",
        "tinygrad_cpu",
        "real",
        False,
        "tinygrad",
        "tinygrad.nn.BatchNorm: kernels compiled for each shape, mean and variance in x's dtype",
    ),
    "paddle@cpu": Backend(
        "_paddle",
        "paddle_cpu",
        "real",
        False,
        "paddle",
        "Paddle's batch_norm: NHWC is another kernel; a single value per channel passes through",
    ),
}

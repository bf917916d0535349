"""Faults in the running statistics."""

from __future__ import annotations

from typing import Any

import numpy as np

from bnaudit.defects.layer import Array, Call, Layer


class BiasedRunningVariance(Layer):
    """The running variance keeps the biased one. tenstorrent/tt-metal#55438, ml-explore/mlx#3817."""

    def average(self, call: Call, mean: Array, var: Array) -> tuple[Array, Array]:
        """Without n / (n - 1)."""
        return self.blend(call, mean, call.running_mean), self.blend(call, var, call.running_var)


class BesselAtOne(Layer):
    """n / (n - 1) at n = 1. pytorch/pytorch#1381, torch/nn#1271."""

    def average(self, call: Call, mean: Array, var: Array) -> tuple[Array, Array]:
        """0 / 0."""
        with np.errstate(invalid="ignore", divide="ignore"):
            unbiased = var * call.n / np.float64(call.n - 1)
        return self.blend(call, mean, call.running_mean), self.blend(
            call, unbiased, call.running_var
        )


class BesselByBatch(Layer):
    """Bessel's correction with the batch size in place of n. Cf. tinygrad/tinygrad#807."""

    def average(self, call: Call, mean: Array, var: Array) -> tuple[Array, Array]:
        """N / (N - 1)."""
        images = call.x.shape[0]
        unbiased = var * (images / max(images - 1, 1))
        return self.blend(call, mean, call.running_mean), self.blend(
            call, unbiased, call.running_var
        )


class BesselByTensor(Layer):
    """Bessel's correction with the size of the tensor in place of n. Cf. tinygrad/tinygrad#807."""

    def average(self, call: Call, mean: Array, var: Array) -> tuple[Array, Array]:
        """For n C elements."""
        size = call.x.size
        unbiased = var * (size / max(size - 1, 1))
        return self.blend(call, mean, call.running_mean), self.blend(
            call, unbiased, call.running_var
        )


class BesselTwice(Layer):
    """A variance that is unbiased already is corrected again. Cf. pytorch/pytorch#22192."""

    def average(self, call: Call, mean: Array, var: Array) -> tuple[Array, Array]:
        """By n / (n - 1) once more."""
        return super().average(call, mean, var * (call.n / max(call.n - 1, 1)))


class InvertedMomentum(Layer):
    """momentum weighs the old value. PaddlePaddle/Paddle#51120, Oneflow-Inc/oneflow#6055."""

    def blend(self, call: Call, new: Array, old: Array) -> Array:
        """The other way round."""
        return call.momentum * old.astype(new.dtype) + (1 - call.momentum) * new


class FixedMomentum(Layer):
    """momentum is 0.1 whatever the caller says. Cf. Jermmy/pytorch-quantization-demo#17."""

    def blend(self, call: Call, new: Array, old: Array) -> Array:
        """A constant."""
        return 0.9 * old.astype(new.dtype) + 0.1 * new


class MomentumInHalf(Layer):
    """momentum is passed on as a float16. Cf. keras-team/keras-core#412."""

    def blend(self, call: Call, new: Array, old: Array) -> Array:
        """Rounds it."""
        momentum = np.float64(np.float16(call.momentum))
        return (1 - momentum) * old.astype(new.dtype) + momentum * new


class UnweightedOld(Layer):
    """The old value is not scaled down. Cf. d2l-ai/d2l-en#2213."""

    def blend(self, call: Call, new: Array, old: Array) -> Array:
        """old + momentum new."""
        return old.astype(new.dtype) + call.momentum * new


class UpdatedTwice(Layer):
    """One step updates twice, as recomputed activations do. pytorch/pytorch#96136."""

    def blend(self, call: Call, new: Array, old: Array) -> Array:
        """Again."""
        return super().blend(call, new, super().blend(call, new, old))


class NeverUpdated(Layer):
    """The running statistics stay as they were. HomericIntelligence/Odyssey#5532, hiwonjoon/tf-frrn#2."""

    def blend(self, call: Call, new: Array, old: Array) -> Array:
        """old."""
        return old.astype(new.dtype)


class UpdatedInInference(Layer):
    """Inference moves the running statistics. mf1024/Batch-Renormalization-PyTorch#1."""

    def apply(self, call: Call) -> dict[str, Any]:
        """Averages this batch's in."""
        outputs = super().apply(call)
        if not call.training and call.n:
            rows = self.read(call, call.x)
            averages = self.average(call, *self.statistics(call, rows))
            outputs["running_mean"], outputs["running_var"] = averages
        return outputs


class ReplacedInitialValue(Layer):
    """The first batch replaces the initial values 0 and 1. keras-team/keras#13117, BVLC/caffe#3963."""

    def average(self, call: Call, mean: Array, var: Array) -> tuple[Array, Array]:
        """Where they are seen."""
        if (call.running_mean == 0).all() and (call.running_var == 1).all():
            return mean, var * (call.n / max(call.n - 1, 1))
        return super().average(call, mean, var)


class ZeroDebiased(Layer):
    """The average starts from 0, corrected for it, whatever the caller gave. keras-team/keras#13117."""

    def __init__(self) -> None:
        """Before the first step."""
        self._step = 0

    def average(self, call: Call, mean: Array, var: Array) -> tuple[Array, Array]:
        """The first batch's own statistics, then averages."""
        self._step += 1
        if self._step == 1:
            return mean, var * (call.n / max(call.n - 1, 1))
        return super().average(call, mean, var)


class OnlyMeanUpdated(Layer):
    """The running variance stays as it was. Cf. pytorch/pytorch#12013."""

    def average(self, call: Call, mean: Array, var: Array) -> tuple[Array, Array]:
        """The mean moves."""
        return self.blend(call, mean, call.running_mean), call.running_var.astype(var.dtype)


class RunningDeviation(Layer):
    """The running variance keeps the standard deviation. soumith/cudnn.torch#109."""

    def average(self, call: Call, mean: Array, var: Array) -> tuple[Array, Array]:
        """sqrt(var)."""
        return super().average(call, mean, np.sqrt(var))


class RunningInvstd(Layer):
    """The running variance keeps 1 / sqrt(var + eps). torch/nn#567, yjxiong/caffe#16."""

    def average(self, call: Call, mean: Array, var: Array) -> tuple[Array, Array]:
        """invstd."""
        return super().average(call, mean, self.invstd(call, var))


class ReturnedInvstd(Layer):
    """The batch variance that is handed out is 1 / sqrt(var + eps). apache/mxnet#9216."""

    def apply(self, call: Call) -> dict[str, Any]:
        """invstd."""
        outputs = super().apply(call)
        if "batch_var" in outputs:
            outputs["batch_var"] = self.invstd(call, outputs["batch_var"])
        return outputs


class EpsInRunningVariance(Layer):
    """eps leaks into the running variance. keras-team/keras-contrib#287."""

    def average(self, call: Call, mean: Array, var: Array) -> tuple[Array, Array]:
        """var + eps."""
        return super().average(call, mean, var + call.eps)


class RebuiltVariance(Layer):
    """The running variance is rebuilt as 1 / invstd² - eps in float32. pytorch/pytorch#22192."""

    def average(self, call: Call, mean: Array, var: Array) -> tuple[Array, Array]:
        """Which cancels where var is below eps."""
        invstd = self.invstd(call, var).astype(call.statistics_dtype)
        rebuilt = 1 / np.square(invstd) - call.statistics_dtype.type(call.eps)
        return super().average(call, mean, rebuilt.astype(var.dtype))


class SumForMean(Layer):
    """The running mean averages sums. Cf. uxlfoundation/oneDNN#371."""

    def average(self, call: Call, mean: Array, var: Array) -> tuple[Array, Array]:
        """n times the mean."""
        return super().average(call, mean * call.n, var)


class UncentredRunningVariance(Layer):
    """The running variance averages squares about zero. Cf. mlpack/mlpack#1275."""

    def average(self, call: Call, mean: Array, var: Array) -> tuple[Array, Array]:
        """E[x²]."""
        return super().average(call, mean, var + np.square(mean))


class OneRanksStatistics(Layer):
    """Only the first rank's share is averaged in. Cf. pytorch/pytorch#22192."""

    def apply(self, call: Call) -> dict[str, Any]:
        """The first half of the images."""
        outputs = super().apply(call)
        half = call.x[: -(-call.x.shape[0] // 2)]
        if call.training and half.size:
            part = Call(
                half,
                None,
                None,
                call.running_mean,
                call.running_var,
                training=True,
                momentum=call.momentum,
                eps=call.eps,
            )
            averages = self.average(part, *self.statistics(part, self.read(part, half)))
            outputs["running_mean"], outputs["running_var"] = averages
        return outputs


class SixteenBitAverages(Layer):
    """float32 running statistics pass through the activations' dtype. tensorflow/tensorflow#8535."""

    def blend(self, call: Call, new: Array, old: Array) -> Array:
        """Rounds."""
        return super().blend(call, new, old).astype(call.x.dtype).astype(new.dtype)


class SixteenBitBessel(Layer):
    """The unbiased variance's sum of squares is a float16. pytorch/pytorch#126525."""

    def average(self, call: Call, mean: Array, var: Array) -> tuple[Array, Array]:
        """Overflows at 65504."""
        if call.x.dtype != np.float16:
            return super().average(call, mean, var)
        with np.errstate(over="ignore"):
            total = (var * call.n).astype(np.float16).astype(var.dtype)
        return super().average(call, mean, total / call.n)


class ClippedAverages(Layer):
    """A batch's variance is clipped to four times the running one. BVLC/caffe#3963 (NVCaffe)."""

    def average(self, call: Call, mean: Array, var: Array) -> tuple[Array, Array]:
        """Except where that is 0."""
        running = call.running_var.astype(var.dtype)
        return super().average(call, mean, np.where(running > 0, np.minimum(var, 4 * running), var))


class SwappedAverages(Layer):
    """Mean and variance change places. Cf. PaddlePaddle/Paddle#51120."""

    def average(self, call: Call, mean: Array, var: Array) -> tuple[Array, Array]:
        """Returned in the wrong order."""
        new_mean, new_var = super().average(call, mean, var)
        return new_var, new_mean


class FirstChannelsAverages(Layer):
    """Only the first 64 channels' averages are written. Cf. LBANN/lbann#1946."""

    limit = 64

    def blend(self, call: Call, new: Array, old: Array) -> Array:
        """The others stay."""
        moved = super().blend(call, new, old)
        moved[self.limit :] = old[self.limit :]
        return moved


class First4096ChannelsAverages(FirstChannelsAverages):
    """Only the first 4096 channels' averages are written. Cf. LBANN/lbann#1610."""

    limit = 4096


class AveragesLoseStep(Layer):
    """Steps beyond the first do not count. Cf. m2lines/Samudra#572."""

    def __init__(self) -> None:
        """Before the first step."""
        self._step = 0

    def average(self, call: Call, mean: Array, var: Array) -> tuple[Array, Array]:
        """Only the first two move anything."""
        self._step += 1
        if self._step > 2:
            return self.running(call, mean)
        return super().average(call, mean, var)


class MomentumFalsy(Layer):
    """A momentum of 0 is taken for none given, and becomes 0.1. Cf. pytorch/pytorch#15298."""

    def blend(self, call: Call, new: Array, old: Array) -> Array:
        """`momentum or 0.1`."""
        momentum = call.momentum or 0.1
        return (1 - momentum) * old.astype(new.dtype) + momentum * new


class MomentumInFloat32(Layer):
    """momentum of a float64 layer is a float32. Cf. tensorflow/tensorflow#33365."""

    def blend(self, call: Call, new: Array, old: Array) -> Array:
        """Rounds it."""
        momentum = float(np.float32(call.momentum))
        return (1 - momentum) * old.astype(new.dtype) + momentum * new


class Float32Averages(Layer):
    """Running statistics of a float64 layer are kept in float32. Cf. tensorflow/tensorflow#33365."""

    def blend(self, call: Call, new: Array, old: Array) -> Array:
        """Rounds."""
        return super().blend(call, new, old).astype(np.float32)


class BesselWithoutDepth(Layer):
    """Of five axes the depth is missing in n - 1. Cf. tinygrad/tinygrad#807."""

    def average(self, call: Call, mean: Array, var: Array) -> tuple[Array, Array]:
        """Corrects for too few."""
        shape = call.x.shape
        n = call.n // shape[2] if len(shape) == 5 else call.n
        own, right = n / max(n - 1, 1), call.n / max(call.n - 1, 1)
        return super().average(call, mean, var * (own / right))


class HalvedAverages(Layer):
    """Two ranks average what both have averaged. Cf. pytorch/pytorch#22192."""

    def blend(self, call: Call, new: Array, old: Array) -> Array:
        """Half of it moves."""
        return super().blend(call, new / 2, old)


class LateClipping(Layer):
    """From step 201 on a batch's variance is clipped by the running one. BVLC/caffe#3963 (NVCaffe)."""

    def __init__(self) -> None:
        """Before the first step."""
        self._step = 0

    def average(self, call: Call, mean: Array, var: Array) -> tuple[Array, Array]:
        """To four times it at most."""
        self._step += 1
        if self._step > 200:
            var = np.minimum(var, 4 * call.running_var.astype(var.dtype))
        return super().average(call, mean, var)


class RunningFloor(Layer):
    """The running variance is kept above 1e-5. Cf. tensorflow/tensorflow#3290."""

    def average(self, call: Call, mean: Array, var: Array) -> tuple[Array, Array]:
        """Clamps."""
        new_mean, new_var = super().average(call, mean, var)
        return new_mean, np.maximum(new_var, 1e-5)


class BesselOnMean(Layer):
    """The running mean is corrected, too. Cf. tinygrad/tinygrad#807."""

    def average(self, call: Call, mean: Array, var: Array) -> tuple[Array, Array]:
        """By n / (n - 1)."""
        return super().average(call, mean * (call.n / max(call.n - 1, 1)), var)


class ReturnedUnbiased(Layer):
    """The batch variance that is handed out is the unbiased one. Cf. pytorch/pytorch#77427."""

    def apply(self, call: Call) -> dict[str, Any]:
        """n / (n - 1) times as large."""
        outputs = super().apply(call)
        if "batch_var" in outputs:
            outputs["batch_var"] = outputs["batch_var"] * (call.n / max(call.n - 1, 1))
        return outputs

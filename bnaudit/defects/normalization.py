"""Faults between the statistics and y: eps, the affine step, rounding, the mode."""

from __future__ import annotations

from typing import Any

import numpy as np

from bnaudit.defects.layer import Array, Call, Layer
from bnaudit.defects.statistics import is_half

# --- eps --------------------------------------------------------------------------------------------


class EpsMissing(Layer):
    """eps is not added. Cf. chainer/chainer#2214."""

    def invstd(self, call: Call, var: Array) -> Array:
        """1 / sqrt(var)."""
        return 1 / np.sqrt(var)


class EpsMissingInInference(Layer):
    """eps is not added to the running variance. chainer/chainer#2214."""

    def invstd(self, call: Call, var: Array) -> Array:
        """1 / sqrt(var) in inference."""
        return super().invstd(call, var) if call.training else 1 / np.sqrt(var)


class EpsOutsideRoot(Layer):
    """eps is added to the standard deviation. Tencent/ncnn#311, keras-team/keras#8726."""

    def invstd(self, call: Call, var: Array) -> Array:
        """1 / (sqrt(var) + eps)."""
        return 1 / (np.sqrt(var) + call.eps)


class EpsTwice(Layer):
    """eps is added to a variance that has it already. Cf. keras-team/keras-contrib#287."""

    def invstd(self, call: Call, var: Array) -> Array:
        """1 / sqrt(var + 2 eps)."""
        return 1 / np.sqrt(var + 2 * call.eps)


class EpsClamped(Layer):
    """eps is raised to cuDNN's former minimum. tensorflow/tensorflow#37768."""

    def invstd(self, call: Call, var: Array) -> Array:
        """At least 1e-5."""
        return 1 / np.sqrt(var + max(call.eps, 1e-5))


class EpsFixed(Layer):
    """eps is 1e-5 whatever the caller says. PaddlePaddle/Paddle#5692."""

    def invstd(self, call: Call, var: Array) -> Array:
        """A constant."""
        return 1 / np.sqrt(var + 1e-5)


class EpsInHalf(Layer):
    """eps is added in 16 bits, and lost beside the variance. Cf. microsoft/tensorflow-directml-plugin#321."""

    def invstd(self, call: Call, var: Array) -> Array:
        """In the dtype of x."""
        dtype = call.x.dtype.type
        return 1 / np.sqrt((var.astype(dtype) + dtype(call.eps)).astype(var.dtype))


class EpsInFloat16(Layer):
    """eps is passed on as a float16, where 1e-8 is 0 and 1e-5 is 1.0014e-5. Cf. keras-team/keras-core#412."""

    def invstd(self, call: Call, var: Array) -> Array:
        """Rounds eps only."""
        return 1 / np.sqrt(var + np.float64(np.float16(call.eps)))


class EpsInFloat32(Layer):
    """eps of a float64 layer is a float32. Cf. tensorflow/tensorflow#33365."""

    def invstd(self, call: Call, var: Array) -> Array:
        """Rounds eps only."""
        return 1 / np.sqrt(var + np.float64(np.float32(call.eps)))


class EpsPerElement(Layer):
    """eps is added to the sum of squares instead of to its mean. Cf. keras-team/keras-contrib#287."""

    def invstd(self, call: Call, var: Array) -> Array:
        """eps / n."""
        return 1 / np.sqrt(var + call.eps / max(call.n, 1))


class EpsAsMaximum(Layer):
    """The larger of variance and eps, not their sum. Cf. tensorflow/tensorflow#3290."""

    def invstd(self, call: Call, var: Array) -> Array:
        """Takes the maximum."""
        return 1 / np.sqrt(np.maximum(var, call.eps))


class SquareForRoot(Layer):
    """Divides by the square of the variance. jax-ml/jax#442."""

    def invstd(self, call: Call, var: Array) -> Array:
        """1 / (var + eps)²."""
        return 1 / np.square(var + call.eps)


class NoRoot(Layer):
    """Divides by the variance, as a documentation had it. tensorflow/tensorflow#48039."""

    def invstd(self, call: Call, var: Array) -> Array:
        """1 / (var + eps)."""
        return 1 / (var + call.eps)


class ApproximateRoot(Layer):
    """A reciprocal square root of 12 bits, never refined. Tencent/ncnn#6903, pytorch/pytorch#47478."""

    def invstd(self, call: Call, var: Array) -> Array:
        """Keeps 12 bits."""
        exact = super().invstd(call, var)
        mantissa, exponent = np.frexp(exact)
        return np.ldexp(np.round(mantissa * 4096) / 4096, exponent)


class SixteenBitInvstd(Layer):
    """1 / sqrt(var + eps) is stored in the activations' dtype. Cf. Oneflow-Inc/oneflow#9388."""

    def invstd(self, call: Call, var: Array) -> Array:
        """Rounds."""
        return super().invstd(call, var).astype(call.x.dtype).astype(var.dtype)


# --- the affine step --------------------------------------------------------------------------------


class AffineFolding(Layer):
    """y = x a + (b - m a) with a fused product, which cancels. fastmachinelearning/hls4ml#142."""

    modes: tuple[bool, ...] = (True, False)

    def normalize(self, call: Call, rows: Array, mean: Array, invstd: Array) -> Array:
        """One product and one sum, fused: only the shift has been rounded."""
        if call.training not in self.modes:
            return super().normalize(call, rows, mean, invstd)
        dtype = call.statistics_dtype
        scale = (invstd * self.weight(call, rows)).astype(dtype)
        shift = self.bias(call, rows).astype(dtype) - mean.astype(dtype) * scale
        return rows * scale.astype(rows.dtype)[:, None] + shift.astype(rows.dtype)[:, None]


class InferenceFolding(AffineFolding):
    """The same in inference only. Cf. fastmachinelearning/hls4ml#142."""

    modes = (False,)


class SixteenBitFolding(Layer):
    """The folded scale and shift are stored in the activations' 16 bits. Cf. tetherto/qvac#2535."""

    def normalize(self, call: Call, rows: Array, mean: Array, invstd: Array) -> Array:
        """Rounds both."""
        dtype = call.x.dtype if is_half(call) else call.statistics_dtype
        weight = self.weight(call, rows)
        scale = (invstd * weight).astype(dtype).astype(rows.dtype)
        shift = (self.bias(call, rows) - mean * invstd * weight).astype(dtype).astype(rows.dtype)
        return rows * scale[:, None] + shift[:, None]


class SixteenBitArithmetic(Layer):
    """Subtraction, product and sum in 16 bits. Cf. tracel-ai/burn#4769."""

    def normalize(self, call: Call, rows: Array, mean: Array, invstd: Array) -> Array:
        """In the dtype of x."""
        if not is_half(call):
            return super().normalize(call, rows, mean, invstd)
        dtype = call.x.dtype
        weight, bias = self.weight(call, rows).astype(dtype), self.bias(call, rows).astype(dtype)
        xhat = (rows.astype(dtype) - mean.astype(dtype)[:, None]) * invstd.astype(dtype)[:, None]
        return xhat * weight[:, None] + bias[:, None]


class AbsoluteWeight(Layer):
    """|weight| in place of weight. mapillary/inplace_abn#92."""

    def weight(self, call: Call, rows: Array) -> Array:
        """Without its sign."""
        return np.abs(super().weight(call, rows))


class PaddedWeight(Layer):
    """|weight| + eps keeps the layer invertible, and adds to a weight of 0. juntang-zhuang/ShelfNet#16."""

    def weight(self, call: Call, rows: Array) -> Array:
        """The sign is kept."""
        weight = super().weight(call, rows)
        return np.copysign(np.abs(weight) + call.eps, weight)


class FixedWeight(Layer):
    """The weight counts as 1. apache/mxnet#9624, apache/mxnet#1599."""

    def weight(self, call: Call, rows: Array) -> Array:
        """Ones."""
        return np.ones(call.channels, rows.dtype)


class ZeroCenteredWeight(Layer):
    """The weight is stored less 1, and 1 is added. Cf. apache/mxnet#3037."""

    def weight(self, call: Call, rows: Array) -> Array:
        """1 more, where there is a weight."""
        weight = super().weight(call, rows)
        return weight if call.weight is None else weight + 1


class ScalarWeight(Layer):
    """The first channel's weight is used for all. Cf. tensorlayer/TensorLayer#963."""

    def weight(self, call: Call, rows: Array) -> Array:
        """Repeats it."""
        return np.full_like(super().weight(call, rows), super().weight(call, rows)[0])


class ScalarBias(Layer):
    """The first channel's bias is used for all. Cf. tensorlayer/TensorLayer#963."""

    def bias(self, call: Call, rows: Array) -> Array:
        """Repeats it."""
        return np.full_like(super().bias(call, rows), super().bias(call, rows)[0])


class SixteenBitParameters(Layer):
    """float32 parameters are cast to the activations' dtype. Cf. keras-team/keras#9582."""

    def weight(self, call: Call, rows: Array) -> Array:
        """Rounds."""
        return super().weight(call, rows).astype(call.x.dtype).astype(rows.dtype)

    def bias(self, call: Call, rows: Array) -> Array:
        """Rounds."""
        return super().bias(call, rows).astype(call.x.dtype).astype(rows.dtype)


class MissingAffine(Layer):
    """Without weight and bias nothing is normalized. Cf. intel/ipex-llm#2012."""

    def normalize(self, call: Call, rows: Array, mean: Array, invstd: Array) -> Array:
        """Returns x."""
        return rows if call.weight is None else super().normalize(call, rows, mean, invstd)


class BiasBeforeWeight(Layer):
    """(xhat + bias) weight. Cf. sony/nnabla#379."""

    def normalize(self, call: Call, rows: Array, mean: Array, invstd: Array) -> Array:
        """In the wrong order."""
        xhat = (rows - mean[:, None]) * invstd[:, None]
        return (xhat + self.bias(call, rows)[:, None]) * self.weight(call, rows)[:, None]


class ZeroWeightSkipped(Layer):
    """Channels of weight 0 are pruned with their bias. Cf. tenstorrent/tt-metal#5317."""

    def normalize(self, call: Call, rows: Array, mean: Array, invstd: Array) -> Array:
        """0 there."""
        y = super().normalize(call, rows, mean, invstd)
        return np.where(self.weight(call, rows)[:, None] == 0, 0.0, y)


class WeightAlongRows(Layer):
    """Parameters are broadcast along a last axis as long as the channels. tensorlayer/TensorLayer#963."""

    def normalize(self, call: Call, rows: Array, mean: Array, invstd: Array) -> Array:
        """NumPy's own broadcasting."""
        y = super().normalize(call, rows, mean, invstd)
        if call.x.ndim < 3 or call.x.shape[-1] != call.channels:
            return y
        xhat = ((rows - mean[:, None]) * invstd[:, None]).reshape(-1, call.channels)
        y = xhat * self.weight(call, rows) + self.bias(call, rows)
        return y.reshape(rows.shape)


# --- rounding and range -----------------------------------------------------------------------------


class TruncatedOutput(Layer):
    """y is cut to bfloat16 instead of rounded. tenstorrent/tt-metal#19882, tinygrad/tinygrad#11848."""

    def write(self, call: Call, rows: Array) -> Array:
        """Drops the lower half of a float32."""
        if call.x.dtype.name != "bfloat16":
            return super().write(call, rows)
        bits = rows.astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)
        return super().write(call, bits.view(np.float32))


class TruncatedFloat16(Layer):
    """y is cut to float16 instead of rounded. Cf. zilliztech/knowhere#529."""

    def write(self, call: Call, rows: Array) -> Array:
        """Rounds towards zero."""
        y = super().write(call, rows)
        if call.x.dtype != np.float16:
            return y
        exact = super().write(_as(call, np.float64), rows)
        larger = np.abs(y.astype(np.float64)) > np.abs(exact)
        return np.where(larger, np.nextafter(y, np.float16(0)), y)


def _as(call: Call, dtype: Any) -> Call:
    """The call, with an x of another dtype."""
    return Call(
        call.x.astype(dtype),
        call.weight,
        call.bias,
        call.running_mean,
        call.running_var,
        call.training,
        call.momentum,
        call.eps,
    )


class Bfloat16Output(Layer):
    """float32 outputs pass through a bfloat16 buffer. Cf. pytorch/pytorch#53635."""

    def write(self, call: Call, rows: Array) -> Array:
        """Keeps 8 bits, rounded."""
        if call.x.dtype != np.float32:
            return super().write(call, rows)
        bits = rows.astype(np.float32).view(np.uint32) + np.uint32(0x8000)
        return super().write(call, (bits & np.uint32(0xFFFF0000)).view(np.float32))


class Float16Range(Layer):
    """Intermediates are clamped to float16's range. Cf. nntrainer/nntrainer#3935."""

    def normalize(self, call: Call, rows: Array, mean: Array, invstd: Array) -> Array:
        """Of x."""
        return super().normalize(call, np.clip(rows, -65504, 65504), mean, invstd)


class FlushedOutput(Layer):
    """Results below float32's normal range are flushed. apache/mxnet#19361."""

    def normalize(self, call: Call, rows: Array, mean: Array, invstd: Array) -> Array:
        """Of the deviation, before it is scaled."""
        deviations = rows - mean[:, None]
        deviations = np.where(np.abs(deviations) < np.finfo(np.float32).tiny, 0.0, deviations)
        xhat = deviations * invstd[:, None]
        return xhat * self.weight(call, rows)[:, None] + self.bias(call, rows)[:, None]


class ClippedOutput(Layer):
    """xhat is clipped to ten standard deviations. Cf. BVLC/caffe#3963 (NVCaffe)."""

    def normalize(self, call: Call, rows: Array, mean: Array, invstd: Array) -> Array:
        """Before the affine step."""
        xhat = np.clip((rows - mean[:, None]) * invstd[:, None], -10, 10)
        return xhat * self.weight(call, rows)[:, None] + self.bias(call, rows)[:, None]


class ConstantSkipped(Layer):
    """A channel of variance 0 is left as it is. Cf. PaddlePaddle/Paddle#11445."""

    def normalize(self, call: Call, rows: Array, mean: Array, invstd: Array) -> Array:
        """Returns x there."""
        y = super().normalize(call, rows, mean, invstd)
        constant = call.training & (rows == rows[:, :1]).all(axis=1)
        return np.where(constant[:, None], rows, y)


# --- the mode ---------------------------------------------------------------------------------------


class BatchStatisticsInInference(Layer):
    """The batch's statistics are used in inference. arahusky/Tensorflow-Segmentation#15."""

    def used(self, call: Call, rows: Array, mean: Array, var: Array) -> tuple[Array, Array]:
        """Always this batch's."""
        return (mean, var) if call.training or call.n == 0 else self.statistics(call, rows)


class RunningStatisticsInTraining(Layer):
    """The running statistics are used in training. gbup-group/IEBN#3."""

    def used(self, call: Call, rows: Array, mean: Array, var: Array) -> tuple[Array, Array]:
        """Always the old averages."""
        return self.running(call, rows)


class UpdatedBeforeUse(Layer):
    """Training normalizes with the running statistics after their update. Cf. apache/mxnet#9216."""

    def used(self, call: Call, rows: Array, mean: Array, var: Array) -> tuple[Array, Array]:
        """The new averages."""
        training = call.training and call.n > 0
        return self.average(call, mean, var) if training else (mean, var)


class InitialStatisticsInInference(Layer):
    """Inference sees 0 and 1 instead of what was learnt. LaurentMazare/tch-rs#628."""

    def used(self, call: Call, rows: Array, mean: Array, var: Array) -> tuple[Array, Array]:
        """The initial values."""
        return (mean, var) if call.training else (np.zeros_like(mean), np.ones_like(var))


class InferenceRescaled(Layer):
    """The running variance is corrected for n again in inference. Cf. pytorch/pytorch#77427."""

    def used(self, call: Call, rows: Array, mean: Array, var: Array) -> tuple[Array, Array]:
        """n / (n - 1)."""
        return (mean, var) if call.training else (mean, var * (call.n / max(call.n - 1, 1)))


class InvstdForVariance(Layer):
    """The running variance is read as 1 / sqrt(var + eps). apache/mxnet#3091, soumith/cudnn.torch#109."""

    def invstd(self, call: Call, var: Array) -> Array:
        """Taken as it is, in inference."""
        return super().invstd(call, var) if call.training else var


class ZeroVarianceInInference(Layer):
    """A running variance of 0 gives an invstd of 0. Cf. BVLC/caffe#3963."""

    def invstd(self, call: Call, var: Array) -> Array:
        """0 there."""
        return np.where((var == 0) & (not call.training), 0.0, super().invstd(call, var))


class SingleElement(Layer):
    """With one element per channel y is x. PaddlePaddle/Paddle#11445."""

    def normalize(self, call: Call, rows: Array, mean: Array, invstd: Array) -> Array:
        """Skipped."""
        alone = call.n == 1 and call.training
        return rows if alone else super().normalize(call, rows, mean, invstd)


class SingleElementInference(Layer):
    """With one element per channel training uses running statistics. pyg-team/pytorch_geometric#5530."""

    def used(self, call: Call, rows: Array, mean: Array, var: Array) -> tuple[Array, Array]:
        """As in inference."""
        return self.running(call, rows) if call.n == 1 else (mean, var)


class SingleImageInference(Layer):
    """A batch of one image is taken for inference. Cf. pyg-team/pytorch_geometric#5530."""

    def used(self, call: Call, rows: Array, mean: Array, var: Array) -> tuple[Array, Array]:
        """As in inference."""
        return self.running(call, rows) if call.x.shape[0] == 1 else (mean, var)


class EpsFalsy(Layer):
    """An eps of 0 is taken for none given, and becomes 1e-5. Cf. PaddlePaddle/Paddle#5692."""

    def invstd(self, call: Call, var: Array) -> Array:
        """`eps or 1e-5`."""
        return 1 / np.sqrt(var + (call.eps or 1e-5))


class BiasTwice(Layer):
    """The bias is added by two of the fused operators. Cf. microsoft/onnxscript#3027."""

    def bias(self, call: Call, rows: Array) -> Array:
        """2 bias."""
        return 2 * super().bias(call, rows)


class WeightTwice(Layer):
    """The weight is applied by two of the fused operators. Cf. microsoft/onnxscript#3027."""

    def normalize(self, call: Call, rows: Array, mean: Array, invstd: Array) -> Array:
        """weight² xhat + bias."""
        return super().normalize(call, rows, mean, invstd * self.weight(call, rows))


class OutputRelu(Layer):
    """An activation is fused where none was asked for. Cf. mapillary/inplace_abn#116."""

    def normalize(self, call: Call, rows: Array, mean: Array, invstd: Array) -> Array:
        """Nothing below 0."""
        return np.maximum(super().normalize(call, rows, mean, invstd), 0)


class SixteenBitInference(SixteenBitArithmetic):
    """Inference computes in 16 bits, training does not. Cf. tracel-ai/burn#4769."""

    def normalize(self, call: Call, rows: Array, mean: Array, invstd: Array) -> Array:
        """As in training otherwise."""
        own = Layer if call.training else SixteenBitArithmetic
        return own.normalize(self, call, rows, mean, invstd)


class SixteenBitRunningStatistics(Layer):
    """Inference casts the running statistics to the activations' dtype. Cf. Oneflow-Inc/oneflow#9388."""

    def used(self, call: Call, rows: Array, mean: Array, var: Array) -> tuple[Array, Array]:
        """Rounds."""
        if call.training:
            return mean, var
        with np.errstate(over="ignore"):
            dtype = call.x.dtype
            return mean.astype(dtype).astype(mean.dtype), var.astype(dtype).astype(var.dtype)


class WrongInvstd(Layer):
    """The 1 / sqrt(var + eps) that is handed out lacks eps. Cf. apache/mxnet#9216."""

    def apply(self, call: Call) -> dict[str, Any]:
        """y is right."""
        outputs = super().apply(call)
        if "batch_var" in outputs:
            with np.errstate(divide="ignore"):
                outputs["invstd"] = 1 / np.sqrt(outputs["batch_var"])
        return outputs


class EpsClampedInInference(EpsClamped):
    """Inference raises eps to cuDNN's former minimum. chainer/chainer#5232, tensorflow/tensorflow#37768."""

    def invstd(self, call: Call, var: Array) -> Array:
        """At least 1e-5."""
        return Layer.invstd(self, call, var) if call.training else super().invstd(call, var)


class ParametersDecide(SixteenBitArithmetic):
    """Where the parameters have 16 bits all arithmetic has. Cf. keras-team/keras-core#412."""

    def normalize(self, call: Call, rows: Array, mean: Array, invstd: Array) -> Array:
        """Elsewhere it is right."""
        half = call.running_mean.dtype.itemsize == 2
        return (SixteenBitArithmetic if half else Layer).normalize(self, call, rows, mean, invstd)


class PlainFolding(Layer):
    """y = x a + (b - m a), each step rounded: the bias is lost beside m a. fastmachinelearning/hls4ml#142."""

    modes: tuple[bool, ...] = (True, False)

    def normalize(self, call: Call, rows: Array, mean: Array, invstd: Array) -> Array:
        """In the statistics dtype."""
        if call.training not in self.modes:
            return super().normalize(call, rows, mean, invstd)
        dtype = call.statistics_dtype
        scale = (invstd * self.weight(call, rows)).astype(dtype)
        shift = self.bias(call, rows).astype(dtype) - mean.astype(dtype) * scale
        return rows.astype(dtype) * scale[:, None] + shift[:, None]


class PlainFoldingInInference(PlainFolding):
    """The same in inference only. Cf. fastmachinelearning/hls4ml#142."""

    modes = (False,)


class SaturatedOutput(Layer):
    """float16 outputs beyond its range end at 65504 instead of infinity. Cf. nntrainer/nntrainer#3935."""

    def write(self, call: Call, rows: Array) -> Array:
        """Clips."""
        if call.x.dtype == np.float16:
            rows = np.clip(rows, -65504, 65504)
        return super().write(call, rows)


class Float32Parameters(Layer):
    """weight and bias of a float64 layer are float32. Cf. tensorflow/tensorflow#33365."""

    def weight(self, call: Call, rows: Array) -> Array:
        """Rounds."""
        return super().weight(call, rows).astype(np.float32).astype(rows.dtype)

    def bias(self, call: Call, rows: Array) -> Array:
        """Rounds."""
        return super().bias(call, rows).astype(np.float32).astype(rows.dtype)


class Float64InferenceAsFloat32(Layer):
    """Inference of float64 activations is in float32, training is not. Cf. tensorflow/tensorflow#33365."""

    def read(self, call: Call, tensor: Array) -> Array:
        """Rounds."""
        rows = super().read(call, tensor)
        return rows if call.training else rows.astype(np.float32).astype(rows.dtype)


class PlainFoldingInTraining(PlainFolding):
    """The same in training only. Cf. fastmachinelearning/hls4ml#142."""

    modes = (True,)


class EpsClampedInTraining(EpsClamped):
    """Training raises eps to cuDNN's former minimum. tensorflow/tensorflow#37768."""

    def invstd(self, call: Call, var: Array) -> Array:
        """At least 1e-5."""
        return super().invstd(call, var) if call.training else Layer.invstd(self, call, var)


class MissingAffineInInference(MissingAffine):
    """Inference without weight and bias normalizes nothing. Cf. intel/ipex-llm#2012."""

    def normalize(self, call: Call, rows: Array, mean: Array, invstd: Array) -> Array:
        """Training does."""
        own = Layer if call.training else MissingAffine
        return own.normalize(self, call, rows, mean, invstd)

"""Faults in the backward pass."""

from __future__ import annotations

from typing import Any

import numpy as np

from bnaudit.defects.layer import Array, Call, Layer, Outputs
from bnaudit.defects.statistics import is_half
from bnaudit.worker.backends._numpy import sequential


class TrainingBackwardInInference(Layer):
    """Inference subtracts what only training's grad_input lacks. pytorch/xla#913, pytorch/pytorch#586."""

    def input_gradient(self, call: Call, dy: Array, *rest: Any) -> Array:
        """As if mean and variance depended on x."""
        training = Call(**{**vars(call), "training": True})
        return super().input_gradient(training, dy, *rest)


class InferenceBackwardInTraining(Layer):
    """Mean and variance count as constants in training. facebookresearch/CrypTen#143."""

    def input_gradient(self, call: Call, dy: Array, *rest: Any) -> Array:
        """dy weight invstd."""
        inference = Call(**{**vars(call), "training": False})
        return super().input_gradient(inference, dy, *rest)


class BatchStatisticsInBackward(Layer):
    """The backward pass of inference uses the batch's statistics. torch/nn#768."""

    def backward(self, call: Call, rows: Array, dy: Array, mean: Array, invstd: Array) -> Outputs:
        """Those that training would have saved."""
        if not call.training and call.n:
            mean, var = self.statistics(call, rows)
            invstd = self.invstd(call, var)
        return super().backward(call, rows, dy, mean, invstd)


class RunningStatisticsInBackward(Layer):
    """The backward pass of training uses the running statistics. Cf. torch/nn#768."""

    def backward(self, call: Call, rows: Array, dy: Array, mean: Array, invstd: Array) -> Outputs:
        """Those of before."""
        mean, var = self.running(call, rows)
        return super().backward(call, rows, dy, mean, self.invstd(call, var))


class MeanTermMissing(Layer):
    """grad_input lacks the term of the mean. Cf. facebookresearch/CrypTen#143."""

    def input_gradient(
        self,
        call: Call,
        dy: Array,
        xhat: Array,
        grad_weight: Array,
        grad_bias: Array,
        invstd: Array,
    ) -> Array:
        """Without grad_bias."""
        return super().input_gradient(call, dy, xhat, grad_weight, 0 * grad_bias, invstd)


class VarianceTermMissing(Layer):
    """grad_input lacks the term of the variance. Cf. facebookresearch/CrypTen#143."""

    def input_gradient(
        self,
        call: Call,
        dy: Array,
        xhat: Array,
        grad_weight: Array,
        grad_bias: Array,
        invstd: Array,
    ) -> Array:
        """Without grad_weight."""
        return super().input_gradient(call, dy, xhat, 0 * grad_weight, grad_bias, invstd)


class UnequalRanksBackward(Layer):
    """Each rank divides the reduced sums by its own count. pytorch/pytorch#36382."""

    def input_gradient(
        self,
        call: Call,
        dy: Array,
        xhat: Array,
        grad_weight: Array,
        grad_bias: Array,
        invstd: Array,
    ) -> Array:
        """Half of the true terms, as with twice the count."""
        return super().input_gradient(call, dy, xhat, grad_weight / 2, grad_bias / 2, invstd)


class UnbiasedBackward(Layer):
    """The backward pass divides by n - 1. Cf. pytorch/pytorch#1410."""

    def input_gradient(
        self,
        call: Call,
        dy: Array,
        xhat: Array,
        grad_weight: Array,
        grad_bias: Array,
        invstd: Array,
    ) -> Array:
        """In the term of the variance."""
        factor = call.n / max(call.n - 1, 1)
        return super().input_gradient(call, dy, xhat, grad_weight * factor, grad_bias, invstd)


class WeightlessInputGradient(Layer):
    """grad_input lacks the weight. Cf. intel/ipex-llm#2012."""

    def input_gradient(self, call: Call, dy: Array, *rest: Any) -> Array:
        """As with ones."""
        ones = Call(**{**vars(call), "weight": None, "bias": None})
        return super().input_gradient(ones, dy, *rest)


class AbsoluteWeightBackward(Layer):
    """grad_input takes |weight|. Cf. mapillary/inplace_abn#92."""

    def input_gradient(self, call: Call, dy: Array, *rest: Any) -> Array:
        """The forward pass does not."""
        if call.weight is not None:
            call = Call(**{**vars(call), "weight": np.abs(call.weight)})
        return super().input_gradient(call, dy, *rest)


class InvertedOutput(Layer):
    """xhat is recovered from y as (y - bias) / weight. Cf. PaddlePaddle/Paddle#22806."""

    def backward(self, call: Call, rows: Array, dy: Array, mean: Array, invstd: Array) -> Outputs:
        """0 / 0 where the weight is 0."""
        weight, bias = self.weight(call, rows)[:, None], self.bias(call, rows)[:, None]
        y = self.normalize(call, rows, mean, invstd).astype(call.x.dtype).astype(rows.dtype)
        with np.errstate(invalid="ignore", divide="ignore"):
            xhat = (y - bias) / weight
        return super().backward(call, xhat / invstd[:, None] + mean[:, None], dy, mean, invstd)


class InvstdTwice(Layer):
    """The saved 1 / sqrt(var + eps) is taken for a variance. flagos-ai/FlagGems#5222."""

    def backward(self, call: Call, rows: Array, dy: Array, mean: Array, invstd: Array) -> Outputs:
        """rsqrt again."""
        return super().backward(call, rows, dy, mean, 1 / np.sqrt(invstd + call.eps))


class EpsMissingBackward(Layer):
    """The backward pass forms 1 / sqrt(var) without eps. Cf. chainer/chainer#2214."""

    def backward(self, call: Call, rows: Array, dy: Array, mean: Array, invstd: Array) -> Outputs:
        """Where var is not 0."""
        var = np.maximum(1 / np.square(invstd) - call.eps, 1e-300)
        return super().backward(call, rows, dy, mean, 1 / np.sqrt(var))


class WeightGradientOfProduct(Layer):
    """grad_weight as (Σ dy x - mean Σ dy) invstd in float32 cancels. Cf. tensorflow/tensorflow#118701."""

    def backward(self, call: Call, rows: Array, dy: Array, mean: Array, invstd: Array) -> Outputs:
        """One pass."""
        outputs = super().backward(call, rows, dy, mean, invstd)
        dtype = call.statistics_dtype
        product = (rows.astype(dtype) * dy.astype(dtype)).sum(axis=1)
        total = dy.astype(dtype).sum(axis=1)
        outputs["grad_weight"] = (product - mean.astype(dtype) * total) * invstd.astype(dtype)
        return outputs


class UnscaledWeightGradient(Layer):
    """grad_weight lacks invstd. Cf. pytorch/pytorch#175189."""

    def backward(self, call: Call, rows: Array, dy: Array, mean: Array, invstd: Array) -> Outputs:
        """Σ dy (x - mean)."""
        outputs = super().backward(call, rows, dy, mean, invstd)
        outputs["grad_weight"] = outputs["grad_weight"] / invstd
        return outputs


class MeanForSum(Layer):
    """grad_weight and grad_bias are means, not sums. Cf. pytorch/pytorch#36382."""

    def backward(self, call: Call, rows: Array, dy: Array, mean: Array, invstd: Array) -> Outputs:
        """Divides by n."""
        outputs = super().backward(call, rows, dy, mean, invstd)
        for name in ("grad_weight", "grad_bias"):
            outputs[name] = outputs[name] / max(call.n, 1)
        return outputs


class SerialGradientSum(Layer):
    """One float32 accumulator for the gradients' sums. Cf. pytorch/pytorch#121651."""

    def total(self, call: Call, rows: Array) -> Array:
        """From left to right."""
        if not call.n:
            return super().total(call, rows)
        return sequential(rows.astype(call.statistics_dtype)).astype(rows.dtype)


class SixteenBitGradientSum(Layer):
    """Gradients of 16-bit activations are summed in 16 bits. pytorch/pytorch#147303."""

    def total(self, call: Call, rows: Array) -> Array:
        """From left to right."""
        if not (is_half(call) and call.n):
            return super().total(call, rows)
        with np.errstate(over="ignore", invalid="ignore"):
            return sequential(rows.astype(call.x.dtype)).astype(rows.dtype)


class StridedSixteenBitGradientSum(SixteenBitGradientSum):
    """The same in a fallback for unusual strides only. pytorch/pytorch#147353."""

    def total(self, call: Call, rows: Array) -> Array:
        """Elsewhere in float64."""
        gaps = call.x.strides[-1] > call.x.itemsize and call.x.strides[1] > call.x.itemsize
        return super().total(call, rows) if gaps else Layer.total(self, call, rows)


class SixteenBitBiasGradient(Layer):
    """grad_bias is rounded to the activations' 16 bits. Cf. keras-team/keras#9687."""

    def backward(self, call: Call, rows: Array, dy: Array, mean: Array, invstd: Array) -> Outputs:
        """float32 was asked for."""
        outputs = super().backward(call, rows, dy, mean, invstd)
        with np.errstate(over="ignore"):
            outputs["grad_bias"] = outputs["grad_bias"].astype(call.x.dtype)
        return outputs


class Float32Gradients(Layer):
    """Gradients of float64 activations are formed in float32. Cf. tensorflow/tensorflow#33365."""

    def backward(self, call: Call, rows: Array, dy: Array, mean: Array, invstd: Array) -> Outputs:
        """All operands are rounded."""
        narrow = [part.astype(np.float32) for part in (rows, dy, mean, invstd)]
        return super().backward(call, *narrow)


class SixteenBitSavedMean(Layer):
    """The mean that is saved for the backward pass is stored in 16 bits. Cf. pytorch/pytorch#147303."""

    def backward(self, call: Call, rows: Array, dy: Array, mean: Array, invstd: Array) -> Outputs:
        """Rounded."""
        saved = mean.astype(call.x.dtype).astype(mean.dtype)
        return super().backward(call, rows, dy, saved, invstd)


class SixteenBitSavedInvstd(Layer):
    """invstd is saved for the backward pass in 16 bits. Cf. pytorch/pytorch#147303."""

    def backward(self, call: Call, rows: Array, dy: Array, mean: Array, invstd: Array) -> Outputs:
        """Rounded, or infinite."""
        with np.errstate(over="ignore"):
            saved = invstd.astype(call.x.dtype).astype(mean.dtype)
        return super().backward(call, rows, dy, mean, saved)


class SingleElementGradient(Layer):
    """With one element per channel grad_input is grad_output. Cf. PaddlePaddle/Paddle#11445."""

    def input_gradient(self, call: Call, dy: Array, *rest: Any) -> Array:
        """Passed on."""
        alone = call.n == 1 and call.training
        return dy if alone else super().input_gradient(call, dy, *rest)


class EmptyGradients(Layer):
    """An empty batch gives gradients of NaN. Cf. pytorch/pytorch#8933."""

    def total(self, call: Call, rows: Array) -> Array:
        """0 / 0."""
        return super().total(call, rows) * (1.0 if call.n else np.nan)


class AccumulatedGradients(Layer):
    """grad_weight is added to that of earlier steps. Cf. torch/nn#744."""

    def __init__(self) -> None:
        """Nothing yet."""
        self._sum: Any = 0.0

    def backward(self, call: Call, rows: Array, dy: Array, mean: Array, invstd: Array) -> Outputs:
        """Of a buffer that nobody clears."""
        outputs = super().backward(call, rows, dy, mean, invstd)
        outputs["grad_weight"] = self._sum = self._sum + outputs["grad_weight"]
        return outputs


class FrozenParameters(Layer):
    """Inference gives no gradients of weight and bias. Cf. pytorch/pytorch#10856."""

    def backward(self, call: Call, rows: Array, dy: Array, mean: Array, invstd: Array) -> Outputs:
        """Zeros."""
        outputs = super().backward(call, rows, dy, mean, invstd)
        if not call.training:
            outputs["grad_weight"] = 0 * outputs["grad_weight"]
            outputs["grad_bias"] = 0 * outputs["grad_bias"]
        return outputs


class BlockTailGradient(Layer):
    """The gradients' sums stop at the last full vector of 4. Cf. ROCm/rocm-libraries#6765."""

    def total(self, call: Call, rows: Array) -> Array:
        """The rest is lost, where there is a vector."""
        return super().total(call, rows[:, : call.n - call.n % 4 or call.n])


class LargeBatchGradient(Layer):
    """grad_input is right for up to 768 images. ROCm/MIOpen#1109."""

    def write_gradient(self, call: Call, rows: Array) -> Array:
        """0 behind them."""
        dx = super().write_gradient(call, rows)
        dx[768:] = 0
        return dx


class GradientWithoutAffine(Layer):
    """grad_input of a layer without parameters is grad_output itself. Cf. intel/ipex-llm#2012."""

    def input_gradient(self, call: Call, dy: Array, *rest: Any) -> Array:
        """Passed on."""
        if call.weight is None:
            return dy
        return super().input_gradient(call, dy, *rest)


class RoundedInputGradient(Layer):
    """grad_input of float32 activations passes through bfloat16. Cf. pytorch/pytorch#53635."""

    def write_gradient(self, call: Call, rows: Array) -> Array:
        """Keeps 8 bits."""
        if call.x.dtype != np.float32:
            return super().write_gradient(call, rows)
        bits = rows.astype(np.float32).view(np.uint32) + np.uint32(0x8000)
        return super().write_gradient(call, (bits & np.uint32(0xFFFF0000)).view(np.float32))


class TruncatedInputGradient(Layer):
    """grad_input is cut to bfloat16 instead of rounded. Cf. tenstorrent/tt-metal#19882."""

    def write_gradient(self, call: Call, rows: Array) -> Array:
        """Drops the lower half of a float32."""
        if call.x.dtype.name != "bfloat16":
            return super().write_gradient(call, rows)
        bits = rows.astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)
        return super().write_gradient(call, bits.view(np.float32))


class GradientOverflow(Layer):
    """Products of dy and xhat are formed in float16. Cf. pytorch/pytorch#147303."""

    def backward(self, call: Call, rows: Array, dy: Array, mean: Array, invstd: Array) -> Outputs:
        """Rounded before they are summed."""
        outputs = super().backward(call, rows, dy, mean, invstd)
        if call.x.dtype == np.float16:
            with np.errstate(over="ignore", invalid="ignore"):
                xhat = (rows - mean[:, None]) * invstd[:, None]
                products = (dy * xhat).astype(np.float16)
            outputs["grad_weight"] = products.astype(np.float64).sum(axis=1)
        return outputs


class SixteenBitBackward(Layer):
    """The backward pass of 16-bit activations computes in 16 bits. Cf. pytorch/pytorch#147303."""

    def backward(self, call: Call, rows: Array, dy: Array, mean: Array, invstd: Array) -> Outputs:
        """Activations that are centred, and products, are rounded."""
        if not is_half(call):
            return super().backward(call, rows, dy, mean, invstd)
        dtype = call.x.dtype
        xhat = ((rows - mean[:, None]).astype(dtype) * invstd.astype(dtype)[:, None]).astype(dtype)
        grad_bias, grad_weight = self.total(call, dy), (dy.astype(dtype) * xhat).astype(rows.dtype)
        total = self.total(call, grad_weight)
        n = max(call.n, 1)
        dx = dy.astype(dtype)
        if call.training:
            dx = dx - (grad_bias / n).astype(dtype)[:, None]
            dx = dx - xhat * (total / n).astype(dtype)[:, None]
        dx = dx * (invstd * self.weight(call, rows)).astype(dtype)[:, None]
        return {
            "grad_input": self.write_gradient(call, dx),
            "grad_weight": total,
            "grad_bias": grad_bias,
        }


class SwallowedNan(Layer):
    """Gradients that are NaN count as zero. Cf. KamitaniLab/bdpy#110."""

    def read_gradient(self, call: Call, tensor: Array) -> Array:
        """So that divergence is hidden."""
        rows = super().read_gradient(call, tensor)
        return np.where(np.isnan(rows), 0.0, rows)


class BiasGradientOfOutput(Layer):
    """grad_bias carries the weight. Cf. intel/ipex-llm#94."""

    def backward(self, call: Call, rows: Array, dy: Array, mean: Array, invstd: Array) -> Outputs:
        """weight Σ dy."""
        outputs = super().backward(call, rows, dy, mean, invstd)
        outputs["grad_bias"] = outputs["grad_bias"] * self.weight(call, rows)
        return outputs


class TransposedPlane(Layer):
    """Rows and columns of grad_output change places. Cf. pytorch/pytorch#64039."""

    def read_gradient(self, call: Call, tensor: Array) -> Array:
        """In memory, of rank 4."""
        if tensor.ndim == 4:
            tensor = np.ascontiguousarray(tensor.swapaxes(2, 3)).reshape(tensor.shape)
        return super().read_gradient(call, tensor)


class EpsTwiceBackward(Layer):
    """eps is added once more in the backward pass. Cf. flagos-ai/FlagGems#5222."""

    def backward(self, call: Call, rows: Array, dy: Array, mean: Array, invstd: Array) -> Outputs:
        """1 / sqrt(var + 2 eps)."""
        return super().backward(call, rows, dy, mean, 1 / np.sqrt(1 / np.square(invstd) + call.eps))


class LeakingNanGradient(Layer):
    """grad_weight by a matrix product over all channels: NaN leaks into each. Cf. areal-project/AReaL#1347."""

    def backward(self, call: Call, rows: Array, dy: Array, mean: Array, invstd: Array) -> Outputs:
        """The product of the sums with a unit matrix."""
        outputs = super().backward(call, rows, dy, mean, invstd)
        if call.channels <= 64:
            outputs["grad_weight"] = np.eye(call.channels) @ outputs["grad_weight"]
        return outputs

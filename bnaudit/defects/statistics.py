"""Faults in the batch's mean and variance."""

from __future__ import annotations

from typing import Any

import numpy as np

from bnaudit.defects.layer import Array, Call, Layer, blocks
from bnaudit.worker.backends._numpy import pairwise, sequential, welford_sequential


def single(call: Call, rows: Array) -> Array:
    """Rows in the statistics dtype."""
    return rows.astype(call.statistics_dtype)


def two_pass(rows: Array, mean: Array) -> Array:
    """The biased variance about a mean, in the dtype of rows."""
    var: Array = np.square(rows - mean[:, None]).mean(axis=1)
    return var


def is_half(call: Call) -> bool:
    """Whether the case has 16 bits."""
    return bool(call.x.dtype.itemsize == 2)


# --- arithmetic that is too poor --------------------------------------------------------------------


class PremultipliedMean(Layer):
    """Every element is multiplied by a rounded 1/n before it is added. BVLC/caffe#3963."""

    def statistics(self, call: Call, rows: Array) -> tuple[Array, Array]:
        """The mean in the statistics dtype."""
        rows = single(call, rows)
        mean = pairwise(rows * rows.dtype.type(1 / call.n))
        return mean, two_pass(rows, mean)


class OnePassVariance(Layer):
    """The variance as E[x²] - E[x]². tensorflow/tensorflow#118701, tenstorrent/tt-metal#45968."""

    def statistics(self, call: Call, rows: Array) -> tuple[Array, Array]:
        """Pairwise sums in the statistics dtype."""
        rows = single(call, rows)
        n = rows.dtype.type(call.n)
        mean = pairwise(rows) / n
        return mean, self.settle(pairwise(rows * rows) / n - mean * mean)

    def settle(self, var: Array) -> Array:
        """What becomes of a variance that may be negative."""
        return var


class ClippedOnePassVariance(OnePassVariance):
    """E[x²] - E[x]², where negative 0: finite, and as wrong. google/flax#1491."""

    def settle(self, var: Array) -> Array:
        """Clips."""
        return np.maximum(var, 0)


class AbsoluteOnePassVariance(OnePassVariance):
    """E[x²] - E[x]² without its sign. Cf. tensorflow/tensorflow#3290."""

    def settle(self, var: Array) -> Array:
        """Takes the absolute value."""
        return np.abs(var)


class SerialSum(Layer):
    """One accumulator in the statistics dtype for all of a channel. pytorch/pytorch#121651."""

    def statistics(self, call: Call, rows: Array) -> tuple[Array, Array]:
        """Two passes."""
        rows = single(call, rows)
        n = rows.dtype.type(call.n)
        mean = sequential(rows) / n
        return mean, sequential(np.square(rows - mean[:, None])) / n


class SerialWelford(Layer):
    """One Welford recurrence in the statistics dtype over all of a channel. tenstorrent/tt-metal#47791."""

    def statistics(self, call: Call, rows: Array) -> tuple[Array, Array]:
        """Those of a yardstick."""
        found: tuple[Any, Any] = welford_sequential.moments(single(call, rows))
        return found


class ShiftByFirst(Layer):
    """One pass over x - x₁, which helps unless x₁ is the outlier. Cf. tensorflow/tensorflow#3290."""

    def statistics(self, call: Call, rows: Array) -> tuple[Array, Array]:
        """In the statistics dtype."""
        rows = single(call, rows)
        n, first = rows.dtype.type(call.n), rows[:, 0]
        shifted = rows - first[:, None]
        mean = pairwise(shifted) / n
        return first + mean, pairwise(shifted * shifted) / n - mean * mean


class ShiftByRunningMean(Layer):
    """One pass about the running mean, which may be far from the batch's. Cf. tensorflow/tensorflow#3290."""

    def statistics(self, call: Call, rows: Array) -> tuple[Array, Array]:
        """In the statistics dtype."""
        rows = single(call, rows)
        n, shift = rows.dtype.type(call.n), call.running_mean.astype(rows.dtype)
        shifted = rows - shift[:, None]
        mean = pairwise(shifted) / n
        return shift + mean, pairwise(shifted * shifted) / n - mean * mean


class SixteenBitSum(Layer):
    """Sums of float16 or bfloat16 values kept in 16 bits. Cf. pytorch/pytorch#126525."""

    def statistics(self, call: Call, rows: Array) -> tuple[Array, Array]:
        """A tree of 16-bit additions."""
        if not is_half(call):
            return super().statistics(call, rows)
        mean = pairwise(rows.astype(call.x.dtype)).astype(rows.dtype) / call.n
        return mean, two_pass(rows, mean)


class SixteenBitSquares(Layer):
    """Deviations are squared before they are widened, and overflow at 256. Cf. nntrainer/nntrainer#3935."""

    def statistics(self, call: Call, rows: Array) -> tuple[Array, Array]:
        """The mean is right."""
        mean, var = super().statistics(call, rows)
        if is_half(call):
            deviations = (rows - mean[:, None]).astype(call.x.dtype)
            var = (deviations * deviations).astype(rows.dtype).mean(axis=1)
        return mean, var


class SixteenBitMean(Layer):
    """The mean is stored in the activations' 16 bits. Cf. Oneflow-Inc/oneflow#9388."""

    def statistics(self, call: Call, rows: Array) -> tuple[Array, Array]:
        """The variance is right."""
        mean, var = super().statistics(call, rows)
        return mean.astype(call.x.dtype).astype(rows.dtype), var


class SixteenBitVariance(Layer):
    """The variance is stored in the activations' 16 bits. Cf. microsoft/tensorflow-directml-plugin#321."""

    def statistics(self, call: Call, rows: Array) -> tuple[Array, Array]:
        """The mean is right."""
        mean, var = super().statistics(call, rows)
        return mean, var.astype(call.x.dtype).astype(rows.dtype)


class Float64AsFloat32(Layer):
    """float64 activations are normalized in float32. tensorflow/tensorflow#33365."""

    def read(self, call: Call, tensor: Array) -> Array:
        """Rounds to float32."""
        return super().read(call, tensor).astype(np.float32)


class OverflowingSquares(Layer):
    """Squares are formed in float32, and end at 1.8e19. pytorch/pytorch#178123."""

    def statistics(self, call: Call, rows: Array) -> tuple[Array, Array]:
        """The mean is right."""
        mean, _ = super().statistics(call, rows)
        deviations = (rows - mean[:, None]).astype(call.statistics_dtype)
        return mean, np.square(deviations).astype(rows.dtype).mean(axis=1)


class TensorFloat32(Layer):
    """Sums run through matrix units that keep 10 bits. pytorch/pytorch#53635, tenstorrent/tt-metal#47791."""

    def statistics(self, call: Call, rows: Array) -> tuple[Array, Array]:
        """Of values that are cut to TF32."""
        if call.x.dtype != np.float32:
            return super().statistics(call, rows)
        bits = rows.astype(np.float32).view(np.uint32)
        cut = ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)
        mean = cut.astype(np.float64).mean(axis=1)
        return mean, two_pass(rows, mean)


class FlushedSubnormals(Layer):
    """Subnormal activations count as zero. apache/mxnet#19361."""

    def read(self, call: Call, tensor: Array) -> Array:
        """Flushes."""
        rows = super().read(call, tensor)
        smallest = np.finfo(np.float64 if call.x.dtype == np.float64 else np.float32).tiny
        return np.where(np.abs(rows) < smallest, 0.0, rows)


class VarianceFloor(Layer):
    """Variances below 1e-8 are raised to it, whatever eps says. Cf. tensorflow/tensorflow#3290."""

    def statistics(self, call: Call, rows: Array) -> tuple[Array, Array]:
        """Clamps."""
        mean, var = super().statistics(call, rows)
        return mean, np.maximum(var, 1e-8)


class CompressedCount(Layer):
    """The count is kept in float16, and infinite from 65520 on. pytorch/pytorch#70901."""

    def statistics(self, call: Call, rows: Array) -> tuple[Array, Array]:
        """Of 16-bit cases."""
        if not is_half(call):
            return super().statistics(call, rows)
        with np.errstate(over="ignore"):
            n = np.float64(np.float16(call.n))
        mean = rows.sum(axis=1) / n
        return mean, np.square(rows - mean[:, None]).sum(axis=1) / n


class ShortCount(Layer):
    """The count is kept in an unsigned 16-bit integer. Cf. pytorch/pytorch#70901."""

    def statistics(self, call: Call, rows: Array) -> tuple[Array, Array]:
        """Wraps around."""
        n = call.n & 0xFFFF or 1
        mean = rows.sum(axis=1) / n
        return mean, np.square(rows - mean[:, None]).sum(axis=1) / n


# --- the wrong elements -----------------------------------------------------------------------------


class UnbiasedNormalization(Layer):
    """Normalizes with the unbiased variance. pytorch/pytorch#1410, sony/nnabla#379."""

    def statistics(self, call: Call, rows: Array) -> tuple[Array, Array]:
        """Divides by n - 1."""
        mean, var = super().statistics(call, rows)
        return mean, var * (call.n / max(call.n - 1, 1))


class BlockTail(Layer):
    """The sum stops at the last full block of 256. Cf. NVIDIA/apex#1768."""

    length = 256

    def statistics(self, call: Call, rows: Array) -> tuple[Array, Array]:
        """Leaves out what is behind it, where there is a block at all."""
        whole = call.n - call.n % self.length or call.n
        return super().statistics(call, rows[:, :whole])


class VectorTail(BlockTail):
    """The sum stops at the last full vector of 4. Cf. ROCm/rocm-libraries#6765."""

    length = 4


class FirstElements(Layer):
    """Elements beyond the first 65536 of a channel are not summed. Cf. torch/cunn#298."""

    limit = 65536

    def statistics(self, call: Call, rows: Array) -> tuple[Array, Array]:
        """Of the first ones."""
        return super().statistics(call, rows[:, : self.limit])


class OneBlock(FirstElements):
    """Elements beyond the first 1024 of a channel, a block's threads, are not summed. Cf. ROCm/MIOpen#1109."""

    limit = 1024


class ZeroPadding(Layer):
    """Blocks of 32 are padded with zeros that count in the variance. pytorch/helion#3268."""

    def statistics(self, call: Call, rows: Array) -> tuple[Array, Array]:
        """(0 - mean)² is added for each."""
        mean, var = super().statistics(call, rows)
        missing = -call.n % 32
        return mean, var + np.square(mean) * missing / call.n


class MeanOfMeans(Layer):
    """Ranks with unequal shares of a batch count alike. PaddlePaddle/Paddle#32464."""

    def statistics(self, call: Call, rows: Array) -> tuple[Array, Array]:
        """Two thirds of the elements on one rank, the rest on another."""
        share = -(-2 * call.n // 3)
        parts = [part for part in (rows[:, :share], rows[:, share:]) if part.shape[1]]
        mean = np.mean([part.mean(axis=1) for part in parts], axis=0)
        square = np.mean([np.square(part - mean[:, None]).mean(axis=1) for part in parts], axis=0)
        return mean, square


class MeanOfVariances(Layer):
    """Merged variances lack the distance between the means. Cf. pytorch/pytorch#22192."""

    def statistics(self, call: Call, rows: Array) -> tuple[Array, Array]:
        """Weighted by their counts, in blocks of half a channel."""
        mean, _ = super().statistics(call, rows)
        parts = blocks(rows, -(-call.n // 2))
        return mean, sum(part.var(axis=1) * part.shape[1] for part in parts) / call.n


class EqualBlocks(Layer):
    """A merge of blocks of 64 takes the last one for full. Cf. tenstorrent/tt-metal#50624."""

    def statistics(self, call: Call, rows: Array) -> tuple[Array, Array]:
        """The mean of the blocks' means, where there are several."""
        parts = blocks(rows, 64)
        mean = np.mean([part.mean(axis=1) for part in parts], axis=0)
        return mean, two_pass(rows, mean)


class PerImage(Layer):
    """Each image is normalized by itself. Cf. sonos/tract#2863."""

    def normalize(self, call: Call, rows: Array, mean: Array, invstd: Array) -> Array:
        """Instance normalization, in training."""
        if not call.training or call.n == 0:
            return super().normalize(call, rows, mean, invstd)
        images = rows.reshape(call.channels, call.x.shape[0], -1)
        own = images.mean(axis=2, keepdims=True)
        scale = 1 / np.sqrt(images.var(axis=2, keepdims=True) + call.eps)
        xhat = ((images - own) * scale).reshape(rows.shape)
        return xhat * self.weight(call, rows)[:, None] + self.bias(call, rows)[:, None]


class SkippedNan(Layer):
    """NaN elements are left out of the statistics, so that divergence is hidden. Cf. KamitaniLab/bdpy#110."""

    def statistics(self, call: Call, rows: Array) -> tuple[Array, Array]:
        """Counts zeros instead."""
        return super().statistics(call, np.where(np.isnan(rows), 0.0, rows))


class ClampedInfinity(Layer):
    """Infinite elements count as the largest finite number. Cf. KamitaniLab/bdpy#110."""

    def statistics(self, call: Call, rows: Array) -> tuple[Array, Array]:
        """Clamps."""
        largest = float(np.finfo(np.float32).max)
        return super().statistics(call, np.clip(rows, -largest, largest))


class LeakingNan(Layer):
    """A matrix product over all channels: 0 times NaN leaks into each. Cf. areal-project/AReaL#1347."""

    def statistics(self, call: Call, rows: Array) -> tuple[Array, Array]:
        """The product of the sums with a unit matrix."""
        mean, var = super().statistics(call, rows)
        unit = np.eye(call.channels) if call.channels <= 64 else None
        return (mean, var) if unit is None else (unit @ mean, unit @ var)


class StaleStatistics(Layer):
    """The statistics of the step before are used. Cf. apache/mxnet#9216."""

    def __init__(self) -> None:
        """No step was before the first."""
        self._last: tuple[Array, Array] | None = None

    def statistics(self, call: Call, rows: Array) -> tuple[Array, Array]:
        """This batch's in the first step."""
        last, self._last = self._last, super().statistics(call, rows)
        return last or self._last


class FixedMomentsByRunning(Layer):
    """The variance is taken about the running mean. Cf. mlpack/mlpack#1275."""

    def statistics(self, call: Call, rows: Array) -> tuple[Array, Array]:
        """The mean is right."""
        mean, _ = super().statistics(call, rows)
        return mean, two_pass(rows, call.running_mean.astype(rows.dtype))


class EmptyBatch(Layer):
    """An empty batch divides by zero, and poisons the running statistics. google-deepmind/sonnet#125."""

    def apply(self, call: Call) -> dict[str, Any]:
        """NaN."""
        outputs = super().apply(call)
        if call.n == 0 and call.training:
            outputs["running_mean"] = outputs["running_mean"] * np.nan
            outputs["running_var"] = outputs["running_var"] * np.nan
        return outputs


class EmptyBatchDecays(Layer):
    """An empty batch counts as one of zeros. pytorch/pytorch#12013."""

    def apply(self, call: Call) -> dict[str, Any]:
        """Zeros are averaged in."""
        outputs = super().apply(call)
        if call.n == 0 and call.training:
            outputs["running_var"] = outputs["running_var"] * (1 - call.momentum)
        return outputs


class SplitTail(BlockTail):
    """A long channel is split into eighths, and what is left over is lost. Cf. ROCm/rocm-libraries#6765."""

    def statistics(self, call: Call, rows: Array) -> tuple[Array, Array]:
        """From 4096 elements on."""
        whole = call.n - call.n % 8 if call.n >= 4096 else call.n
        return Layer.statistics(self, call, rows[:, :whole])


class GhostBatch(Layer):
    """A batch is normalized 32 images at a time. Cf. run-ai/runai#14."""

    def normalize(self, call: Call, rows: Array, mean: Array, invstd: Array) -> Array:
        """Each part by itself, in training."""
        images = call.x.shape[0]
        if not call.training or images <= 32:
            return super().normalize(call, rows, mean, invstd)
        parts = []
        for part in blocks(rows, 32 * (call.n // images)):
            own, var = super().statistics(call, part)
            parts.append(super().normalize(call, part, own, self.invstd(call, var)))
        return np.concatenate(parts, axis=1)


class RelativeFloor(Layer):
    """Variances below a millionth of the mean's square count as rounding. Cf. tensorflow/tensorflow#3290."""

    def statistics(self, call: Call, rows: Array) -> tuple[Array, Array]:
        """0 there."""
        mean, var = super().statistics(call, rows)
        return mean, np.where(var < 1e-6 * np.square(mean), 0.0, var)


class MeanOfMagnitudes(Layer):
    """The mean is that of |x|. Cf. tensorflow/tensorflow#3290."""

    def statistics(self, call: Call, rows: Array) -> tuple[Array, Array]:
        """The variance is right."""
        _, var = super().statistics(call, rows)
        return np.abs(rows).mean(axis=1), var


class Bfloat16AsFloat16(Layer):
    """bfloat16 activations pass through float16, which ends at 65504. Cf. tinygrad/tinygrad#11848."""

    def read(self, call: Call, tensor: Array) -> Array:
        """Rounds, or overflows."""
        if tensor.dtype.name != "bfloat16":
            return super().read(call, tensor)
        with np.errstate(over="ignore"):
            return super().read(call, tensor.astype(np.float32).astype(np.float16))


class Float16AsBfloat16(Layer):
    """float16 activations pass through bfloat16, which has 8 bits. Cf. tenstorrent/tt-metal#19882."""

    def read(self, call: Call, tensor: Array) -> Array:
        """Cuts."""
        if tensor.dtype != np.float16:
            return super().read(call, tensor)
        bits = np.ascontiguousarray(tensor.astype(np.float32)).view(np.uint32)
        return super().read(call, (bits & np.uint32(0xFFFF0000)).view(np.float32))


class FlushedHalf(Layer):
    """Subnormal float16 activations count as zero. Cf. apache/mxnet#19361."""

    def read(self, call: Call, tensor: Array) -> Array:
        """Below 6.1e-5."""
        rows = super().read(call, tensor)
        if tensor.dtype != np.float16:
            return rows
        return np.where(np.abs(rows) < 2.0**-14, 0.0, rows)


class OnePassInDouble(Layer):
    """float64 activations get the formula that float64 was to make safe. Cf. tensorflow/tensorflow#118701."""

    def statistics(self, call: Call, rows: Array) -> tuple[Array, Array]:
        """E[x²] - E[x]², of float64 only."""
        if call.x.dtype != np.float64:
            return super().statistics(call, rows)
        mean = rows.mean(axis=1)
        return mean, np.square(rows).mean(axis=1) - np.square(mean)


class SerialLanes(Layer):
    """512 accumulators in the statistics dtype, each with its share in turn. Cf. pytorch/pytorch#121651."""

    def statistics(self, call: Call, rows: Array) -> tuple[Array, Array]:
        """The mean; the variance about it is right."""
        narrow = single(call, rows)
        lanes = np.zeros((call.channels, 512), narrow.dtype)
        for part in blocks(narrow, 512):
            lanes[:, : part.shape[1]] += part
        mean = pairwise(lanes) / narrow.dtype.type(call.n)
        return mean, two_pass(rows, mean)


class CountInParameterDtype(Layer):
    """The count is kept in the dtype of the running statistics. pytorch/pytorch#70901."""

    def statistics(self, call: Call, rows: Array) -> tuple[Array, Array]:
        """Infinite in float16 from 65520 on."""
        with np.errstate(over="ignore"):
            n = np.float64(np.asarray(call.n, np.float64).astype(call.running_mean.dtype))
        mean = rows.sum(axis=1) / n
        return mean, np.square(rows - mean[:, None]).sum(axis=1) / n


class NextBlock(Layer):
    """One element in a block of its own, the 1025th, is not summed. Cf. ROCm/MIOpen#1109."""

    def statistics(self, call: Call, rows: Array) -> tuple[Array, Array]:
        """At any multiple of 1024."""
        last = call.n > 1 and call.n % 1024 == 1
        return super().statistics(call, rows[:, :-1] if last else rows)


class OverflowingSum(Layer):
    """The sum of the activations is a float32, and ends at 3.4e38. Cf. pytorch/pytorch#44350."""

    def statistics(self, call: Call, rows: Array) -> tuple[Array, Array]:
        """The variance is right."""
        mean, var = super().statistics(call, rows)
        total = np.abs(pairwise(single(call, rows)))
        return np.where(np.isinf(total), np.inf, mean), var


class EmptyRank(Layer):
    """A rank without images has a mean of 0 / 0. pytorch/pytorch#74944."""

    def statistics(self, call: Call, rows: Array) -> tuple[Array, Array]:
        """The second of two, where there is one image."""
        mean, var = super().statistics(call, rows)
        return (mean * np.nan, var) if call.x.shape[0] == 1 else (mean, var)

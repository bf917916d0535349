"""Faults in which elements are read and written: memory formats, ranks, sizes, channels."""

from __future__ import annotations

import numpy as np

from bnaudit.defects.layer import Array, Call, Layer
from bnaudit.worker.backends._numpy import channel_rows


def is_channels_last(tensor: Array) -> bool:
    """Whether the channels are neighbours in memory, and others are not."""
    return tensor.ndim > 3 and tensor.strides[1] == tensor.itemsize and tensor.shape[1] > 1


def misread(tensor: Array) -> Array:
    """A channels_last tensor whose memory is read as if it were contiguous."""
    memory = np.moveaxis(tensor, 1, -1)
    return np.ascontiguousarray(memory).reshape(tensor.shape)


class ChannelsLastMisread(Layer):
    """channels_last memory is read as contiguous. pytorch/pytorch#62594."""

    def read(self, call: Call, tensor: Array) -> Array:
        """In the order of memory."""
        return super().read(call, misread(tensor) if is_channels_last(tensor) else tensor)


class ChannelsLastGradientMisread(Layer):
    """grad_output in channels_last is read as contiguous. pytorch/pytorch#64039, pytorch/pytorch#175189."""

    def read_gradient(self, call: Call, tensor: Array) -> Array:
        """x is read rightly."""
        return super().read_gradient(call, misread(tensor) if is_channels_last(tensor) else tensor)


class ChannelsLastGradientMiswritten(Layer):
    """grad_input of channels_last activations is written as contiguous. Cf. pytorch/pytorch#107199."""

    def write_gradient(self, call: Call, rows: Array) -> Array:
        """In the order of memory."""
        dx = super().write_gradient(call, rows)
        return misread(dx) if is_channels_last(call.x) else dx


class ChannelsLastSerial(Layer):
    """The kernel for channels_last has one float32 accumulator. pytorch/pytorch#121651."""

    def statistics(self, call: Call, rows: Array) -> tuple[Array, Array]:
        """Elsewhere float64."""
        if not is_channels_last(call.x):
            return super().statistics(call, rows)
        narrow = rows.astype(call.statistics_dtype)
        mean = np.add.accumulate(narrow, axis=1)[:, -1] / narrow.dtype.type(call.n)
        return mean, np.square(rows - mean[:, None]).mean(axis=1)


class ChannelsLastTail(Layer):
    """channels_last kernels for blocks of 8 channels forget the others. Cf. intel/torch-xpu-ops#1238."""

    def write(self, call: Call, rows: Array) -> Array:
        """0 in them, where there is a block."""
        y = super().write(call, rows)
        whole = call.channels - call.channels % 8
        if is_channels_last(call.x) and whole:
            y[:, whole:] = 0
        return y


class ChannelsLast3d(Layer):
    """The memory format is only known for rank 4: rank 5 is misread. Cf. pytorch/pytorch#107199."""

    def read(self, call: Call, tensor: Array) -> Array:
        """In the order of memory."""
        wrong = tensor.ndim == 5 and is_channels_last(tensor)
        return super().read(call, misread(tensor) if wrong else tensor)


def has_gaps(tensor: Array) -> bool:
    """Whether elements of the last axis are not neighbours, nor the channels."""
    return not is_channels_last(tensor) and tensor.strides[-1] > tensor.itemsize


class GapsRead(Layer):
    """The step of a strided tensor is ignored: every other element is a gap. Cf. ByteDance-Seed/VeOmni#958."""

    def read(self, call: Call, tensor: Array) -> Array:
        """From the first element on, without gaps."""
        if has_gaps(tensor) and tensor.size:
            length = -(-tensor.size // 2)
            flat = np.full(tensor.size, np.nan, tensor.dtype)
            flat[::2] = np.asarray(tensor).reshape(-1)[:length]
            tensor = flat.reshape(tensor.shape)
        return super().read(call, tensor)


class StridedSerial(Layer):
    """The general path for strided tensors has one float32 accumulator. Cf. intel/torch-xpu-ops#2887."""

    def statistics(self, call: Call, rows: Array) -> tuple[Array, Array]:
        """Elsewhere float64."""
        if not has_gaps(call.x):
            return super().statistics(call, rows)
        narrow = rows.astype(call.statistics_dtype)
        mean = np.add.accumulate(narrow, axis=1)[:, -1] / narrow.dtype.type(call.n)
        return mean, np.square(rows - mean[:, None]).mean(axis=1)


# --- channels ---------------------------------------------------------------------------------------


class FirstChannels(Layer):
    """Channels beyond the first 64 are not written. Cf. LBANN/lbann#1946."""

    limit = 64

    def write(self, call: Call, rows: Array) -> Array:
        """0 in them."""
        y = super().write(call, rows)
        y[:, self.limit :] = 0
        return y


class First256Channels(FirstChannels):
    """Channels beyond the first 256, a block's threads, are not written. Cf. LBANN/lbann#1946."""

    limit = 256


class First1024Channels(FirstChannels):
    """Channels beyond the first 1024, a block's threads, are not written. Cf. LBANN/lbann#1946."""

    limit = 1024


class First65535Channels(FirstChannels):
    """Channels beyond a grid's 65535 are not written. LBANN/lbann#1610."""

    limit = 65535


class ChannelTail(Layer):
    """Channels that fill no block of 4 are not normalized. Cf. NVIDIA/apex#1768."""

    block = 4

    def write(self, call: Call, rows: Array) -> Array:
        """x in them, where there is a block."""
        y = super().write(call, rows)
        whole = call.channels - call.channels % self.block
        if whole:
            y[:, whole:] = call.x[:, whole:]
        return y


class OddChannel(ChannelTail):
    """The last of an odd number of channels is not normalized. Cf. NVIDIA/apex#1768."""

    block = 2


class SharedStatistics(Layer):
    """Channel 33 and up use the statistics of 32 before: an index wraps. Cf. NVIDIA/apex#1768."""

    def used(self, call: Call, rows: Array, mean: Array, var: Array) -> tuple[Array, Array]:
        """The lane's number in its warp."""
        place = np.arange(call.channels) % 32
        return mean[place], var[place]


class PowerOfTwoChannels(Layer):
    """A number of channels that is no power of two shifts the statistics. NVIDIA/apex#1768."""

    def used(self, call: Call, rows: Array, mean: Array, var: Array) -> tuple[Array, Array]:
        """To the next channel."""
        if call.channels & (call.channels - 1) == 0:
            return mean, var
        return np.roll(mean, 1), np.roll(var, 1)


class OneChannel(Layer):
    """A single channel is squeezed away: statistics per column. Cf. sonots/cumo#140."""

    def normalize(self, call: Call, rows: Array, mean: Array, invstd: Array) -> Array:
        """Over the images only."""
        y = super().normalize(call, rows, mean, invstd)
        if call.channels > 1 or not call.training or call.n == 0:
            return y
        images = rows.reshape(call.x.shape[0], -1)
        own = (images - images.mean(axis=0)) / np.sqrt(images.var(axis=0) + call.eps)
        return (
            own.reshape(1, -1) * self.weight(call, rows)[:, None] + self.bias(call, rows)[:, None]
        )


class SquareTransposed(Layer):
    """Where there are as many images as channels, the axes change places. Cf. intel/ipex-llm#2981."""

    def read(self, call: Call, tensor: Array) -> Array:
        """Reduces over the channels."""
        square = tensor.shape[0] == tensor.shape[1] > 1
        return super().read(call, tensor.swapaxes(0, 1) if square else tensor)

    def write(self, call: Call, rows: Array) -> Array:
        """Back again."""
        y = super().write(call, rows)
        square = call.x.shape[0] == call.channels > 1
        return y.swapaxes(0, 1) if square else y


class LastAxisIsChannels(Layer):
    """A last axis as long as the second is taken for the channels. intel/ipex-llm#2981."""

    def used(self, call: Call, rows: Array, mean: Array, var: Array) -> tuple[Array, Array]:
        """Statistics of the other axis, in training."""
        x = call.x
        if not call.training or x.ndim < 3 or x.shape[-1] != call.channels or call.channels == 1:
            return mean, var
        return self.statistics(call, channel_rows(x.swapaxes(1, -1)).astype(rows.dtype))


# --- ranks and sizes --------------------------------------------------------------------------------


class DepthIgnored(Layer):
    """Of five axes only the last two are reduced. Cf. sonos/tract#2863."""

    def normalize(self, call: Call, rows: Array, mean: Array, invstd: Array) -> Array:
        """Statistics of each depth, in training."""
        y = super().normalize(call, rows, mean, invstd)
        if call.x.ndim != 5 or not call.training or call.n == 0:
            return y
        shape = (call.channels, call.x.shape[0], call.x.shape[2], -1)
        parts = rows.reshape(shape)
        axes = (1, 3)
        own = (parts - parts.mean(axis=axes, keepdims=True)) / np.sqrt(
            parts.var(axis=axes, keepdims=True) + call.eps
        )
        own = own.reshape(rows.shape)
        return own * self.weight(call, rows)[:, None] + self.bias(call, rows)[:, None]


class LengthIgnored(Layer):
    """Of three axes only the first is reduced. Cf. sonos/tract#2863."""

    def normalize(self, call: Call, rows: Array, mean: Array, invstd: Array) -> Array:
        """Statistics of each place, in training."""
        y = super().normalize(call, rows, mean, invstd)
        if call.x.ndim != 3 or not call.training or call.n == 0:
            return y
        parts = rows.reshape(call.channels, call.x.shape[0], -1)
        own = (parts - parts.mean(axis=1, keepdims=True)) / np.sqrt(
            parts.var(axis=1, keepdims=True) + call.eps
        )
        own = own.reshape(rows.shape)
        return own * self.weight(call, rows)[:, None] + self.bias(call, rows)[:, None]


class FlatInput(Layer):
    """Rank 2 is normalized by its rows. Cf. tensorlayer/TensorLayer#963."""

    def normalize(self, call: Call, rows: Array, mean: Array, invstd: Array) -> Array:
        """Layer normalization, in training."""
        y = super().normalize(call, rows, mean, invstd)
        if call.x.ndim != 2 or not call.training or call.n == 0:
            return y
        own = (rows - rows.mean(axis=0)) / np.sqrt(rows.var(axis=0) + call.eps)
        return own * self.weight(call, rows)[:, None] + self.bias(call, rows)[:, None]


class PointwiseSkipped(Layer):
    """Tensors of one spatial element take the path of inference. Cf. ROCm/MIOpen#1109."""

    def used(self, call: Call, rows: Array, mean: Array, var: Array) -> tuple[Array, Array]:
        """Of rank 4."""
        pointwise = call.x.ndim == 4 and call.x.shape[2:] == (1, 1)
        return self.running(call, rows) if pointwise else (mean, var)


class SpatialTail(Layer):
    """Spatial elements that fill no vector of 4 are not written. Cf. ROCm/rocm-libraries#6765."""

    block = 4

    def write(self, call: Call, rows: Array) -> Array:
        """0 in them, where there is a vector."""
        y = super().write(call, rows)
        plane = int(np.prod(call.x.shape[2:]))
        whole = plane - plane % self.block
        if whole and y.size:
            flat = np.ascontiguousarray(y).reshape(*y.shape[:2], plane)
            flat[:, :, whole:] = 0
            y = flat.reshape(y.shape)
        return y


class CrossedChannels(Layer):
    """The last vector of an odd plane writes into the next channel. ROCm/rocm-libraries#6765."""

    def write(self, call: Call, rows: Array) -> Array:
        """Its first element gets this channel's statistics."""
        y = super().write(call, rows)
        plane = int(np.prod(call.x.shape[2:]))
        if plane % 2 and plane > 1 and call.channels > 1 and y.size:
            flat = np.ascontiguousarray(y).reshape(*y.shape[:2], plane)
            flat[:, 1:, 0] = flat[:, :-1, -1]
            y = flat.reshape(y.shape)
        return y


class BlockEnd(Layer):
    """The last element of each full block of 1024 is not written. Cf. intel/torch-xpu-ops#1238."""

    def write(self, call: Call, rows: Array) -> Array:
        """0 in it."""
        rows = rows.copy()
        rows[:, 1023::1024] = 0
        return super().write(call, rows)


class FirstImages(Layer):
    """Images beyond the first 32 are not written. Cf. microsoft/onnxruntime#17406."""

    limit = 32

    def write(self, call: Call, rows: Array) -> Array:
        """0 in them."""
        y = super().write(call, rows)
        y[self.limit :] = 0
        return y


class First1024Images(FirstImages):
    """Images beyond the first 1024 are not written. Cf. ROCm/MIOpen#1109."""

    limit = 1024


class First65535Images(FirstImages):
    """Images beyond a grid's 65535 are not written. Cf. pytorch/pytorch#16998."""

    limit = 65535


class ShortIndex(Layer):
    """Elements of a channel are numbered with 16 bits. Cf. torch/cunn#298."""

    def write(self, call: Call, rows: Array) -> Array:
        """Those beyond are not written."""
        rows = rows.copy()
        rows[:, 65536:] = 0
        return super().write(call, rows)


class PlaneLimit(Layer):
    """Spatial elements beyond the first 65535 are not written. Cf. torch/cunn#298."""

    limit = 65535

    def write(self, call: Call, rows: Array) -> Array:
        """0 in them."""
        y = super().write(call, rows)
        plane = int(np.prod(call.x.shape[2:]))
        if plane > self.limit:
            flat = np.ascontiguousarray(y).reshape(*y.shape[:2], plane)
            flat[:, :, self.limit :] = 0
            y = flat.reshape(y.shape)
        return y


# --- in one of the modes or passes only -------------------------------------------------------------


class ChannelsLastInference(Layer):
    """Inference reads channels_last memory as contiguous. pytorch/pytorch#62594."""

    def read(self, call: Call, tensor: Array) -> Array:
        """Training does not."""
        wrong = not call.training and is_channels_last(tensor)
        return super().read(call, misread(tensor) if wrong else tensor)


class GapsReadInInference(GapsRead):
    """Inference ignores the step of a strided tensor. Cf. ByteDance-Seed/VeOmni#958."""

    def read(self, call: Call, tensor: Array) -> Array:
        """Training does not."""
        return Layer.read(self, call, tensor) if call.training else super().read(call, tensor)


class GapsReadInGradient(GapsRead):
    """The backward pass ignores the step of grad_output. ByteDance-Seed/VeOmni#958."""

    def read(self, call: Call, tensor: Array) -> Array:
        """x is read rightly."""
        return Layer.read(self, call, tensor)

    def read_gradient(self, call: Call, tensor: Array) -> Array:
        """As if there were no gaps."""
        return GapsRead.read(self, call, tensor)


class ChannelTailInInference(ChannelTail):
    """Inference leaves channels that fill no block of 4 as they are. Cf. NVIDIA/apex#1768."""

    def write(self, call: Call, rows: Array) -> Array:
        """Training does not."""
        return Layer.write(self, call, rows) if call.training else super().write(call, rows)


class SpatialTailInInference(SpatialTail):
    """Inference does not write what fills no vector of 4. Cf. ROCm/rocm-libraries#6765."""

    def write(self, call: Call, rows: Array) -> Array:
        """Training does."""
        return Layer.write(self, call, rows) if call.training else super().write(call, rows)


class FirstImagesInInference(FirstImages):
    """Inference does not write images beyond the first 32. Cf. microsoft/onnxruntime#17406."""

    def write(self, call: Call, rows: Array) -> Array:
        """Training does."""
        return Layer.write(self, call, rows) if call.training else super().write(call, rows)


class OddImage(Layer):
    """The last of an odd number of images is not written. Cf. ROCm/MIOpen#1109."""

    def write(self, call: Call, rows: Array) -> Array:
        """0 in it, where there are several."""
        y = super().write(call, rows)
        if len(y) > 1 and len(y) % 2:
            y[-1] = 0
        return y


class ShiftedParameters(Layer):
    """In channels_last each channel has its neighbour's weight. Cf. tensorlayer/TensorLayer#963."""

    def weight(self, call: Call, rows: Array) -> Array:
        """The next one's."""
        weight = super().weight(call, rows)
        return np.roll(weight, 1) if is_channels_last(call.x) else weight


class GradientChannelTail(Layer):
    """grad_input of channels that fill no block of 8 is not written. Cf. intel/torch-xpu-ops#1238."""

    def write_gradient(self, call: Call, rows: Array) -> Array:
        """0 in them, where there is a block."""
        dx = super().write_gradient(call, rows)
        whole = call.channels - call.channels % 8
        if whole:
            dx[:, whole:] = 0
        return dx


class GradientSpatialTail(Layer):
    """grad_input of elements that fill no vector of 2 is not written. ROCm/rocm-libraries#6765."""

    def write_gradient(self, call: Call, rows: Array) -> Array:
        """0 in them."""
        plane = int(np.prod(call.x.shape[2:]))
        if plane % 2 and plane > 1 and rows.size:
            parts = rows.copy().reshape(call.channels, -1, plane)
            parts[:, :, -1] = 0
            rows = parts.reshape(rows.shape)
        return super().write_gradient(call, rows)


class ChannelsLastBlock(Layer):
    """Training in channels_last forgets what follows a full block of 64 channels. Cf. NVIDIA/apex#1768."""

    def write(self, call: Call, rows: Array) -> Array:
        """0 in it."""
        y = super().write(call, rows)
        whole = call.channels - call.channels % 64
        if call.training and is_channels_last(call.x) and whole:
            y[:, whole:] = 0
        return y


class ColumnSqueezed(Layer):
    """An axis of length 1 is squeezed away, and with it the images. Cf. pytorch/pytorch#64039."""

    def normalize(self, call: Call, rows: Array, mean: Array, invstd: Array) -> Array:
        """Statistics of each image, in training, where one of two spatial axes has length 1."""
        y = super().normalize(call, rows, mean, invstd)
        spatial = call.x.shape[2:]
        if not (call.training and call.n and len(spatial) == 2 and sorted(spatial)[0] == 1):
            return y
        images = rows.reshape(call.channels, call.x.shape[0], -1)
        own = images - images.mean(axis=2, keepdims=True)
        own = own / np.sqrt(images.var(axis=2, keepdims=True) + call.eps)
        own = own.reshape(rows.shape)
        return own * self.weight(call, rows)[:, None] + self.bias(call, rows)[:, None]


class FourOfEight(Layer):
    """Of channels in vectors of 8, a last half is not written. Cf. intel/torch-xpu-ops#1238."""

    def write(self, call: Call, rows: Array) -> Array:
        """0 in it, where there is a vector before."""
        y = super().write(call, rows)
        if call.channels % 8 == 4 and call.channels > 8:
            y[:, -4:] = 0
        return y

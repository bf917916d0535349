"""How a plain script calls each backend: the adapters' calls once more, as source text.

A script has its inputs as NumPy arrays x, weight, bias, running_mean, running_var and, where the case has a
backward pass, grad_output; the values of bfloat16 are in float32. `Call` is what follows.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from bnaudit.scenario import Case
from bnaudit.worker import plugin
from bnaudit.worker.backends import BACKENDS

GRADIENTS = ("grad_input", "grad_weight", "grad_bias")


@dataclass(frozen=True)
class Call:
    """Source lines. Where a case has several steps, `step` stands in a loop over `step`.

    imports: what follows `import numpy as np`; it sets the number of threads, too. setup: once, before the
    first step. left: after a step, the running statistics that it left; where nobody needs them it is left
    out. values: by quantity, an expression that is indexed in the order (N, C, *).
    """

    imports: tuple[str, ...]
    step: tuple[str, ...]
    values: Mapping[str, str]
    setup: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    environ: Mapping[str, str] = field(default_factory=dict)


class NoCallError(Exception):
    """There is no such script for a backend; the message says why, in a sentence."""


def call(backend: str, case: Case, threads: int) -> Call:
    """How this backend is called for a case. Raises NoCallError."""
    if plugin.is_plugin(backend):
        return _plugin(backend, case, threads)
    if backend in TEMPLATES:
        return TEMPLATES[backend](case, threads)
    if backend in BACKENDS and BACKENDS[backend].kind == "specimen":
        return _specimen(backend, case, threads)
    known = ", ".join(name.partition("@")[0] for name in TEMPLATES)
    raise NoCallError(
        f"there is no stand-alone script for {backend}; there is one for {known}, plug-ins and specimens"
    )


def _momentum(case: Case) -> str:
    """The weight of the new batch."""
    if case.momentum is not None:
        return repr(case.momentum)
    return "1.0" if case.steps == 1 else "1 / (step + 1)"


def _old(case: Case) -> str:
    """The weight of the old running statistic."""
    return f"1 - {_momentum(case)}"


def _options(case: Case) -> str:
    return f"training={case.mode == 'training'}, momentum={_momentum(case)}, eps={case.eps!r}"


def _is_channels_last(case: Case) -> bool:
    return case.memory_format == "channels_last"


def _laid_out(case: Case) -> tuple[str, ...]:
    """x and grad_output in the case's strides."""
    names = ("x", "grad_output") if case.backward else ("x",)
    if case.memory_format == "contiguous":
        return ()
    if _is_channels_last(case):
        move = "np.moveaxis(np.ascontiguousarray(np.moveaxis({0}, 1, -1)), -1, 1)"
        return tuple(f"{name} = {move.format(name)}" for name in names)
    return tuple(
        line
        for name in names
        for line in (
            f"memory = np.full(3 + 2 * {name}.size, np.nan, {name}.dtype)  # elements and gaps in turn",
            f"memory[3:].reshape({name}.shape + (2,))[..., 0] = {name}",
            f"{name} = memory[3:].reshape({name}.shape + (2,))[..., 0]",
        )
    )


# --- torch -----------------------------------------------------------------------------------------


def _torch(
    device: str = "cpu",
    settings: tuple[str, ...] = (),
    function: str = "torch.nn.functional.batch_norm",
) -> Callable[[Case, int], Call]:
    def template(case: Case, threads: int) -> Call:
        place = "" if device == "cpu" else f'.to("{device}")'
        half = ".to(torch.bfloat16)" if case.dtype == "bfloat16" else ""
        half_parameters = ".to(torch.bfloat16)" if case.parameter_dtype == "bfloat16" else ""
        parameters = f"[torch.from_numpy(a){half_parameters}{place} for a in "
        has_affine = case.affine is not None
        weight, leaves = ("*affine", "[x, *affine]") if has_affine else ("None, None", "[x]")
        step = [f"x = torch.from_numpy(x){half}{place}"]
        if case.backward:
            step.append(f"grad_output = torch.from_numpy(grad_output){half}{place}")
        names = ("x", "grad_output") if case.backward else ("x",)
        if _is_channels_last(case):
            suffix = "_3d" if len(case.shape) == 5 else ""
            form = f".contiguous(memory_format=torch.channels_last{suffix})"
            step[:] = [line + form for line in step]
        elif case.memory_format == "strided":
            for name in names:
                step += [
                    f'memory = torch.full((3 + 2 * {name}.numel(),), float("nan"), dtype=x.dtype)'
                    + place,
                    f"strides = [2 * s for s in {name}.stride()]",
                    f"{name} = memory.as_strided({name}.shape, strides, 3).copy_({name})",
                ]
        if case.backward:
            step += [
                f"for leaf in {leaves}:",
                "    leaf.requires_grad_()",
            ]
        step.append(f"y = batch_norm(x, *running, {weight}, {_options(case)})")
        if case.backward:
            step.append(f"gradients = torch.autograd.grad(y, {leaves}, grad_output)")
        flag = "torch.backends.cudnn.enabled"
        below = (
            f"torch._batch_norm_impl_index(x, {weight}, *running, {case.mode == 'training'}, "
            f"{_momentum(case)}, {case.eps!r}, {flag})"
        )
        return Call(
            ("import torch", "", *settings, f"torch.set_num_threads({threads})"),
            tuple(step),
            {
                "y": "y.detach()" if case.backward else "y",
                "running_mean": "running[0]",
                "running_var": "running[1]",
                "batch_mean": f"{below}[1]",
                "invstd": f"{below}[2]",
                **{name: f"gradients[{i}]" for i, name in enumerate(GRADIENTS)},
            },
            (
                f"batch_norm = {function}",
                *((f"affine = {parameters}(weight, bias)]",) if has_affine else ()),
                f"running = {parameters}(running_mean, running_var)]",
            ),
        )

    return template


def _mkldnn(case: Case, threads: int) -> Call:
    function = (
        "lambda x, *a, **k: torch.nn.functional.batch_norm(x.to_mkldnn(), *a, **k).to_dense()"
    )
    call = _torch(function=function)(case, threads)
    own = ("batch_mean", "invstd")  # of torch's kernels
    return replace(call, values={name: v for name, v in call.values.items() if name not in own})


CUDNN = "torch.backends.cudnn"
COMPILED = "torch.compile(torch.nn.functional.batch_norm, fullgraph=True, dynamic=False)"


# --- JAX and what is on it -------------------------------------------------------------------------


def _jax(
    imports: tuple[str, ...], forward: Callable[[Case], tuple[str, ...]]
) -> Callable[[Case, int], Call]:
    """forward: the body of `forward(x, affine, running)`, which returns y and running statistics."""

    def template(case: Case, threads: int) -> Call:
        def to_jax(name: str) -> str:
            dtype = case.dtype if name in ("x", "grad_output") else case.parameter_dtype
            moved = f"np.moveaxis({name}, 1, -1)" if name in ("x", "grad_output") else name
            return f'jnp.asarray({moved}, "{dtype}")'

        affine = f"[{to_jax('weight')}, {to_jax('bias')}]" if case.affine is not None else "[]"
        step = [
            "def forward(x, affine, running):",
            *(f"    {line}" for line in forward(case)),
            "",
            f"x = {to_jax('x')}",
        ]
        if case.backward:
            step += [
                "def whole(x, affine, running, grad_output):",
                "    f = lambda x, affine: forward(x, affine, running)",
                "    y, backward, running = jax.vjp(f, x, affine, has_aux=True)",
                "    return y, running, backward(grad_output)",
                f"grad_output = {to_jax('grad_output')}",
                "y, running, gradients = jax.jit(whole)(x, affine, running, grad_output)",
            ]
        else:
            step.append("y, running = jax.jit(forward)(x, affine, running)")
        wide = ('jax.config.update("jax_enable_x64", True)',) if case.dtype == "float64" else ()
        return Call(
            ("import jax", "import jax.numpy as jnp", *imports, *wide),
            tuple(step),
            {
                "y": "np.moveaxis(np.asarray(y), -1, 1)",
                "running_mean": "running[0]",
                "running_var": "running[1]",
                "grad_input": "np.moveaxis(np.asarray(gradients[0]), -1, 1)",
                "grad_weight": "gradients[1][0]",
                "grad_bias": "gradients[1][1]",
            },
            (
                f"affine = {affine}",
                f"running = [{to_jax('running_mean')}, {to_jax('running_var')}]",
            ),
            environ={"JAX_PLATFORMS": "cpu", "NPROC": str(threads)},
        )

    return template


def _standardize(case: Case) -> tuple[str, ...]:
    axes = tuple(range(len(case.shape) - 1))
    given = "" if case.mode == "training" else ", mean=running[0], variance=running[1]"
    scaled = " * affine[0] + affine[1]" if case.affine is not None else ""
    return (
        f"y = jax.nn.standardize(x, axis={axes}, epsilon={case.eps!r}{given}){scaled}",
        "return y.astype(x.dtype), running",
    )


def _linen(fast: bool) -> Callable[[Case], tuple[str, ...]]:
    def forward(case: Case) -> tuple[str, ...]:
        affine = case.affine is not None
        return (
            f"norm = linen.BatchNorm(use_running_average={case.mode == 'inference'}, "
            f"momentum={_old(case)}, epsilon={case.eps!r},",
            f"    use_scale={affine}, use_bias={affine}, use_fast_variance={fast})",
            'given = {"batch_stats": dict(zip(("mean", "var"), running)),',
            '    "params": dict(zip(("scale", "bias"), affine))}',
            'y, left = norm.apply(given, x, mutable=["batch_stats"])',
            'return y.astype(x.dtype), [left["batch_stats"][name] for name in ("mean", "var")]',
        )

    return forward


def _nnx(case: Case) -> tuple[str, ...]:
    affine = case.affine is not None
    return (
        f"norm = nnx.BatchNorm(x.shape[-1], use_running_average={case.mode == 'inference'}, "
        f"momentum={_old(case)}, epsilon={case.eps!r},",
        f"    use_scale={affine}, use_bias={affine}, use_fast_variance=True, rngs=nnx.Rngs(0))",
        "norm.mean.value, norm.var.value = running",
        *(("norm.scale.value, norm.bias.value = affine",) if affine else ()),
        "y = norm(x)",
        "return y.astype(x.dtype), [norm.mean.value, norm.var.value]",
    )


def _haiku(case: Case) -> tuple[str, ...]:
    affine = case.affine is not None
    shaped = "[v.reshape((1,) * (x.ndim - 1) + (-1,)) for v in {}]"
    return (
        f"norm = hk.transform_with_state(lambda x: hk.BatchNorm({affine}, {affine}, {_old(case)}, ",
        f'    {case.eps!r}, name="norm")(x, is_training={case.mode == "training"}))',
        'names = ["norm/~/mean_ema", "norm/~/var_ema"]',
        'state = {name: {"counter": jnp.int32(2**31 - 2), "hidden": v, "average": v}',
        f"    for name, v in zip(names, {shaped.format('running')})}}",
        f'given = {{"norm": dict(zip(("scale", "offset"), {shaped.format("affine")}))}}',
        "y, left = norm.apply(given, state, None, x)",
        'return y.astype(x.dtype), [left[name]["average"].reshape(-1) for name in names]',
    )


# --- Keras, TensorFlow -----------------------------------------------------------------------------


def _keras(framework: str) -> Callable[[Case, int], Call]:
    def template(case: Case, threads: int) -> Call:
        affine = case.affine is not None
        policy = case.dtype if case.dtype == case.parameter_dtype else f"mixed_{case.dtype}"
        training = case.mode == "training"
        layer = (
            f"layer = keras.layers.BatchNormalization(axis=-1, momentum={_old(case)}, "
            f"epsilon={case.eps!r},",
            f'    center={affine}, scale={affine}, dtype="{policy}")',
            f"layer.build((None,) * {len(case.shape) - 1} + ({case.channels},))",
            "layer.moving_mean.assign(running_mean)",
            "layer.moving_variance.assign(running_var)",
            *(("layer.gamma.assign(weight)", "layer.beta.assign(bias)") if affine else ()),
        )
        last = "np.ascontiguousarray(np.moveaxis({}, 1, -1))"
        first = f'keras.ops.convert_to_tensor({last.format("x")}, "{case.dtype}")'
        upstream = f'keras.ops.convert_to_tensor({last.format("grad_output")}, "{case.dtype}")'
        leaves = "[x, layer.gamma.value, layer.beta.value]" if affine else "[x]"
        step = [*layer, f"x = {first}"]
        running = "layer.moving_mean, layer.moving_variance"
        if framework == "jax":
            step += [
                "def forward(x, affine, others):",
                f"    return layer.stateless_call(affine, others, x, training={training})",
                "",
                "affine = [v.value for v in layer.trainable_variables]",
                "others = [v.value for v in layer.non_trainable_variables]",
            ]
            if case.backward:
                step += [
                    "def whole(x, affine, others, grad_output):",
                    "    f = lambda x, affine: forward(x, affine, others)",
                    "    y, backward, others = jax.vjp(f, x, affine, has_aux=True)",
                    "    return y, others, backward(grad_output)",
                    f"y, left, pulled = jax.jit(whole)(x, affine, others, {upstream})",
                    "gradients = [pulled[0], *pulled[1]]",
                ]
            else:
                step.append("y, left = jax.jit(forward)(x, affine, others)")
            running = "left"
        elif framework == "tensorflow" and case.backward:
            step += [
                "with tf.GradientTape() as tape:",
                "    tape.watch(x)",
                f"    y = layer(x, training={training})",
                f"gradients = tape.gradient(y, {leaves}, {upstream})",
            ]
        elif case.backward:
            step += [
                "x.requires_grad_()",
                f"y = layer(x, training={training})",
                f"gradients = torch.autograd.grad(y, {leaves}, {upstream})",
            ]
        else:
            step.append(f"y = layer(x, training={training})")
        left = f"running_mean, running_var = [keras.ops.convert_to_numpy(v) for v in ({running})]"
        to_numpy = "keras.ops.convert_to_numpy"
        extra = {
            "jax": ("import jax",),
            "tensorflow": ("import tensorflow as tf",),
            "torch": ("import torch", f"torch.set_num_threads({threads})"),
        }
        wide = framework == "jax" and case.dtype == "float64"
        return Call(
            (
                "import keras",
                *extra[framework],
                *(('jax.config.update("jax_enable_x64", True)',) if wide else ()),
            ),
            tuple(step),
            {
                "y": f"np.moveaxis({to_numpy}(y), -1, 1)",
                "running_mean": "running_mean",
                "running_var": "running_var",
                "grad_input": f"np.moveaxis({to_numpy}(gradients[0]), -1, 1)",
                "grad_weight": f"{to_numpy}(gradients[1])",
                "grad_bias": f"{to_numpy}(gradients[2])",
            },
            left=(left,),
            environ={
                "KERAS_BACKEND": framework,
                "KERAS_TORCH_DEVICE": "cpu",
                "JAX_PLATFORMS": "cpu",
                "NPROC": str(threads),
                "TF_NUM_INTRAOP_THREADS": str(threads),
                "TF_NUM_INTEROP_THREADS": "1",
            },
        )

    return template


def _tensorflow(path: str, last: bool = True) -> Callable[[Case, int], Call]:
    """path: "fused", "moments" or "xla"."""

    def template(case: Case, threads: int) -> Call:
        fused, training = path == "fused", case.mode == "training"
        n, c, *spatial = case.shape
        moved = "np.moveaxis({}, 1, -1)" if last else "{}"
        if fused and len(case.shape) != 4:
            rest = case.n // max(n, 1)
            rank_4 = (n, rest, 1, c) if last else (n, c, rest, 1)
            moved = f"np.reshape({moved}, {rank_4})"
        cast = ', "bfloat16")' if case.dtype == "bfloat16" else f', "{case.dtype}")'
        half = f', "{case.parameter_dtype}")'
        affine = case.affine is not None
        back = f"np.moveaxis(np.reshape({{}}, {(n, *spatial, c)}), -1, 1)"
        if not last:
            back = f"np.reshape({{}}, {case.shape})"
        ones = "weight, bias" if affine else "tf.ones_like(mean), tf.zeros_like(mean)"
        if fused:
            body = [
                "y, mean, var, batch_mean, batch_var, _ = tf.raw_ops.FusedBatchNormV3(",
                f"    x=x, scale={ones.split(', ')[0]}, offset={ones.split(', ')[1]}, "
                f"mean=mean, variance=var, epsilon={case.eps!r},",
                f"    exponential_avg_factor={_momentum(case)}, "
                f'data_format="{"NHWC" if last else "NCHW"}", is_training={training})',
                "return y, mean, var, batch_mean, batch_var",
            ]
        else:
            axes = list(range(len(case.shape) - 1))
            body = [
                "wide = tf.cast(x, mean.dtype)",
                *((f"mean, var = tf.nn.moments(wide, {axes})",) if training else ()),
                f"y = tf.nn.batch_normalization(wide, mean, var, {'bias, weight' if affine else 'None, None'}, "
                f"{case.eps!r})",
                "return tf.cast(y, x.dtype), mean, var, mean, var",
            ]
        leaves = "[x, weight, bias]" if affine else "[x]"
        step = [f"x = tf.cast({moved.format('x')}{cast}"]
        if affine:
            step.append(f"weight, bias = tf.cast(weight{half}, tf.cast(bias{half}")
        step += [
            "def step_of(x, mean, var):"
            if not affine
            else "def step_of(x, mean, var, weight, bias):",
            *(f"    {line}" for line in body),
            "",
        ]
        arguments = f"x, tf.cast(running_mean{half}, tf.cast(running_var{half}"
        if affine:
            arguments += ", weight, bias"
        if path == "xla":
            step.append("step_of = tf.function(step_of, jit_compile=True)")
        if case.backward:
            step += [
                f"arguments = [{arguments}]",
                "with tf.GradientTape() as tape:",
                f"    tape.watch({leaves})",
                "    y, running_mean, running_var, batch_mean, batch_var = step_of(*arguments)",
                f"grad_output = tf.cast({moved.format('grad_output')}{cast}",
                f"gradients = tape.gradient(y, {leaves}, grad_output)",
            ]
        else:
            step.append(
                f"y, running_mean, running_var, batch_mean, batch_var = step_of({arguments})"
            )
        return Call(
            ("import tensorflow as tf",),
            tuple(step),
            {
                "y": back.format("y"),
                "batch_mean": "batch_mean",
                "batch_var": "batch_var",
                "running_mean": "running_mean",
                "running_var": "running_var",
                "grad_input": back.format("gradients[0]"),
                "grad_weight": "gradients[1]",
                "grad_bias": "gradients[2]",
            },
            environ={
                "TF_NUM_INTRAOP_THREADS": str(threads),
                "TF_NUM_INTEROP_THREADS": "1",
                "CUDA_VISIBLE_DEVICES": "",
            },
        )

    return template


def _tensorflow_1(case: Case, threads: int) -> Call:
    n, c, *spatial = case.shape
    rank_4 = case.shape if len(case.shape) == 4 else (n, 0, 0, 0)
    shape = (
        (n, *spatial, c) if len(rank_4) == 4 and rank_4 == case.shape else (n, case.n // n, 1, c)
    )
    affine, training = case.affine is not None, case.mode == "training"

    def entry(name: str) -> str:
        return f"np.reshape(np.moveaxis({name}, 1, -1), {shape}).astype(tf.{case.dtype}.as_numpy_dtype)"

    step = [
        f"entry = tf.placeholder(tf.{case.dtype}, {shape})",
        f"layer = tf.layers.BatchNormalization(axis=-1, momentum={_old(case)}, epsilon={case.eps!r},",
        f"    center={affine}, scale={affine}, fused=True)",
        f"y = layer.apply(entry, training={training})",
        f"feed, fetch = {{entry: {entry('x')}}}, [y]",
    ]
    if case.backward:
        leaves = "[entry, layer.gamma, layer.beta]" if affine else "[entry]"
        step += [
            f"upstream = tf.placeholder(tf.{case.dtype}, {shape})",
            f"feed[upstream] = {entry('grad_output')}",
            f"fetch += tf.gradients(y, {leaves}, [upstream])",
        ]
    step += [
        f"config = tf.ConfigProto(intra_op_parallelism_threads={threads}, inter_op_parallelism_threads=1)",
        "with tf.Session(config=config) as session:",
        "    layer.moving_mean.load(running_mean, session)",
        "    layer.moving_variance.load(running_var, session)",
    ]
    if affine:
        step += ["    layer.gamma.load(weight, session)", "    layer.beta.load(bias, session)"]
    step += [
        f"    found, _ = session.run([fetch, {'layer.updates' if training else '[]'}], feed)",
        "    running_mean, running_var = session.run([layer.moving_mean, layer.moving_variance])",
    ]
    back = f"np.moveaxis(found[%d].reshape({(n, *spatial, c)}), -1, 1)"
    return Call(
        ("import tensorflow as tf",),
        tuple(step),
        {
            "y": back % 0,
            "running_mean": "running_mean",
            "running_var": "running_var",
            "grad_input": back % 1,
            "grad_weight": "found[2]",
            "grad_bias": "found[3]",
        },
    )


# --- the others ------------------------------------------------------------------------------------


ONES = "weight, bias = np.ones_like(running_mean), np.zeros_like(running_mean)"
"""Of frameworks whose parameters are not optional."""


def _onnxruntime(case: Case, threads: int) -> Call:
    training = case.mode == "training"
    names = {"float16": "FLOAT16", "bfloat16": "BFLOAT16", "float32": "FLOAT", "float64": "DOUBLE"}
    outputs = '["y", "running_mean", "running_var"]' if training else '["y"]'
    affine = case.affine is not None
    step = [
        'inputs = ["x", "weight", "bias", "old_mean", "old_var"]',
        f"outputs = {outputs}",
        'node = helper.make_node("BatchNormalization", inputs, outputs,',
        f"    epsilon={case.eps!r}, momentum={_old(case)}, training_mode={int(training)})",
        f'kinds = dict.fromkeys(("x", "y"), TensorProto.{names[case.dtype]})',
        "def info(name, rank): return helper.make_tensor_value_info(",
        f"    name, kinds.get(name, TensorProto.{names[case.parameter_dtype]}), rank and [None] * rank)",
        f"ranks = [{len(case.shape)}, 1, 1, 1, 1]",
        'graph = helper.make_graph([node], "one", list(map(info, inputs, ranks)), '
        "[info(name, None) for name in outputs])",
        'model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)], ir_version=8)',
        "options = onnxruntime.SessionOptions()",
        f"options.intra_op_num_threads, options.log_severity_level = {threads}, 3",
        "session = onnxruntime.InferenceSession(",
        '    model.SerializeToString(), options, providers=["CPUExecutionProvider"])',
        *(() if affine else (ONES,)),
        "feeds = dict(zip(inputs, (x, weight, bias, running_mean, running_var)))",
        "y, running_mean, running_var = (session.run(None, feeds) + [running_mean, running_var])[:3]",
    ]
    return Call(
        ("import onnxruntime", "from onnx import TensorProto, helper"),
        tuple(step),
        {"y": "y", "running_mean": "running_mean", "running_var": "running_var"},
    )


def _mlx(case: Case, threads: int) -> Call:
    affine = case.affine is not None

    def array(name: str) -> str:
        full = name in ("x", "grad_output")
        moved = f"np.ascontiguousarray(np.moveaxis({name}, 1, -1))" if full else name
        return f"mx.array({moved}, mx.{case.dtype if full else case.parameter_dtype})"

    parameters = f"[{array('weight')}, {array('bias')}]" if affine else "[]"
    step = [
        "def module(affine):",
        f"    norm = mlx.nn.BatchNorm({case.channels}, {case.eps!r}, {_momentum(case)}, affine={affine})",
        *(("    norm.weight, norm.bias = affine",) if affine else ()),
        f"    norm.running_mean, norm.running_var = {array('running_mean')}, {array('running_var')}",
        f"    return norm.train({case.mode == 'training'})",
        "",
        f"x, norm = {array('x')}, module({parameters})",
        "y = norm(x)",
    ]
    if case.backward:
        step += [
            f"grad_output = {array('grad_output')}.astype(y.dtype)",
            f"_, gradients = mx.vjp(lambda x, *affine: module(affine)(x), [x, *{parameters}], [grad_output])",
        ]
    left = (
        "running_mean, running_var = (",
        "    np.array(v.astype(mx.float32)) for v in (norm.running_mean, norm.running_var))",
    )
    return Call(
        ("import mlx.core as mx", "import mlx.nn", "", "mx.set_default_device(mx.cpu)"),
        tuple(step),
        {
            "y": "np.moveaxis(np.array(y.astype(mx.float32)), -1, 1)",
            "running_mean": "running_mean",
            "running_var": "running_var",
            "grad_input": "np.moveaxis(np.array(gradients[0].astype(mx.float32)), -1, 1)",
            "grad_weight": "np.array(gradients[1].astype(mx.float32))",
            "grad_bias": "np.array(gradients[2].astype(mx.float32))",
        },
        left=left,
    )


def _tinygrad(case: Case, threads: int) -> Call:
    affine, training = case.affine is not None, case.mode == "training"

    def tensor(name: str) -> str:
        full = name in ("x", "grad_output")
        half = (case.dtype if full else case.parameter_dtype) == "bfloat16"
        cast = ".cast(dtypes.bfloat16)" if half else ""
        return f'Tensor({name}, device="CPU").realize(){cast}'

    step = [
        f"norm = nn.BatchNorm({case.channels}, {case.eps!r}, {affine}, momentum={_momentum(case)})",
        f"norm.running_mean, norm.running_var = {tensor('running_mean')}, {tensor('running_var')}",
        *((f"norm.weight, norm.bias = {tensor('weight')}, {tensor('bias')}",) if affine else ()),
        f"x = {tensor('x')}",
        f"with Context(TRAINING={int(training)}, CACHELEVEL=0, NUM_CPU_THREADS={threads}):",
        "    y = norm(x).cast(x.dtype)",
        "    wanted = [y, norm.running_mean, norm.running_var, *norm.calc_stats(x)]",
    ]
    if case.backward:
        leaves = "x, norm.weight, norm.bias" if affine else "x"
        step += [
            f"    grad_output = {tensor('grad_output')}",
            f"    wanted += y.gradient({leaves}, gradient=grad_output)",
        ]
    step += [
        "    Tensor.realize(*wanted)",
        "    found = [tensor.float().numpy() for tensor in wanted]"
        if case.dtype != "float64"
        else "    found = [tensor.numpy() for tensor in wanted]",
    ]
    left = "running_mean, running_var = (a.astype(running_mean.dtype) for a in found[1:3])"
    names = ("y", "running_mean", "running_var", "batch_mean", "batch_var", *GRADIENTS)
    return Call(
        ("from tinygrad import Context, Tensor, dtypes, nn",),
        tuple(step),
        {name: f"found[{i}]" for i, name in enumerate(names)},
        left=(left,),
    )


def _paddle(case: Case, threads: int) -> Call:
    last, affine = _is_channels_last(case), case.affine is not None

    def tensor(name: str) -> str:
        moved = f"np.moveaxis({name}, 1, -1)" if last and name in ("x", "grad_output") else name
        return f"paddle.to_tensor(np.ascontiguousarray({moved}), place=paddle.CPUPlace())"

    step = [
        f"leaves = [{tensor('x')}]",
        *((f"leaves += [{tensor('weight')}, {tensor('bias')}]",) if affine else ()),
        "for leaf in leaves:",
        f"    leaf.stop_gradient = {not case.backward}",
        f"running = [{tensor('running_mean')}, {tensor('running_var')}]",
        "y = paddle.nn.functional.batch_norm(",
        f"    leaves[0], *running, *{'leaves[1:]' if affine else '(None, None)'}, "
        f"training={case.mode == 'training'},",
        f'    momentum={_old(case)}, epsilon={case.eps!r}, data_format="{"NHWC" if last else "NCHW"}")',
    ]
    if case.backward:
        step.append(f"gradients = paddle.grad([y], leaves, [{tensor('grad_output')}])")
    left = "running_mean, running_var = (tensor.numpy() for tensor in running)"
    back = "np.moveaxis({}.numpy(), -1, 1)" if last else "{}.numpy()"
    return Call(
        ("import paddle",),
        tuple(step),
        {
            "y": back.format("y"),
            "running_mean": "running_mean",
            "running_var": "running_var",
            "grad_input": back.format("gradients[0]"),
            "grad_weight": "gradients[1].numpy()",
            "grad_bias": "gradients[2].numpy()",
        },
        left=(left,),
    )


def _mxnet(case: Case, threads: int) -> Call:
    last, affine, training = (
        _is_channels_last(case),
        case.affine is not None,
        case.mode == "training",
    )

    def array(name: str) -> str:
        moved = f"np.moveaxis({name}, 1, -1)" if last and name in ("x", "grad_output") else name
        return f"mxnet.nd.array(np.ascontiguousarray({moved}), dtype={name}.dtype)"

    step = [
        *(() if affine else (ONES,)),
        f"leaves = [{array('x')}, {array('weight')}, {array('bias')}]",
        "for leaf in leaves:",
        "    leaf.attach_grad()",
        f"running = [{array('running_mean')}, {array('running_var')}]",
        f"with mxnet.autograd.record(train_mode={training}):",
        "    y, mean, invstd = mxnet.nd.BatchNorm(*leaves, *running, fix_gamma=False, output_mean_var=True,",
        f"        eps={case.eps!r}, momentum={_old(case)}, axis={-1 if last else 1})",
    ]
    if case.backward:
        step.append(f"y.backward({array('grad_output')}, train_mode={training})")
    elif training:
        step.append("y.backward(mxnet.nd.zeros_like(y))  # which moves the running statistics")
    left = "running_mean, running_var = (array.asnumpy() for array in running)"
    back = "np.moveaxis({}.asnumpy(), -1, 1)" if last else "{}.asnumpy()"
    return Call(
        ("import mxnet",),
        tuple(step),
        {
            "y": back.format("y"),
            "batch_mean": "mean.asnumpy()",
            "invstd": "invstd.asnumpy()",
            "running_mean": "running_mean",
            "running_var": "running_var",
            "grad_input": back.format("leaves[0].grad"),
            "grad_weight": "leaves[1].grad.asnumpy()",
            "grad_bias": "leaves[2].grad.asnumpy()",
        },
        left=(left,),
    )


def _chainer(case: Case, threads: int) -> Call:
    affine, training = case.affine is not None, case.mode == "training"
    step = [
        *_laid_out(case),
        *(() if affine else (ONES,)),
        "leaves = [chainer.Variable(array) for array in (x, weight, bias)]",
    ]
    if training:
        step += [
            "y = chainer.functions.batch_normalization(*leaves, "
            f"eps={case.eps!r}, decay={_old(case)},",
            "    running_mean=running_mean, running_var=running_var)",
        ]
    else:
        step.append(
            "y = chainer.functions.fixed_batch_normalization("
            f"*leaves, running_mean, running_var, eps={case.eps!r})"
        )
    if case.backward:
        step.append("gradients = chainer.grad([y], leaves, [chainer.Variable(grad_output)])")
    return Call(
        ("import chainer",),
        tuple(step),
        {
            "y": "y.array",
            "batch_mean": "y.creator.mean",
            "batch_var": "y.creator.var",
            "invstd": "y.creator.inv_std",
            "running_mean": "running_mean",
            "running_var": "running_var",
            **{name: f"gradients[{i}].array" for i, name in enumerate(GRADIENTS)},
        },
    )


def _mindspore(case: Case, threads: int) -> Call:
    training = case.mode == "training"
    step = [
        *(() if case.affine is not None else (ONES,)),
        "leaves = [mindspore.Tensor(a) for a in (x, weight, bias)]",
        "running = [mindspore.Parameter(mindspore.Tensor(a)) for a in (running_mean, running_var)]",
        f"operator = mindspore.ops.BatchNorm(is_training={training}, epsilon={case.eps!r}, "
        f"momentum={_momentum(case)})",
    ]
    if case.backward:
        step += [
            "def forward(*leaves):",
            "    outputs = operator(*leaves, *running)",
            "    return outputs[0], outputs",
            "",
            "_, pull, found = mindspore.vjp(forward, *leaves, has_aux=True)",
            "gradients = pull(mindspore.Tensor(grad_output))",
        ]
    else:
        step.append("found = operator(*leaves, *running)")
    return Call(
        ("import mindspore", "", 'mindspore.set_context(device_target="CPU")'),
        tuple(step),
        {
            "y": "found[0].asnumpy()",
            "batch_mean": "found[3].asnumpy()",
            "batch_var": "found[4].asnumpy()",
            "running_mean": "running_mean",
            "running_var": "running_var",
            **{name: f"gradients[{i}].asnumpy()" for i, name in enumerate(GRADIENTS)},
        },
        left=("running_mean, running_var = (array.asnumpy() for array in running)",),
        environ={"OMP_NUM_THREADS": str(threads)},
    )


def _nnabla(case: Case, threads: int) -> Call:
    affine, training = case.affine is not None, case.mode == "training"
    kind = "half" if case.dtype == "float16" else "float"
    step = [
        "def variable(array):",
        "    made = nnabla.Variable(array.shape, need_grad=True)",
        "    made.d, made.g = array, 0",
        "    return made",
        "",
        f"shape = {(1, case.channels) + (1,) * (len(case.shape) - 2)}",
        "given = variable(x)",
        "affine = [variable(a.reshape(shape)) for a in (bias, weight)]"
        if affine
        else "affine = [None, None]",
        "running = [variable(a.reshape(shape)) for a in (running_mean, running_var)]",
        f'context = nnabla.ext_utils.get_extension_context("cpu", type_config="{kind}")',
        "with nnabla.context_scope(context):",
        "    found = nnabla.functions.batch_normalization(given, *affine, *running, axes=[1],",
        f"        decay_rate={_old(case)}, eps={case.eps!r}, batch_stat={training}, "
        f"output_stat={training})",
        f"    y = {'found[0]' if training else 'found'}",
        "    y.forward()",
        *(("    y.backward(np.ascontiguousarray(grad_output))",) if case.backward else ()),
    ]
    return Call(
        ("import nnabla", "import nnabla.ext_utils", "import nnabla.functions"),
        tuple(step),
        {
            "y": "y.d",
            "batch_mean": "found[1].d.ravel()",
            "batch_var": "found[2].d.ravel()",
            "running_mean": "running_mean",
            "running_var": "running_var",
            "grad_input": "given.g",
            "grad_weight": "affine[1].g.ravel()",
            "grad_bias": "affine[0].g.ravel()",
        },
        left=("running_mean, running_var = (array.d.ravel() for array in running)",),
        environ={"OMP_NUM_THREADS": str(threads)},
    )


def _megengine(case: Case, threads: int) -> Call:
    affine, training = case.affine is not None, case.mode == "training"
    four = "{}.reshape(1, -1, 1, 1)"
    step = [
        *(() if affine else (ONES,)),
        "def tensor(array):",
        '    return megengine.tensor(np.array(array, order="C"), device="cpux")',
        "",
        f"affine = [tensor({four.format('a')}) for a in (weight, bias)]",
        f"running = [tensor({four.format('a')}) for a in (running_mean, running_var)]",
        f"leaves = [tensor(x){', *affine' if affine else ''}]",
        "with megengine.autodiff.GradManager().attach(leaves) as manager:",
        "    found = megengine.functional.nn.batch_norm(leaves[0], *running, *affine,",
        f"        training={training}, momentum={_old(case)}, eps={case.eps!r}, inplace=False)",
        f"    y, *running = {'found' if training else '[found, *running]'}",
        *(("    manager.backward([y], [tensor(grad_output)])",) if case.backward else ()),
    ]
    return Call(
        ("import megengine", "import megengine.autodiff", "import megengine.functional"),
        tuple(step),
        {
            "y": "y.numpy()",
            "running_mean": "running_mean",
            "running_var": "running_var",
            **{
                name: f"leaves[{i}].grad.numpy(){'.ravel()' if i else ''}"
                for i, name in enumerate(GRADIENTS)
            },
        },
        left=("running_mean, running_var = (tensor.numpy().ravel() for tensor in running)",),
        environ={"OMP_NUM_THREADS": str(threads)},
    )


# --- functions of NumPy arrays ---------------------------------------------------------------------


def _function(
    imports: tuple[str, ...], case: Case, threads: int, convert: tuple[str, ...], options: str
) -> Call:
    """A function with the signature of a plug-in, which may return a dict."""
    affine = "weight, bias" if case.affine is not None else "None, None"
    gradient = "grad_output" if case.backward else "None"
    step = [
        *_laid_out(case),
        *convert,
        f"out = batch_norm(x, {affine}, running_mean, running_var, {options}, "
        f"grad_output={gradient})",
        'out = out if isinstance(out, dict) else {"y": out}',
    ]
    left = tuple(f'{name} = out.get("{name}", {name})' for name in ("running_mean", "running_var"))
    names = ("y", "batch_mean", "batch_var", "invstd", *GRADIENTS)
    values = {name: f'out["{name}"]' for name in names}
    values.update(running_mean="running_mean", running_var="running_var")
    numbers = dict.fromkeys(
        ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), str(threads)
    )
    return Call(imports, tuple(step), values, left=left, environ=numbers)


def _plugin(backend: str, case: Case, threads: int) -> Call:
    target, name, device = plugin.split(backend)
    folder, module = Path.cwd(), target
    if target.endswith(".py"):
        path = Path(target)
        try:
            source = path.read_text(encoding="utf-8")
        except OSError as error:
            raise NoCallError(f"the plug-in {path} cannot be read: {error.strerror}") from error
        wants_torch = re.search(rf"^(class {name}\b|{name}\.tensors\s*=\s*.torch)", source, re.M)
        if device == "cuda" or wants_torch:
            raise NoCallError(f"{backend} takes torch tensors; a script is made for NumPy plug-ins")
        folder, module = path.resolve().parent, path.stem
    imports: tuple[str, ...] = (
        f"sys.path.insert(0, {str(folder)!r})",
        f"from {module} import {name}" + ("" if name == "batch_norm" else " as batch_norm"),
    )
    convert: list[str] = []
    if "bfloat16" in (case.dtype, case.parameter_dtype):
        imports = ("import ml_dtypes", *imports)
        names = ["x", "grad_output"] if case.backward else ["x"]
        if case.parameter_dtype == "bfloat16":
            names += ["running_mean", "running_var"]
            names += ["weight", "bias"] if case.affine is not None else []
        convert = [f"{name} = {name}.astype(ml_dtypes.bfloat16)" for name in names]
    return _function(imports, case, threads, tuple(convert), _options(case))


def _specimen(backend: str, case: Case, threads: int) -> Call:
    entry = BACKENDS[backend]
    package = "bnaudit.worker.backends"
    function = getattr(importlib.import_module(f"{package}.{entry.module}"), entry.function)
    is_widened = getattr(function, "widened", False)
    if "float16" in case.dtype and not is_widened:
        raise NoCallError(
            f"there is no script for {backend} in {case.dtype}, which bnaudit's worker hands over as bits"
        )
    names = [
        *(("x",) if case.dtype == "float16" else ()),
        *(("grad_output",) if case.dtype == "float16" and case.backward else ()),
        *(("running_mean", "running_var") if case.parameter_dtype == "float16" else ()),
        *(("weight", "bias") if case.parameter_dtype == "float16" and case.affine else ()),
    ]
    convert = tuple(f"{name} = {name}.astype(np.float32)" for name in names)
    imports = (
        "# A specimen, which is bnaudit's own code:",
        f"from {package}.{entry.module} import {entry.function} as batch_norm",
    )
    options = _options(case)
    if getattr(function, "counts_steps", False):
        step = "step + 1" if case.steps > 1 else "1"
        training = case.mode == "training"
        options = f"training={training}, momentum={case.momentum!r}, eps={case.eps!r}, step={step}"
    call = _function(imports, case, threads, convert, options)
    if case.dtype != "float16":
        return call
    rounded = {name: f'out["{name}"].astype(np.float16)' for name in ("y", "grad_input")}
    return replace(call, values={**call.values, **rounded})


TEMPLATES: Mapping[str, Callable[[Case, int], Call]] = {
    "torch@cpu": _torch(),
    "torch@cuda": _torch("cuda"),
    "torch-native@cuda": _torch("cuda", (f"{CUDNN}.enabled = False",)),
    "torch-cudnn@cuda": _torch("cuda"),
    "torch-cudnn-benchmark@cuda": _torch("cuda", (f"{CUDNN}.benchmark = True",)),
    "torch-cudnn-deterministic@cuda": _torch("cuda", (f"{CUDNN}.deterministic = True",)),
    "torch-mkldnn@cpu": _mkldnn,
    "torch-compile@cpu": _torch(function=COMPILED),
    "torch-compile@cuda": _torch("cuda", function=COMPILED),
    "jax@cpu": _jax((), _standardize),
    "flax@cpu": _jax(("from flax import linen",), _linen(True)),
    "flax-stable@cpu": _jax(("from flax import linen",), _linen(False)),
    "flax-nnx@cpu": _jax(("from flax import nnx",), _nnx),
    "haiku@cpu": _jax(("import haiku as hk",), _haiku),
    "keras-jax@cpu": _keras("jax"),
    "keras-tensorflow@cpu": _keras("tensorflow"),
    "keras-torch@cpu": _keras("torch"),
    "tensorflow@cpu": _tensorflow("fused"),
    "tensorflow-nchw@cpu": _tensorflow("fused", last=False),
    "tensorflow-moments@cpu": _tensorflow("moments"),
    "tensorflow-xla@cpu": _tensorflow("xla"),
    "tensorflow-1@cpu": _tensorflow_1,
    "onnxruntime@cpu": _onnxruntime,
    "mlx@cpu": _mlx,
    "tinygrad@cpu": _tinygrad,
    "paddle@cpu": _paddle,
    "mxnet@cpu": _mxnet,
    "chainer@cpu": _chainer,
    "mindspore@cpu": _mindspore,
    "nnabla@cpu": _nnabla,
    "megengine@cpu": _megengine,
}
"""By backend; plug-ins and specimens are called as functions of NumPy arrays."""

"""Writes the graphs of this folder with exporters that are not ours; no test runs this.

Every function in `GROUPS` belongs to one exporter. One environment cannot hold all of them, so
those that cannot be imported are skipped with the reason. The committed files were made on Python
3.11 in these environments, in this order, as modelopt and others read what torch wrote:

    torch transformers onnxruntime optimizers
        pip install torch==2.13.0 onnxscript==0.7.2 onnx==1.23.2 onnxruntime==1.32.0
        pip install transformers==5.24.0 onnxslim==0.1.98
    modelopt
        pip install "nvidia-modelopt[onnx]==0.47.0" torch==2.13.0
    sklearn
        pip install skl2onnx==1.20.0 scikit-learn==1.9.1 onnx==1.16.1
    keras
        pip install keras==3.15.1 tensorflow-cpu==2.21.0 tf2onnx==1.17.0 onnx==1.23.2
    jax
        pip install jax2onnx==0.17.1 flax==0.12.8 jax==0.10.2 onnx==1.23.2
    paddle
        pip install paddlepaddle==3.3.1 paddle2onnx==2.1.0 onnx==1.17.0 packaging

    python tests/corpus/make.py GROUP ...

All weights are random with fixed seeds: the same versions write the same bytes, except that tf2onnx
keeps now one and now another of equal constants. ``manifest.json`` gets what a file is and who made
it. What fusion must do with it ("fused": sizes of the groups, "left": reason codes, "error" where
reading it must fail) is a judgement, written there by hand, and kept when the file is made again.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx

FOLDER = Path(__file__).parent
MANIFEST = FOLDER / "manifest.json"


def save(name: str, model: onnx.ModelProto, about: str, exporter: str) -> None:
    """Write one graph and its line in the manifest."""
    forget_the_machine(model)
    data = model.SerializeToString(deterministic=True)
    (FOLDER / f"{name}.onnx").write_bytes(data)
    manifest = json.loads(MANIFEST.read_text()) if MANIFEST.exists() else {}
    opset = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
    known = manifest.get(name, {})
    judged = {key: known[key] for key in ("fused", "left", "note", "error") if key in known}
    manifest[name] = {
        "about": about,
        "exporter": f"{exporter}, opset {opset}",
        "producer": f"{model.producer_name} {model.producer_version}".strip(),
        **judged,
    }
    text = json.dumps(dict(sorted(manifest.items())), indent=2, ensure_ascii=False)
    MANIFEST.write_text(text + "\n")
    print(f"{name}: {len(data) / 1000:.0f} kB")


def forget_the_machine(model: onnx.ModelProto) -> None:
    """Drop stack traces: they hold the paths of whoever exported, and outweigh the graph."""
    del model.metadata_props[:], model.graph.metadata_props[:]
    nodes = [*model.graph.node, *(node for f in model.functions for node in f.node)]
    values = [*model.graph.input, *model.graph.output, *model.graph.value_info]
    for part in (*nodes, *values, *model.graph.initializer):
        part.doc_string = ""
        del part.metadata_props[:]


def read(name: str) -> onnx.ModelProto:
    """A graph that another group wrote."""
    return onnx.load(FOLDER / f"{name}.onnx")


def installed(*packages: str) -> str:
    """Names and versions of packages."""
    return ", ".join(f"{name} {version(name).split('+')[0]}" for name in packages)


# torch and transformers


def torch_both() -> None:
    """`torch.onnx.export` with ``dynamo=True``, and the older exporter with ``dynamo=False``."""
    import torch
    from cases import CASES

    for name, case in CASES.items():
        for dynamo, opset in ((True, case.dynamo), (False, case.script)):
            if opset is None:
                continue
            torch.manual_seed(0)
            module = case.build()
            for norm in module.modules():  # running statistics as after training
                if isinstance(norm, torch.nn.BatchNorm2d):
                    torch.nn.init.uniform_(norm.running_mean, -0.3, 0.3)
                    torch.nn.init.uniform_(norm.running_var, 0.5, 1.5)
            x = torch.randn(case.shape)
            if case.half:
                module, x = module.half(), x.half()
            model = export_torch(
                module, {"x": x}, opset, dynamo=dynamo, open_batch=not case.fixed, plain=case.plain
            )
            kind = "dynamo" if dynamo else "script"
            save(f"torch_{kind}_{name}", model, case.about, f"{installed('torch')} dynamo={dynamo}")


def export_torch(
    module: Any,
    inputs: dict[str, Any],
    opset: int,
    *,
    dynamo: bool,
    open_batch: bool = True,
    plain: bool = False,
) -> onnx.ModelProto:
    """One call of `torch.onnx.export`."""
    import torch

    names = list(inputs)
    options: dict[str, Any]
    if dynamo:
        shapes = tuple({0: torch.export.Dim("batch")} for _ in names)
        options = {"dynamic_shapes": shapes if open_batch else None, "optimize": not plain}
    else:
        axes = {name: {0: "batch"} for name in names} if open_batch else None
        options = {"dynamic_axes": axes, "do_constant_folding": not plain}
    with tempfile.TemporaryDirectory() as folder, quiet():
        path = Path(folder) / "model.onnx"
        torch.onnx.export(
            module.eval(), tuple(inputs.values()), path, opset_version=opset, dynamo=dynamo,
            input_names=names, external_data=False, verbose=False, **options,
        )  # fmt: skip
        return onnx.load(path)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Exporters talk a lot."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def transformers_both() -> None:
    """Tiny models of Hugging Face from a config, with M heads on what they pool."""
    import torch
    from transformer_networks import cases

    for name, case in cases().items():
        for dynamo, opset in ((True, case.dynamo), (False, case.script)):
            if opset is not None:
                torch.manual_seed(0)
                model = export_torch(case.build(), case.inputs, opset, dynamo=dynamo)
                kind = "dynamo" if dynamo else "script"
                exporter = f"{installed('transformers', 'torch')} dynamo={dynamo}"
                save(f"transformers_{kind}_{name}", model, case.about, exporter)


# scikit-learn


def sklearn() -> None:
    """skl2onnx."""
    import skl2onnx
    from sklearn.datasets import load_iris
    from sklearn.ensemble import BaggingClassifier, BaggingRegressor, VotingClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.multioutput import MultiOutputRegressor
    from sklearn.neural_network import MLPClassifier, MLPRegressor

    x, y = load_iris(return_X_y=True)
    x = x.astype(np.float32)

    def mlp(seed: int = 0) -> MLPClassifier:
        return MLPClassifier(hidden_layer_sizes=(6,), max_iter=20, random_state=seed)

    models = {
        "bagging_mlp": (
            "BaggingClassifier of four MLPs",
            BaggingClassifier(mlp(), n_estimators=4, random_state=0),
        ),
        "voting_mlp": (
            "VotingClassifier of three MLPs, soft",
            VotingClassifier(
                [(f"m{i}", mlp(i)) for i in range(3)], voting="soft", flatten_transform=False
            ),
        ),
        "voting_logistic": (
            "VotingClassifier of four logistic regressions, soft",
            VotingClassifier(
                [(f"m{i}", LogisticRegression(C=10.0**-i)) for i in range(4)],
                voting="soft",
                flatten_transform=False,
            ),
        ),
        "bagging_regressor": (
            "BaggingRegressor of four MLPs",
            BaggingRegressor(
                MLPRegressor(
                    hidden_layer_sizes=(6,), activation="tanh", max_iter=20, random_state=0
                ),
                n_estimators=4,
                random_state=0,
            ),
        ),
        "multioutput": (
            "MultiOutputRegressor: an MLP per target, no common body",
            MultiOutputRegressor(
                MLPRegressor(hidden_layer_sizes=(6,), max_iter=20, random_state=0)
            ),
        ),
    }
    for name, (about, model) in models.items():
        targets = x[:, :3] if name == "multioutput" else y
        with quiet():
            model.fit(x, targets)
            options = {"zipmap": False} if hasattr(model, "classes_") else None
            proto = skl2onnx.to_onnx(model, x[:1], options=options, target_opset=18)
        save(f"skl2onnx_{name}", proto, about, installed("skl2onnx", "scikit-learn"))


# Keras


def keras_both() -> None:
    """Keras' own exporter, and tf2onnx."""
    import keras
    import tensorflow as tf
    import tf2onnx
    from keras import layers

    def dense(features: Any) -> Any:
        y = layers.Dense(8, activation="relu")(features)
        return layers.Dense(5)(y)

    def gelu(x: Any) -> Any:  # without approximation it is an operator that tf2onnx does not know
        return keras.activations.gelu(x, approximate=True)

    def norm(features: Any) -> Any:
        y = layers.LayerNormalization()(layers.Dense(8, activation=gelu)(features))
        return layers.Dense(5, activation="softmax")(y)

    def conv(features: Any) -> Any:
        y = layers.Conv2D(6, 3, padding="same", use_bias=False)(features)
        y = layers.ReLU()(layers.BatchNormalization()(y))
        return layers.Dense(5)(layers.GlobalAveragePooling2D()(y))

    def flat() -> tuple[Any, Any]:
        x = keras.Input((12,))
        return x, layers.Dense(16, activation="relu")(x)

    def image() -> tuple[Any, Any]:
        x = keras.Input((8, 8, 3))
        y = layers.MaxPooling2D()(layers.Conv2D(8, 3, padding="same", activation="relu")(x))
        return x, y

    models = {
        "dense_outputs": ("three MLP heads, three outputs", flat, dense, 3, list),
        "dense_stack": (
            "four MLP heads, keras.ops.stack",
            flat, dense, 4, lambda ys: keras.ops.stack(ys, axis=1),
        ),
        "norm_average": (
            "four heads with LayerNormalization and softmax, Average",
            flat, norm, 4, lambda ys: layers.Average()(ys),
        ),
        "conv_concatenate": (
            "three convolutional heads, channels last, Concatenate",
            image, conv, 3, lambda ys: layers.Concatenate()(ys),
        ),
    }  # fmt: skip
    for name, (about, body, head, m, join) in models.items():
        keras.utils.set_random_seed(0)
        x, features = body()
        model = keras.Model(x, join([head(features) for _ in range(m)]))
        model(np.zeros((2, *x.shape[1:]), np.float32))  # the exporter asks for one call
        with tempfile.TemporaryDirectory() as folder, quiet():
            path = Path(folder) / "model.onnx"
            model.export(path, format="onnx", verbose=False, opset_version=17)
            proto = onnx.load(path)
        save(f"keras_{name}", proto, about, installed("keras", "tf2onnx", "tensorflow-cpu"))
        if name not in ("dense_outputs", "conv_concatenate"):
            continue  # Keras calls tf2onnx itself, so two are enough
        with quiet():
            spec = tf.TensorSpec((None, *x.shape[1:]), tf.float32, name="x")
            proto, _ = tf2onnx.convert.from_function(tf.function(model), [spec], opset=15)
        save(f"tf2onnx_{name}", proto, about, installed("tf2onnx", "tensorflow-cpu"))


# rewritten by tools


def onnxruntime_quantized() -> None:
    """`quantize_static` of ONNX Runtime, in the settings people use."""
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    signed = {"activation_type": QuantType.QInt8, "weight_type": QuantType.QInt8}
    unsigned = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QUInt8}
    mixed = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
    symmetric = {"ActivationSymmetric": True, "WeightSymmetric": True}
    settings = {
        "mlp_stack_symmetric": (signed, True, {**symmetric, "QuantizeBias": False}),
        "mlp_stack_default": (mixed, False, {}),
        "mlp_stack_unsigned": (unsigned, False, {}),
        "mlp_stack_channel": (signed, True, {}),
        "vqa_cat_symmetric": (signed, True, symmetric),
        "residual_stack_channel": (mixed, True, {"QuantizeBias": False}),
        "conv_cat_symmetric": (signed, False, symmetric),
        "sequence_stack_channel": (signed, True, symmetric),
    }
    for name, (types, per_channel, extra) in settings.items():
        source = "torch_dynamo_" + name.rpartition("_")[0]
        with tempfile.TemporaryDirectory() as folder, quiet():
            prepared, written = Path(folder) / "a.onnx", Path(folder) / "b.onnx"
            quant_pre_process(FOLDER / f"{source}.onnx", prepared, skip_symbolic_shape=True)
            quantize_static(
                prepared, written, Samples(read(source)), quant_format=QuantFormat.QDQ,
                per_channel=per_channel, extra_options=extra, **types,
            )  # fmt: skip
            model = onnx.load(written)
        kinds = "/".join(str(kind) for kind in types.values())
        about = f"{source}, Q/DQ, activations/weights {kinds}, per_channel={per_channel}, {extra}"
        save(f"ort_int8_{name}", model, about, installed("onnxruntime"))


class Samples:
    """Random calibration data, in the form ONNX Runtime reads it."""

    def __init__(self, model: onnx.ModelProto) -> None:
        rng = np.random.default_rng(0)
        self.batches = iter([feeds(model, rng) for _ in range(8)])

    def get_next(self) -> dict[str, Any] | None:
        return next(self.batches, None)


def feeds(model: onnx.ModelProto, rng: np.random.Generator) -> dict[str, Any]:
    """Normal inputs for a batch of two."""
    found = {}
    for value in model.graph.input:
        shape = [dim.dim_value or 2 for dim in value.type.tensor_type.shape.dim]
        found[value.name] = rng.standard_normal(shape).astype(np.float32)
    return found


def modelopt() -> None:
    """int8 of NVIDIA ModelOpt."""
    from modelopt.onnx.quantization import quantize

    for name in ("wide_stack", "residual_stack"):  # layers of less than 16 stay as they are
        source = f"torch_dynamo_{name}"
        data = feeds(read(source), np.random.default_rng(0))
        with tempfile.TemporaryDirectory() as folder, quiet():
            path = Path(folder) / "model.onnx"
            quantize(
                str(FOLDER / f"{source}.onnx"), quantize_mode="int8", calibration_data=data,
                calibration_method="max", output_path=str(path), high_precision_dtype="fp32",
                calibration_eps=["cpu"],
            )  # fmt: skip
            model = onnx.load(path)
        save(f"modelopt_int8_{name}", model, f"{source} in int8", installed("nvidia-modelopt"))


def optimizers() -> None:
    """Graphs that an optimizer has been through."""
    import onnxruntime as ort
    import onnxslim

    for name in ("attention_stack", "gated_stack"):
        source = f"torch_script_{name}"
        with quiet():
            model = onnxslim.slim(read(source))
        save(f"onnxslim_{name}", model, f"{source}, simplified", installed("onnxslim"))
    levels = ort.GraphOptimizationLevel
    for name, level in (
        ("extended_vqa_opset13", levels.ORT_ENABLE_EXTENDED),
        ("extended_mlp_stack", levels.ORT_ENABLE_EXTENDED),
    ):
        source = f"torch_script_{name.partition('_')[2]}"
        options = ort.SessionOptions()
        options.graph_optimization_level, options.log_severity_level = level, 3
        with tempfile.TemporaryDirectory() as folder:
            options.optimized_model_filepath = str(Path(folder) / "model.onnx")
            ort.InferenceSession(FOLDER / f"{source}.onnx", options, ["CPUExecutionProvider"])
            model = onnx.load(options.optimized_model_filepath)
        save(f"ort_{name}", model, f"{source}, optimized, {level.name}", installed("onnxruntime"))


# JAX


def jax_exporter() -> None:
    """jax2onnx of Flax modules, written out and with `vmap`."""
    import jax
    from flax import nnx
    from jax2onnx import to_onnx

    class Mlp(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.first, self.second = nnx.Linear(16, 8, rngs=rngs), nnx.Linear(8, 5, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            return self.second(nnx.gelu(self.first(x)))

    class Student(nnx.Module):
        def __init__(self, rngs: nnx.Rngs, m: int, mean: bool) -> None:
            self.body, self.mean = nnx.Linear(12, 16, rngs=rngs), mean
            self.heads = nnx.List([Mlp(rngs) for _ in range(m)])

        def __call__(self, x: Any) -> Any:
            features = nnx.relu(self.body(x))
            ys = jax.numpy.stack([head(features) for head in self.heads])
            return jax.nn.softmax(ys).mean(0) if self.mean else ys

    keys = jax.random.split(jax.random.key(0), 3)
    body = jax.random.normal(keys[0], (12, 16))
    weights = jax.random.normal(keys[1], (4, 16, 5))
    biases = jax.random.normal(keys[2], (4, 5))

    def mapped(x: Any) -> Any:
        features = jax.nn.relu(x @ body)
        return jax.vmap(lambda weight, bias: features @ weight + bias)(weights, biases)

    models = {
        "mlp_stack": ("four MLP heads, jnp.stack", lambda: Student(nnx.Rngs(0), 4, False)),
        "mlp_mean": ("three MLP heads, mean of softmax", lambda: Student(nnx.Rngs(0), 3, True)),
        "vmap": ("four heads in one vmap: batched already", lambda: mapped),
    }
    for name, (about, build) in models.items():
        with quiet():
            model = to_onnx(build(), inputs=[("B", 12)], model_name="student")
        save(f"jax2onnx_{name}", model, about, installed("jax2onnx", "flax", "jax"))


# Paddle


def paddle_exporter() -> None:
    """paddle2onnx of ``paddle.onnx.export``."""
    import paddle
    from paddle import nn

    class Student(nn.Layer):
        def __init__(self, m: int) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(12, 16), nn.ReLU())
            self.heads = nn.LayerList(
                [nn.Sequential(nn.Linear(16, 8), nn.Hardswish(), nn.Linear(8, 5)) for _ in range(m)]
            )

        def forward(self, x: Any) -> Any:
            features = self.body(x)
            return paddle.stack([head(features) for head in self.heads])

    paddle.seed(0)
    spec = paddle.static.InputSpec([None, 12], "float32", "x")
    with tempfile.TemporaryDirectory() as folder, quiet():
        path = Path(folder) / "model"
        paddle.onnx.export(Student(4).eval(), str(path), [spec], opset_version=17)
        model = onnx.load(f"{path}.onnx")
    about = "four MLP heads with hardswish, paddle.stack"
    save("paddle_mlp_stack", model, about, installed("paddle2onnx", "paddlepaddle"))


GROUPS: dict[str, Callable[[], None]] = {
    "torch": torch_both,
    "transformers": transformers_both,
    "sklearn": sklearn,
    "keras": keras_both,
    "onnxruntime": onnxruntime_quantized,
    "modelopt": modelopt,
    "optimizers": optimizers,
    "jax": jax_exporter,
    "paddle": paddle_exporter,
}


def run(group: str) -> None:
    """Write the graphs of one exporter, if it is installed."""
    try:
        GROUPS[group]()
    except ImportError as exc:
        print(f"{group}: skipped, {exc}")


if __name__ == "__main__":
    for group in sys.argv[1:] or GROUPS:
        run(group)

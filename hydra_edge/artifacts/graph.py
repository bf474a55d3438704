"""`Graph`: an ONNX model plus what hydra-edge knows about it.

On disk it is a plain ``.onnx`` file; our knowledge travels as JSON in
``metadata_props["hydra_edge"]``, so Netron, ONNX Runtime and Polygraphy open it like any model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError, EncodeError

from hydra_edge import weightless
from hydra_edge.artifacts.files import read_bytes, sha256, write_atomic
from hydra_edge.errors import ArtifactError, GraphError, HydraError

METADATA_KEY = "hydra_edge"
# One protobuf message holds 2 GB; what is not weights needs some of it.
WHOLE_BYTES = 2**31 - 2**26
_ALIGNMENT = 4096  # of weights in a data file, so that a runtime can map them into memory
METADATA_SCHEMA = 1

_TEXT, _OPTIONAL_TEXT = (str,), (str, type(None))
_FIELD_TYPES: Mapping[str, tuple[type, ...]] = {
    "task": _OPTIONAL_TEXT,
    "kind": _TEXT,
    "heads": (int, type(None)),
    "logits": _OPTIONAL_TEXT,
    "labels": (list,),
    "precision": _TEXT,
    "calibration_sha256": _OPTIONAL_TEXT,
    "fusion": (list, type(None)),
    "provenance": (list,),
}

Json = str | int | float | bool | None | Sequence["Json"] | Mapping[str, "Json"]


@dataclass(frozen=True)
class TensorSpec:
    """Name, numpy dtype and shape of a tensor; a shape entry is a size or the name of an axis."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype}[{', '.join(map(str, self.shape))}]"

    @classmethod
    def from_value_info(cls, value: onnx.ValueInfoProto) -> TensorSpec:
        """Read a graph input or output; unknown axes are ``?``, unknown types ``unknown``."""
        tensor = value.type.tensor_type
        known = tensor.elem_type and tensor.elem_type in onnx.TensorProto.DataType.values()
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type) if known else None
        shape = tuple(
            d.dim_value if d.dim_value > 0 else (d.dim_param or "?") for d in tensor.shape.dim
        )
        return cls(value.name, str(np.dtype(dtype)) if dtype is not None else "unknown", shape)


@dataclass(frozen=True)
class FusionGroup:
    """One set of M parallel branches that the fusion pass looked at.

    Attributes:
        source: The tensor all branches leave.
        heads: M, the number of branches.
        ops: The operators of one branch, first to last.
        fused: Whether the branches became grouped ops.
        reason: Why not, for people; empty when fused.
        code: Why not, for programs: see `hydra_edge.branches`.
        join: How they meet: stack, concat, sum, mean, max, min, or tensors (each on its own).
        members: Which of all that meet there the M are.
        flops_per_sample: Two per multiply-add of all M, at batch 1.
        weight_bytes: Bytes of the weights of all M.
    """

    source: str
    heads: int
    ops: tuple[str, ...]
    fused: bool
    reason: str = ""
    code: str = ""
    join: str = ""
    members: tuple[int, ...] = ()
    flops_per_sample: int = 0
    weight_bytes: int = 0


@dataclass(frozen=True)
class Metadata:
    """What hydra-edge knows about a graph.

    Attributes:
        task: File name under ``hydra_edge/tasks``, or None when nobody said.
        kind: ``"student"``, ``"ensemble"``, ``"member"`` or ``"model"``.
        heads: M, or None when unknown.
        logits: Name of the per-head tensor ``[M, B, C]`` among the outputs, or None.
        labels: Names of the C outputs, or empty.
        precision: What was asked for, e.g. ``"fp32"`` or ``"int8"``.
        calibration_sha256: Digest of the calibration data, or None.
        fusion: What the fusion pass found, or None when it has not run.
        provenance: The stages that made this graph, first to last.
    """

    task: str | None = None
    kind: str = "model"
    heads: int | None = None
    logits: str | None = None
    labels: tuple[str, ...] = ()
    precision: str = "fp32"
    calibration_sha256: str | None = None
    fusion: tuple[FusionGroup, ...] | None = None
    provenance: tuple[str, ...] = ()

    def to_json(self) -> str:
        """One JSON line with sorted keys, so equal metadata gives equal bytes."""
        return json.dumps({"schema": METADATA_SCHEMA, **asdict(self)}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Metadata:
        """Read what `to_json` wrote.

        Raises:
            ArtifactError: The text is not metadata of this or an older schema.
        """
        try:
            data = json.loads(text)
            schema = data.pop("schema")
            if schema > METADATA_SCHEMA:
                raise ArtifactError(
                    f"The graph's hydra_edge metadata has schema {schema}.",
                    f"This version reads up to schema {METADATA_SCHEMA}.",
                    "Upgrade hydra-edge.",
                )
            for name, kinds in _FIELD_TYPES.items():
                if not isinstance(data[name], kinds):
                    raise TypeError(f"{name} is {data[name]!r}")
            data["labels"] = tuple(str(label) for label in data["labels"])
            data["provenance"] = tuple(str(step) for step in data["provenance"])
            if data["fusion"] is not None:
                data["fusion"] = tuple(
                    FusionGroup(
                        **{
                            **group,
                            "ops": tuple(group["ops"]),
                            "members": tuple(group.get("members", ())),
                        }
                    )
                    for group in data["fusion"]
                )
            return cls(**data)
        except HydraError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as exc:
            raise ArtifactError(
                "The graph's hydra_edge metadata cannot be read.",
                f"It is not what this version writes: {exc!r}.",
                "Export the graph again, or remove the 'hydra_edge' entry of metadata_props.",
            ) from exc


@dataclass(frozen=True)
class Graph:
    """An ONNX model with our metadata. Stages never change one; they return a new one.

    Attributes:
        model: The model. Treat it as read-only.
        metadata: What hydra-edge knows about it.
    """

    model: onnx.ModelProto = field(repr=False)
    metadata: Metadata = field(default_factory=Metadata)

    def __str__(self) -> str:
        inputs = "; ".join(map(str, self.inputs))
        outputs = "; ".join(map(str, self.outputs))
        nodes = len(self.model.graph.node)
        return f"Graph({self.metadata.kind}, {nodes} nodes: {inputs} -> {outputs})"

    @cached_property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Graph inputs, without those that initializers already feed."""
        constants = {tensor.name for tensor in self.model.graph.initializer}
        return tuple(
            TensorSpec.from_value_info(value)
            for value in self.model.graph.input
            if value.name not in constants
        )

    @cached_property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """Graph outputs in order."""
        return tuple(TensorSpec.from_value_info(value) for value in self.model.graph.output)

    @property
    def fusion(self) -> tuple[FusionGroup, ...]:
        """What the fusion pass did; empty when it has not run."""
        return self.metadata.fusion or ()

    @cached_property
    def data(self) -> bytes:
        """The serialized model with our metadata: the same graph always gives the same bytes.

        Raises:
            GraphError: It is over protobuf's limit of 2 GB.
        """
        try:
            return bytes(self._described(lambda _: None).SerializeToString(deterministic=True))
        except (ValueError, EncodeError) as exc:
            raise GraphError(
                f"The graph cannot be serialized: {exc}.",
                "One protobuf message holds at most 2 GB.",
                "Save it as a file, which may have its weights beside it, or quantize it first.",
            ) from exc

    @property
    def is_large(self) -> bool:
        """Whether the weights do not fit into one protobuf message."""
        return weightless.total_bytes(self.model) > WHOLE_BYTES

    @property
    def sha256(self) -> str:
        """Digest of `data`; of a large model, of the digests of its weights and of the rest."""
        if not self.is_large:
            return sha256(self.data)

        def digest(tensor: onnx.TensorProto) -> onnx.TensorProto:
            return weightless.external(tensor, sha256(_raw(tensor)), 0, 0)

        return sha256(self._described(digest).SerializeToString(deterministic=True))

    def _described(
        self, stub: Callable[[onnx.TensorProto], onnx.TensorProto | None]
    ) -> onnx.ModelProto:
        """The model with our metadata, and ``stub``s for weights that it returns one for."""
        model = weightless.without_data(self.model, stub)
        kept = [prop for prop in model.metadata_props if prop.key != METADATA_KEY]
        del model.metadata_props[:]
        model.metadata_props.extend(kept)
        model.metadata_props.add(key=METADATA_KEY, value=self.metadata.to_json())
        return model

    def derive(self, model: onnx.ModelProto, step: str, **changes: object) -> Graph:
        """The graph a stage returns: a new model, the old metadata, one more provenance step."""
        metadata = replace(self.metadata, **changes)  # type: ignore[arg-type]
        return Graph(model, replace(metadata, provenance=(*metadata.provenance, step)))

    def save(self, path: str | Path) -> Path:
        """Write a plain ``.onnx`` file, atomically.

        The weights of a large model go into a second file beside it, ``NAME.onnx.DIGEST.data``,
        which is written first; the digest in its name keeps an older model's weights whole.
        """
        if not self.is_large:
            return write_atomic(path, self.data)
        path = Path(path)
        location = f"{path.name}.{self.sha256[:16]}.data"
        large: list[onnx.TensorProto] = []
        end = 0

        def stub(tensor: onnx.TensorProto) -> onnx.TensorProto | None:
            nonlocal end
            if weightless.size_of(tensor) <= weightless.SMALL_BYTES:
                return None
            large.append(tensor)
            length = len(_raw(tensor))
            start, end = end, end + -(-length // _ALIGNMENT) * _ALIGNMENT
            return weightless.external(tensor, location, start, length)

        model = self._described(stub).SerializeToString(deterministic=True)
        write_atomic(path.parent / location, _aligned(iter(large)))
        return write_atomic(path, model)

    @classmethod
    def load(cls, path: str | Path) -> Graph:
        """Read an ``.onnx`` file written by anybody.

        Raises:
            ArtifactError: It is missing, not ONNX, invalid, or its external data is missing.
        """
        path = Path(path)
        graph = cls.parse(read_bytes(path, "an ONNX model"), str(path), check=False)
        try:
            onnx.load_external_data_for_model(graph.model, str(path.parent))
            onnx.checker.check_model(str(path) if graph.is_large else graph.model)
        except (onnx.checker.ValidationError, ValueError, OSError) as exc:
            raise _not_onnx(str(path), str(exc).strip().splitlines()[0]) from exc
        return graph

    @classmethod
    def parse(cls, data: bytes, origin: str = "the given bytes", *, check: bool = True) -> Graph:
        """Read a serialized model.

        Args:
            data: The bytes of an ``.onnx`` file.
            origin: Where they come from, for error messages.
            check: Run the ONNX checker.

        Raises:
            ArtifactError: They are not a valid ONNX model.
        """
        model = onnx.ModelProto()
        try:
            model.ParseFromString(data)
            if not model.ir_version or not (model.graph.node or model.graph.output):
                raise DecodeError("it holds no graph")
            # What is not UTF-8 comes out of protobuf as bytes.
            if not all(isinstance(name, str) for name in _names(model)):
                raise DecodeError("a name in it is not text")
            if check:
                onnx.checker.check_model(model)
        except (DecodeError, onnx.checker.ValidationError, ValueError) as exc:
            raise _not_onnx(origin, str(exc).strip().splitlines()[0]) from exc
        metadata = Metadata()
        for prop in model.metadata_props:
            if prop.key == METADATA_KEY:
                metadata = Metadata.from_json(prop.value)
        return cls(model, metadata)


def _raw(tensor: onnx.TensorProto) -> bytes:
    """The data of a tensor as it lies in a file."""
    if tensor.HasField("raw_data"):
        return bytes(tensor.raw_data)
    again = onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor))
    return bytes(again.raw_data)


def _aligned(tensors: Iterator[onnx.TensorProto]) -> Iterator[bytes]:
    for tensor in tensors:
        raw = _raw(tensor)
        yield raw
        yield bytes(-len(raw) % _ALIGNMENT)


def _names(model: onnx.ModelProto) -> Iterator[object]:
    graph = model.graph
    for node in (*graph.node, *(node for function in model.functions for node in function.node)):
        yield from (node.name, node.op_type, node.domain, *node.input, *node.output)
    for item in (*graph.input, *graph.output, *graph.initializer, *graph.value_info):
        yield item.name


def _not_onnx(origin: str, reason: str) -> ArtifactError:
    return ArtifactError(
        f"'{origin}' is not a valid ONNX model.",
        f"Reading it failed: {reason.rstrip('.')}.",
        "Check that it is a complete .onnx file, and that external data files lie beside it.",
    )

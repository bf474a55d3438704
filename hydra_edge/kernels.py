"""Our CUDA kernels from Python: `group_linear`, `head_chain`, `ensemble_summary`.

Arrays are device arrays of torch, cupy or pycuda; anything with ``__cuda_array_interface__`` (or
pycuda's ``gpudata``) will do. Nothing is allocated or copied here: the caller brings every array,
and the launch goes to the stream it names. The C interface is ``kernels/hydra_kernels.h``.

    library = kernels.load()
    shape = LinearShape(heads=8, batch=4, inputs=512, outputs=1000, x_type=FLOAT16,
                        weight_type=INT8, y_type=FLOAT32)
    library.group_linear(shape, LinearArguments(x=x, weight=packed, weight_scale=scale, y=y))
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydra_edge.errors import CompilationError, InputError, MissingDependencyError

FLOAT32, FLOAT16, BFLOAT16, INT8, INT4 = range(5)
ACTIVATIONS = ("none", "relu", "gelu", "silu", "tanh")
SUMMARIES = ("none", "softmax", "sigmoid", "gaussian")
MAX_LAYERS = 4
_NAMES = ("libhydra_kernels.so",)
_int, _pointer, _float = ctypes.c_int32, ctypes.c_void_p, ctypes.c_float


class _Structure(ctypes.Structure):
    def __repr__(self) -> str:
        names = (field[0] for field in self._fields_)
        return f"{type(self).__name__}({', '.join(f'{n}={getattr(self, n)!r}' for n in names)})"


class Device(_Structure):
    """What the choice of a configuration depends on."""

    _fields_ = (("compute_capability", _int), ("sm_count", _int), ("shared_bytes", _int))


class LinearShape(_Structure):
    """One linear layer of M heads; see ``hydra_linear_shape``."""

    _fields_ = tuple(
        (name, _int)
        for name in (
            *("heads", "batch", "inputs", "outputs", "x_type", "weight_type", "y_type"),
            *("x_per_head", "quantize_x", "group", "activation", "summary"),
        )
    )


class LinearConfig(_Structure):
    """How the work of `LinearShape` is shared out."""

    _fields_ = tuple(
        (name, _int)
        for name in (
            *("batch_tiles", "row_tiles", "row_warps", "k_warps", "overlap", "prefer_library"),
            "prefer_summary_alone",
        )
    )


class SummaryOutputs(_Structure):
    """Where a summary goes: five arrays, of Gaussian ones three."""

    _fields_ = tuple(
        (name, _pointer)
        for name in (
            *("mean", "predictive_entropy", "expected_entropy"),
            *("mutual_information", "variation_ratio"),
        )
    )


class LinearArguments(_Structure):
    """The arrays of `LinearShape`, as device addresses."""

    _fields_ = (
        ("x", _pointer),
        ("weight", _pointer),
        ("weight_scale", _pointer),
        ("group_scale", _pointer),
        ("bias", _pointer),
        ("x_scale", _pointer),
        ("x_scale_per_head", _int),
        ("y", _pointer),
        ("y_scale", _pointer),
        ("y_scale_per_head", _int),
        ("summary", SummaryOutputs),
        ("counters", _pointer),
    )


class ChainShape(_Structure):
    """A whole MLP head; see ``hydra_chain_shape``."""

    _fields_ = (
        ("heads", _int),
        ("batch", _int),
        ("layers", _int),
        ("widths", _int * (MAX_LAYERS + 1)),
        ("x_type", _int),
        ("weight_type", _int),
        ("x_per_head", _int),
        ("quantize_x", _int),
        ("group", _int),
        ("activations", _int * MAX_LAYERS),
        ("norms", _int * MAX_LAYERS),
        ("summary", _int),
    )


class ChainConfig(_Structure):
    """How the work of `ChainShape` is shared out."""

    _fields_ = tuple(
        (name, _int)
        for name in (
            *("batch_tiles", "warps", "slices", "overlap", "prefer_layers"),
            "prefer_summary_alone",
        )
    )


class ChainLayer(_Structure):
    """The arrays of one layer of a chain."""

    _fields_ = (
        ("weight", _pointer),
        ("weight_scale", _pointer),
        ("group_scale", _pointer),
        ("bias", _pointer),
        ("x_scale", _pointer),
        ("x_scale_per_head", _int),
        ("gamma", _pointer),
        ("beta", _pointer),
        ("epsilon", _float),
    )


class ChainArguments(_Structure):
    """The arrays of `ChainShape`."""

    _fields_ = (
        ("x", _pointer),
        ("layers", ChainLayer * MAX_LAYERS),
        ("y", _pointer),
        ("summary", SummaryOutputs),
        ("counters", _pointer),
    )


class SummaryShape(_Structure):
    """Logits ``[M, B, C]`` and what to make of them."""

    _fields_ = tuple((name, _int) for name in ("kind", "heads", "batch", "outputs", "logits_type"))


class SummaryConfig(_Structure):
    """How the work of `SummaryShape` is shared out."""

    _fields_ = tuple((name, _int) for name in ("rows", "head_threads", "class_threads", "slices"))


def address(array: Any) -> int | None:
    """Where a device array begins.

    Raises:
        InputError: It does not live on a CUDA device, or is not contiguous.
    """
    if array is None or isinstance(array, int):
        return array
    gpudata = getattr(array, "gpudata", None)  # pycuda
    if gpudata is not None:
        return int(gpudata)
    if getattr(array, "is_cuda", False):  # torch: its interface knows no bfloat16
        contiguous, start = array.is_contiguous(), array.data_ptr()
    else:
        interface = getattr(array, "__cuda_array_interface__", None)
        if interface is None:
            raise InputError(
                f"A {type(array).__module__}.{type(array).__name__} was given to a CUDA kernel.",
                "It tells no device address.",
                "Pass a torch tensor on 'cuda', or an array of cupy or pycuda.",
            )
        contiguous, start = interface.get("strides") is None, interface["data"][0]
    if not contiguous:
        raise InputError(
            "An array with strides was given to a CUDA kernel.",
            "The kernels read consecutive elements.",
            "Make it contiguous first.",
        )
    return int(start)


class Library:
    """``libhydra_kernels``, with failures as exceptions.

    Args:
        path: The shared library.

    Raises:
        MissingDependencyError: It cannot be loaded.
    """

    def __init__(self, path: Path) -> None:
        try:
            self.handle = ctypes.CDLL(str(path))
        except OSError as error:
            raise MissingDependencyError(
                f"{path} cannot be loaded: {error}.",
                "It needs the CUDA driver and runtime that it was built for.",
                "Build it on this machine: cmake --preset dev && cmake --build --preset dev.",
            ) from error
        self.handle.hydra_last_error.restype = ctypes.c_char_p
        self.handle.hydra_weight_layout.restype = ctypes.c_char_p
        for name in ("summary_workspace", "linear_shared_bytes", "chain_shared_bytes"):
            getattr(self.handle, f"hydra_{name}").restype = ctypes.c_size_t

    @property
    def weight_layout(self) -> str:
        """The layout that weights must be packed in; `hydra_edge.ops.packing.LAYOUT` is ours."""
        return str(self.handle.hydra_weight_layout().decode())

    def device(self) -> Device:
        """The current CUDA device."""
        device = Device()
        self._check(self.handle.hydra_query_device(ctypes.byref(device)))
        return device

    def choose_linear(self, shape: LinearShape, device: Device) -> LinearConfig:
        """How `group_linear` would share out its work on a device."""
        config = LinearConfig()
        self._check(
            self.handle.hydra_choose_linear(
                ctypes.byref(shape), ctypes.byref(device), ctypes.byref(config)
            )
        )
        return config

    def linear_shared_bytes(self, shape: LinearShape, config: LinearConfig) -> int:
        """Shared memory of a block of `group_linear`."""
        return int(self.handle.hydra_linear_shared_bytes(ctypes.byref(shape), ctypes.byref(config)))

    def chain_shared_bytes(self, shape: ChainShape, config: ChainConfig) -> int:
        """Shared memory of a block of `head_chain`."""
        return int(self.handle.hydra_chain_shared_bytes(ctypes.byref(shape), ctypes.byref(config)))

    def choose_chain(self, shape: ChainShape, device: Device) -> ChainConfig:
        """How `head_chain` would share out its work on a device."""
        config = ChainConfig()
        self._check(
            self.handle.hydra_choose_chain(
                ctypes.byref(shape), ctypes.byref(device), ctypes.byref(config)
            )
        )
        return config

    def choose_summary(self, shape: SummaryShape, device: Device) -> SummaryConfig:
        """How `ensemble_summary` would share out its work on a device."""
        config = SummaryConfig()
        self._check(
            self.handle.hydra_choose_summary(
                ctypes.byref(shape), ctypes.byref(device), ctypes.byref(config)
            )
        )
        return config

    def group_linear(
        self,
        shape: LinearShape,
        arguments: LinearArguments,
        config: LinearConfig | None = None,
        stream: int = 0,
    ) -> None:
        """Enqueue one linear layer of all heads; without `config` it is chosen.

        Raises:
            InputError: Shape or arguments make no sense.
            CompilationError: There is no kernel for them, or CUDA refused the launch.
        """
        self._launch(self.handle.hydra_group_linear, shape, config, arguments, stream)

    def head_chain(
        self,
        shape: ChainShape,
        arguments: ChainArguments,
        config: ChainConfig | None = None,
        stream: int = 0,
    ) -> None:
        """Enqueue whole MLP heads in one launch; raises as `group_linear`."""
        self._launch(self.handle.hydra_head_chain, shape, config, arguments, stream)

    def summary_workspace(self, shape: SummaryShape, config: SummaryConfig) -> int:
        """Bytes of device memory, zeroed once, that `ensemble_summary` needs."""
        return int(self.handle.hydra_summary_workspace(ctypes.byref(shape), ctypes.byref(config)))

    def ensemble_summary(
        self,
        shape: SummaryShape,
        logits: int,
        outputs: SummaryOutputs,
        config: SummaryConfig | None = None,
        workspace: int | None = None,
        stream: int = 0,
    ) -> None:
        """Enqueue the summary of logits; raises as `group_linear`."""
        status = self.handle.hydra_ensemble_summary(
            ctypes.byref(shape),
            None if config is None else ctypes.byref(config),
            _pointer(logits),
            ctypes.byref(outputs),
            _pointer(workspace),
            _pointer(stream),
        )
        self._check(status)

    def _launch(
        self,
        function: Callable[..., int],
        shape: ctypes.Structure,
        config: ctypes.Structure | None,
        arguments: ctypes.Structure,
        stream: int,
    ) -> None:
        status = function(
            ctypes.byref(shape),
            None if config is None else ctypes.byref(config),
            ctypes.byref(arguments),
            _pointer(stream),
        )
        self._check(status)

    def _check(self, status: int) -> None:
        if status == 0:
            return
        what, _, rest = self.handle.hydra_last_error().decode().partition(". ")
        why, _, fix = rest.partition(". ")
        kind = InputError if status == 1 else CompilationError
        raise kind(f"{what}.", f"{why}.", fix)


def load(path: Path | None = None) -> Library:
    """The kernels' library: `path`, or the one that was installed with hydra-edge.

    Raises:
        MissingDependencyError: It is not there, or cannot be loaded.
    """
    candidates = [path] if path else [Path(__file__).parent / name for name in _NAMES]
    for candidate in candidates:
        if candidate.exists():
            return Library(candidate)
    raise MissingDependencyError(
        f"{candidates[0].name} is not there.",
        "No file has that path."
        if path
        else "hydra-edge was installed without nvcc, and works without the CUDA kernels.",
        "Install it again where nvcc is on the PATH, or build it by hand: see kernels/README.md.",
    )

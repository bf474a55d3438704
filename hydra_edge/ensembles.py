"""`Ensemble` and `Hydra`: torch modules whose forward gives every head's output, ``[M, B, C]``.

Also what builds and stores them: head factories, modules from ``pkg.module:function``, and weights
as safetensors files, which unlike pickles cannot run code when they are read.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import safetensors
import safetensors.torch
import torch
from torch import nn

from hydra_edge import factories, tasks
from hydra_edge.artifacts.files import write_atomic
from hydra_edge.errors import ArtifactError, InputError

_ACTIVATIONS: Mapping[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
}
_NORMS: Mapping[str, type[nn.Module]] = {"layer": nn.LayerNorm, "batch": nn.BatchNorm1d}
_MAX_HIDDEN_LAYERS = 3


class Ensemble(nn.Module):
    """M independent networks for one task.

    Attributes:
        members: The networks; each maps the same inputs to ``[B, C]``.
        task: File name under ``hydra_edge/tasks``.
        labels: Names of the C outputs, or empty.
        heads: M, the number of members.

    Raises:
        InputError: There is no member, one is not a module, or the task is unknown.
    """

    def __init__(
        self,
        members: Sequence[nn.Module],
        task: str = "classification",
        labels: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.members = _module_list(members, "member")
        self.task = _known_task(task)
        self.labels = tuple(labels)
        self.heads = len(self.members)

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Run every member on the same inputs.

        Returns:
            ``[M, B, C]``: the members' raw outputs, in the members' dtype.

        Raises:
            InputError: The members' outputs are not tensors of one shape.
        """
        return _stack([member(*inputs) for member in self.members], "member")

    @classmethod
    def from_checkpoints(
        cls,
        factory: str,
        paths: Sequence[str | Path],
        task: str = "classification",
        labels: Sequence[str] = (),
    ) -> Ensemble:
        """Build one member per safetensors checkpoint.

        Args:
            factory: ``pkg.module:function``; called once per checkpoint.
            paths: The checkpoints.
            task: File name under ``hydra_edge/tasks``.
            labels: Names of the C outputs, or empty.

        Raises:
            InputError: The factory cannot be used, or ``paths`` is empty.
            ArtifactError: A checkpoint is missing, damaged or does not fit the factory's module.
        """
        return cls([load_weights(load_factory(factory), path) for path in paths], task, labels)


class Hydra(nn.Module):
    """One shared body and M heads, each of which imitates a member of an ensemble.

    Attributes:
        body: Maps the inputs to the features that all heads read.
        heads: Each maps the features to ``[B, C]``.
        task: File name under ``hydra_edge/tasks``.
        labels: Names of the C outputs, or empty.

    Raises:
        InputError: There is no head, one is not a module, or the task is unknown.

    Source: Tran et al. 2020, arXiv 2001.04694.
    """

    def __init__(
        self,
        body: nn.Module,
        heads: Sequence[nn.Module],
        task: str = "classification",
        labels: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.body = body
        self.heads = _module_list(heads, "head")
        self.task = _known_task(task)
        self.labels = tuple(labels)

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Run the body once and every head on its features.

        Returns:
            ``[M, B, C]``: the heads' raw outputs, in the heads' dtype.

        Raises:
            InputError: The heads' outputs are not tensors of one shape.
        """
        features = self.body(*inputs)
        return _stack([head(features) for head in self.heads], "head")


def linear_heads(count: int, features: int, outputs: int) -> list[nn.Module]:
    """Heads of one linear layer each.

    Args:
        count: M, the number of heads.
        features: K, the size of the body's features ``[B, K]``.
        outputs: C, the size of a head's output.

    Returns:
        The heads, independently initialised.

    Raises:
        InputError: A size is below 1.
    """
    _check_sizes(count=count, features=features, outputs=outputs)
    return [nn.Linear(features, outputs) for _ in range(count)]


def mlp_heads(
    count: int,
    features: int,
    outputs: int,
    hidden: Sequence[int] = (64,),
    activation: Literal["relu", "gelu", "silu", "tanh"] = "relu",
    norm: Literal["layer", "batch"] | None = None,
) -> list[nn.Module]:
    """Heads of one to three hidden layers and a linear output layer.

    Args:
        count: M, the number of heads.
        features: K, the size of the body's features ``[B, K]``.
        outputs: C, the size of a head's output.
        hidden: Width of each hidden layer.
        activation: Follows every hidden layer.
        norm: Stands between a hidden layer and its activation; None for none.

    Returns:
        The heads, independently initialised.

    Raises:
        InputError: A size is below 1, there are not 1 to 3 hidden layers, or a name is unknown.
    """
    _check_sizes(count=count, features=features, outputs=outputs)
    for index, width in enumerate(hidden):
        _check_sizes(**{f"hidden[{index}]": width})
    if not 1 <= len(hidden) <= _MAX_HIDDEN_LAYERS:
        raise InputError(
            f"hidden has {len(hidden)} layers.",
            f"MLP heads have 1 to {_MAX_HIDDEN_LAYERS}; a deeper head costs what a member costs.",
            "Use linear_heads for none, or move layers into the body.",
        )
    if activation not in _ACTIVATIONS:
        raise _unknown("activation", activation, _ACTIVATIONS)
    if norm is not None and norm not in _NORMS:
        raise _unknown("norm", norm, _NORMS)

    def head() -> nn.Module:
        layers: list[nn.Module] = []
        width = features
        for size in hidden:
            layers.append(nn.Linear(width, size))
            if norm is not None:
                layers.append(_NORMS[norm](size))
            layers.append(_ACTIVATIONS[activation]())
            width = size
        return nn.Sequential(*layers, nn.Linear(width, outputs))

    return [head() for _ in range(count)]


def residual_heads(count: int, stage: nn.Module, features: int, outputs: int) -> list[nn.Module]:
    """Heads of a network's last residual stage, global average pooling and a linear layer.

    Args:
        count: M, the number of heads.
        stage: Gives ``[B, features, H', W']``; it is copied, never changed.
        features: The stage's output channels.
        outputs: C, the size of a head's output.

    Returns:
        The heads, independently initialised through each submodule's ``reset_parameters``.

    Raises:
        InputError: A size is below 1, or a submodule has parameters and no ``reset_parameters``.
    """
    _check_sizes(count=count, features=features, outputs=outputs)
    return [
        nn.Sequential(
            _reinitialised(stage),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(features, outputs),
        )
        for _ in range(count)
    ]


def load_factory(factory: str) -> nn.Module:
    """Import ``pkg.module:function`` and call it.

    The current directory is importable meanwhile, as with ``python -m``.

    Args:
        factory: Module and attribute, with a colon between them; the attribute takes no arguments.

    Returns:
        The module it returned.

    Raises:
        InputError: The text is malformed, or importing or calling it does not give a module.
    """
    made = factories.call(factory)
    if not isinstance(made, nn.Module):
        raise InputError(
            f"'{factory}' returned a {type(made).__name__}.",
            "A factory returns a torch.nn.Module.",
            "Return the model itself, not its weights or a tuple.",
        )
    return made


def save_weights(module: nn.Module, path: str | Path) -> Path:
    """Write a module's parameters and buffers to a safetensors file, atomically.

    Tied tensors are stored once; the file's metadata gives the name of each alias's original, as
    `safetensors.torch.save_model` does.

    Args:
        module: Any module.
        path: The file to write.

    Returns:
        The path written.

    Raises:
        InputError: The module's state holds something that is not a tensor.
        ArtifactError: The file cannot be written.
    """
    state = tensor_state(module)
    tied = _tied_names(state)
    tensors = {
        # A clone, because safetensors refuses views that share storage in part.
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in state.items()
        if name not in tied
    }
    data: bytes = safetensors.torch.save(tensors, {"format": "pt", **tied})
    return write_atomic(path, data)


def load_weights(module: nn.Module, path: str | Path) -> nn.Module:
    """Read what `save_weights` or any other safetensors writer wrote into ``module``, in place.

    Args:
        module: A module with the same parameters and buffers.
        path: The safetensors file.

    Returns:
        The same module.

    Raises:
        InputError: The module's state holds something that is not a tensor.
        ArtifactError: The file is missing or damaged, or its tensors are not the module's.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            aliases: dict[str, str] = file.metadata() or {}
    except FileNotFoundError as exc:
        raise ArtifactError(
            f"'{path}' does not exist.", "Expected a safetensors file.", "Check the path."
        ) from exc
    except (safetensors.SafetensorError, OSError) as exc:
        raise ArtifactError(
            f"'{path}' cannot be read: {exc}.",
            "Expected a safetensors file; a .pt or .bin file is a pickle, which may run code.",
            "Save the weights with hydra_edge.ensembles.save_weights.",
        ) from exc
    state = tensor_state(module)
    for alias, original in {**_tied_names(state), **aliases}.items():
        for absent, present in ((alias, original), (original, alias)):
            if absent in state and absent not in tensors and present in tensors:
                tensors[absent] = tensors[present]
    differences = _differences(state, tensors)
    if differences:
        raise ArtifactError(
            f"'{path}' does not fit {type(module).__name__}: {'; '.join(differences)}.",
            "Weights load only into the module they were saved from.",
            "Use the factory that built the saved module, or another checkpoint.",
        )
    module.load_state_dict(tensors)
    return module


def tensor_state(module: nn.Module) -> dict[str, torch.Tensor]:
    """A module's parameters and persistent buffers by name.

    Raises:
        InputError: The module's state holds something that is not a tensor.
    """
    state: dict[str, torch.Tensor] = module.state_dict()
    for name, value in state.items():
        if not isinstance(value, torch.Tensor):
            raise InputError(
                f"State entry '{name}' is a {type(value).__name__}.",
                "A safetensors file holds tensors only.",
                "Register it as a buffer, or leave it out of get_extra_state.",
            )
    return state


def _module_list(modules: Sequence[nn.Module], kind: str) -> nn.ModuleList:
    if not modules:
        raise InputError(
            f"There is no {kind}.", f"A model has at least one {kind}.", f"Pass a list of {kind}s."
        )
    for index, module in enumerate(modules):
        if not isinstance(module, nn.Module):
            raise InputError(
                f"{kind.capitalize()} {index} is a {type(module).__name__}.",
                f"Every {kind} is a torch.nn.Module.",
                "Pass the modules themselves.",
            )
    return nn.ModuleList(modules)


def _known_task(name: str) -> str:
    tasks.find(name)
    return name


def _stack(outputs: Sequence[torch.Tensor], kind: str) -> torch.Tensor:
    # Shapes are compared only after a failure: a comparison becomes a guard in an exported graph.
    try:
        return torch.stack(list(outputs))
    except (RuntimeError, TypeError) as exc:
        for index, output in enumerate(outputs):
            if not isinstance(output, torch.Tensor):
                raise InputError(
                    f"{kind.capitalize()} {index} returned a {type(output).__name__}.",
                    f"Every {kind} gives one tensor [B, C].",
                    "Wrap it in a module that returns that tensor.",
                ) from exc
            if output.shape != outputs[0].shape:
                raise InputError(
                    f"{kind.capitalize()} {index} gives {list(output.shape)} "
                    f"but {kind} 0 gives {list(outputs[0].shape)}.",
                    f"The outputs of all {kind}s are stacked into [M, B, C] and must match.",
                    f"Give all {kind}s the same number of outputs.",
                ) from exc
        raise


def _check_sizes(**sizes: int) -> None:
    for name, value in sizes.items():
        if value < 1:
            raise InputError(
                f"{name} is {value}.", "Sizes start at 1.", f"Give {name} of 1 or more."
            )


def _unknown(what: str, value: str, known: Mapping[str, type[nn.Module]]) -> InputError:
    return InputError(
        f"Unknown {what} '{value}'.",
        f"There are {', '.join(known)}.",
        "Pick one of those, or build the heads yourself: any list of modules will do.",
    )


def _reinitialised(stage: nn.Module) -> nn.Module:
    stage = copy.deepcopy(stage)
    for name, module in stage.named_modules():
        reset = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()
        elif next(module.parameters(recurse=False), None) is not None:
            raise InputError(
                f"Submodule '{name or 'stage'}' ({type(module).__name__}) has no reset_parameters.",
                "The heads would start with equal weights there and lose diversity.",
                "Give the class a reset_parameters method, or build the heads yourself.",
            )
    return stage


def _tied_names(state: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Names whose tensor is the same memory as one of an earlier name, and that name."""
    first: dict[object, str] = {}
    tied: dict[str, str] = {}
    for name, value in state.items():
        if value.numel():  # empty tensors have no memory to share
            key = (value.device, value.data_ptr(), value.dtype, value.shape, value.stride())
            original = first.setdefault(key, name)
            if original != name:
                tied[name] = original
    return tied


def _differences(
    state: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor]
) -> list[str]:
    both = [name for name in state if name in tensors]
    shapes = [
        f"{name} {list(tensors[name].shape)} instead of {list(state[name].shape)}"
        for name in both
        if tensors[name].shape != state[name].shape
    ]
    groups = {
        "missing": [name for name in state if name not in tensors],
        "unexpected": [name for name in tensors if name not in state],
        "wrong shape": shapes,
    }
    return [f"{title}: {_first_few(names)}" for title, names in groups.items() if names]


def _first_few(names: Sequence[str], limit: int = 8) -> str:
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest

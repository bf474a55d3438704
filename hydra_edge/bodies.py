"""Bodies by name: networks of Hugging Face's transformers and of timm, without their heads.

    transformers:vit                  a kind of model, with random weights
    transformers:./folder             weights and config in a local folder
    transformers:owner/name           from the Hub, through the library's own cache
    timm:resnet18                     random weights, or from the Hub with pretrained = true

Neither library is needed for anything else. Nothing is downloaded unless the name asks for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hydra_edge.errors import HydraError, InputError, require

_POOLS = ("auto", "first", "mean", "max")
_OWN = {"inputs", "pool", "pretrained"}


class Body(nn.Module):
    """A network that gives features ``[B, K]`` for the heads.

    Attributes:
        network: The library's model.
        features: K.
        inputs: Names that the inputs are passed by, in order; empty for by position.
        pool: ``"first"`` token, ``"mean"`` or ``"max"`` over tokens; ``"auto"`` is what the model
            pools itself, or the mean.
    """

    def __init__(
        self, network: nn.Module, features: int, inputs: Sequence[str] = (), pool: str = "auto"
    ) -> None:
        super().__init__()
        self.network = network
        self.features = features
        self.inputs = tuple(inputs)
        self.pool = pool

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Features ``[B, K]``.

        Raises:
            InputError: The number of inputs is not that of ``inputs``.
        """
        if not self.inputs:
            answer = self.network(*inputs)
        elif len(inputs) == len(self.inputs):
            answer = self.network(**dict(zip(self.inputs, inputs, strict=True)))
        else:
            raise InputError(
                f"The body got {len(inputs)} inputs.",
                f"It passes them on as {', '.join(self.inputs)}.",
                "Give as many arrays as that, or name other inputs in options.inputs.",
            )
        return self._pooled(answer)

    def _pooled(self, answer: Any) -> torch.Tensor:
        if isinstance(answer, torch.Tensor):
            hidden = answer
        else:
            pooled = getattr(answer, "pooler_output", None)
            if pooled is not None and self.pool == "auto":
                found: torch.Tensor = pooled.flatten(1)
                return found
            hidden = answer.last_hidden_state
        if hidden.ndim == 2:
            return hidden
        # Tokens [B, T, K], or a map of features [B, K, H, W].
        tokens = hidden if hidden.ndim == 3 else hidden.flatten(2).transpose(1, 2)
        if self.pool == "first":
            return tokens[:, 0]
        return tokens.amax(1) if self.pool == "max" else tokens.mean(1)


def load(name: str, options: Mapping[str, Any], folder: Path | None = None) -> Body:
    """Build a body.

    Args:
        name: ``transformers:…`` or ``timm:…``, as above.
        options: ``inputs``, ``pool`` and ``pretrained`` as above; all others override the
            library's configuration, e.g. ``hidden_size`` of transformers or ``in_chans`` of timm.
        folder: Where relative folders of weights start; the current one by default.

    Raises:
        InputError: The name, an option or the model cannot be used.
        MissingDependencyError: The library is not installed.
    """
    library, colon, model = name.partition(":")
    pool = options.get("pool", "auto")
    if not (colon and model) or library not in ("transformers", "timm"):
        raise InputError(
            f"'{name}' does not name a body.",
            "A body is written as library, colon, model.",
            "Write it like 'transformers:vit' or 'timm:resnet18', or use a factory.",
        )
    if pool not in _POOLS:
        raise InputError(f"pool is '{pool}'.", f"There are {', '.join(_POOLS)}.", "Pick one.")
    build = _transformers if library == "transformers" else _timm
    config = {key: value for key, value in options.items() if key not in _OWN}
    try:
        return build(model, config, options, folder or Path())
    except HydraError:
        raise
    except Exception as exc:  # whatever the library raises about a name or an option
        raise InputError(
            f"{library} cannot build '{model}' with {config}: {exc}.",
            "The name or an option is not one that it knows, or its files are not there.",
            f"Check both in the documentation of {library}.",
        ) from exc


def _transformers(
    model: str, config: Mapping[str, Any], options: Mapping[str, Any], folder: Path
) -> Body:
    hf = require("transformers", "transformers")
    local = folder / model
    if local.is_dir():
        network = hf.AutoModel.from_pretrained(local, local_files_only=True, **config)
    elif "/" in model:
        network = hf.AutoModel.from_pretrained(model, **config)
    else:
        network = hf.AutoModel.from_config(hf.AutoConfig.for_model(model, **config))
    network = network.float().train()
    inputs = options.get("inputs", (network.main_input_name,))
    features = getattr(network.config, "hidden_size", None)
    if not isinstance(features, int):
        sizes = getattr(network.config, "hidden_sizes", None)
        features = sizes[-1] if sizes else 0
    return Body(network, features, inputs, options.get("pool", "auto"))


def _timm(model: str, config: Mapping[str, Any], options: Mapping[str, Any], folder: Path) -> Body:
    timm = require("timm", "timm")
    pretrained = bool(options.get("pretrained", False))
    network = timm.create_model(model, pretrained=pretrained, num_classes=0, **config)
    return Body(network, int(network.num_features), (), options.get("pool", "auto"))

"""A user's project in a folder: networks, data and a recipe."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from hydra_edge.ensembles import save_weights

MODULE = """
import time
import numpy as np
import torch
from torch import nn
import hydra_edge as he


def member():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def wide():
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3))


def student():
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU())
    return he.Hydra(body, he.mlp_heads(3, 8, 3, (4,)))


def body():
    return nn.Linear(6, 8)


def data():
    return np.random.default_rng(0).random((64, 6)).astype("float32")


def slow(x, generator):
    time.sleep(0.2)
    return x


def quick(x, generator):
    return x
"""

RECIPE = """
workdir = "run"
output = "student.safetensors"
data = "{module}:data"
{augment}

[[members]]
factory = "{module}:member"
weights = ["member-*.safetensors"]

[[members]]
factory = "{module}:wide"
weights = "wide.safetensors"

{predictions}

[student]
factory = "{module}:student"

[distillation]
epochs_mean = 1
epochs_heads = 3
batch_size = 16
checkpoint_steps = 1
{distillation}
"""


def write(folder: Path, module: str, **parts: str) -> Path:
    """Networks, weights and a recipe; the module has a name of its own, as modules are kept."""
    (folder / f"{module}.py").write_text(MODULE)
    for index in range(3):
        torch.manual_seed(index)
        width = 12 if index == 2 else 8
        network = nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 3))
        name = "wide" if index == 2 else f"member-{index}"
        save_weights(network, folder / f"{name}.safetensors")
    given = {"augment": "", "predictions": "", "distillation": "", **parts}
    path = folder / "recipe.toml"
    path.write_text(RECIPE.format(module=module, **given))
    return path

"""The captioning demo's ensemble: trained once, kept in the demo's folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from hydra_edge.captioning.networks import Captioner
from hydra_edge.captioning.scenes import Scene
from hydra_edge.captioning.training import TrainingConfig, train_captioner
from hydra_edge.demo import caption_networks, scenes
from hydra_edge.ensembles import load_weights, save_weights
from hydra_edge.errors import ArtifactError

SCENES = 3000
EPOCHS = 8
_SEED = 1


def members(folder: Path, on_epoch: Callable[[], None]) -> list[Captioner]:
    """The members, trained or read from ``folder``.

    Args:
        folder: Where ``member-0.safetensors`` and so on are kept.
        on_epoch: Called after every epoch, of which each member has `EPOCHS`.
    """
    found: list[Captioner] = []
    data: list[Scene] = []
    for index in range(caption_networks.HEADS):
        path = folder / f"member-{index}.safetensors"
        network = caption_networks.member()
        try:
            load_weights(network, path)
            for _ in range(EPOCHS):
                on_epoch()
        except ArtifactError:  # not trained yet, or by another version of the demo
            data = data or scenes.draw(SCENES, _SEED)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(index)
                network = caption_networks.member()
            config = TrainingConfig(EPOCHS, batch_size=24, learning_rate=5e-3, seed=index)
            train_captioner(network, data, config, lambda _: on_epoch())
            save_weights(network, path)
        found.append(network.eval())
    return found

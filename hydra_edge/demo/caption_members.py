"""How the captioning demo's ensemble is trained."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable

import torch
from torch import nn

from hydra_edge.captioning.networks import Captioner
from hydra_edge.captioning.scenes import Scene
from hydra_edge.captioning.training import TrainingConfig, train_captioner
from hydra_edge.demo import caption_networks, scenes
from hydra_edge.demo.story import Training

_SEED = 1


def trainings(count: int, epochs: int) -> dict[str, Training]:
    """By name, for `story.trained`; the scenes are drawn once, and only if something is trained.

    Args:
        count: Scenes.
        epochs: Passes over them.
    """
    lock = threading.Lock()  # two members may ask at once

    @functools.cache
    def data() -> list[Scene]:
        return scenes.draw(count, _SEED)

    def one(index: int) -> Training:
        def build() -> Captioner:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(index)
                return caption_networks.member()

        def train(network: nn.Module, on_epoch: Callable[[], None]) -> nn.Module:
            assert isinstance(network, Captioner)
            config = TrainingConfig(epochs, batch_size=24, learning_rate=3e-3, seed=index)
            with lock:
                known = data()
            return train_captioner(network, known, config, lambda _: on_epoch())

        return Training(build, train, epochs)

    return {f"member-{index}": one(index) for index in range(caption_networks.HEADS)}

"""Tiny models of Hugging Face's transformers with several heads, for `make`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import networks
import torch
import transformers as hf
from torch import Tensor, nn

SMALL = {
    "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12,
}  # fmt: skip
TEXT = {"vocab_size": 30, "max_position_embeddings": 12}
IMAGE = {"image_size": 8, "patch_size": 4}


@dataclass(frozen=True)
class Case:
    """A module, example inputs, and the opsets of torch's two exporters."""

    about: str
    build: Callable[[], nn.Module]
    inputs: dict[str, Tensor]
    dynamo: int | None = None
    script: int | None = None


class Pooled(nn.Module):
    """M heads on what a model pools."""

    def __init__(self, base: nn.Module, heads: list[nn.Module], join: networks.Join) -> None:
        super().__init__()
        self.base, self.heads, self.join = base, nn.ModuleList(heads), join

    def answers(self, **inputs: Tensor) -> object:
        pooled = self.base(**inputs).pooler_output
        return self.join([head(pooled) for head in self.heads])


class Image(Pooled):
    def forward(self, pixel_values: Tensor) -> object:
        return self.answers(pixel_values=pixel_values)


class Text(Pooled):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> object:
        return self.answers(input_ids=input_ids, attention_mask=attention_mask)


class ImageAndText(Pooled):
    """Patches come as features: what ViLT does with pixels depends on their values."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, image_embeds: Tensor) -> object:
        return self.answers(
            input_ids=input_ids, attention_mask=attention_mask,
            token_type_ids=torch.zeros_like(input_ids), image_embeds=image_embeds,
            pixel_mask=torch.ones_like(image_embeds[:, :, 0], dtype=torch.long),
        )  # fmt: skip


class Members(nn.Module):
    """An ensemble of whole classifiers."""

    def __init__(self, members: list[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        ys = [m(input_ids=input_ids, attention_mask=attention_mask).logits for m in self.members]
        return torch.stack(ys)


def cases() -> dict[str, Case]:
    """All of them."""
    ids = torch.arange(12).reshape(2, 6) + 1
    pixels = torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)
    text = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def bert(**more: int) -> hf.BertConfig:
        return hf.BertConfig(**SMALL, **TEXT, **more)

    return {
        "vit_stack": Case(
            "tiny ViT, five linear heads",
            lambda: Image(
                hf.ViTModel(hf.ViTConfig(**SMALL, **IMAGE)),
                networks.times(5, lambda: nn.Linear(8, 6)), networks.stack,
            ),
            {"pixel_values": pixels}, dynamo=18,
        ),
        "bert_outputs": Case(
            "tiny BERT, three MLP heads, three outputs",
            lambda: Text(hf.BertModel(bert()), networks.times(3, lambda: networks.mlp(8)), tuple),
            text, script=17,
        ),
        "vilt_stack": Case(
            "tiny ViLT for visual question answering, four of its own classifiers",
            lambda: ImageAndText(
                hf.ViltModel(hf.ViltConfig(**SMALL, **TEXT, **IMAGE)),
                networks.times(4, lambda: networks.vqa(8)), networks.stack,
            ),
            {**text, "image_embeds": torch.linspace(-1, 1, 2 * 5 * 8).reshape(2, 5, 8)}, dynamo=18,
        ),
        "bert_members": Case(
            "an ensemble of three tiny BERTs with their classifiers",
            lambda: Members(
                networks.times(3, lambda: hf.BertForSequenceClassification(bert(num_labels=4)))
            ),
            text, dynamo=18,
        ),
    }  # fmt: skip

"""Visual question answering: data, answers, tokens, and questions to a live engine.

answers   official normalization, agreement of people, the vocabulary of answers
files     VQA v2 as it is published
scenes    a generated data set
tokens    questions as numbers
images    pictures as a model takes them
asking    image and text in, answers and their doubt out
"""

from __future__ import annotations

from hydra_edge.vqa.asking import Answer, Answerer, DeferRule, Reply, equip
from hydra_edge.vqa.tokens import Tokenizer

__all__ = ["Answer", "Answerer", "DeferRule", "Reply", "Tokenizer", "equip"]

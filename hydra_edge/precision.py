"""`Precision`: what body, heads and single layers are stored and multiplied in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from hydra_edge.errors import InputError

PRECISIONS = ("fp32", "fp16", "int8", "int8-weight-only", "int4-weight-only", "fp8")
BLOCKS = (32, 64, 128)
_EXAMPLE = "Write for example 'int8', 'body=int8,heads=fp16' or 'int8,head.3=fp16'."


@dataclass(frozen=True)
class Precision:
    """What the parts of a graph are stored and multiplied in; each one of `PRECISIONS`.

    Attributes:
        body: Everything all heads share.
        heads: Everything that belongs to one head.
        head_overrides: The precision of single heads, by their index.
        layers: The precision of single layers, by node name; stronger than all others.
        block: Rows of a weight that share a scale in int4.
    """

    body: str = "fp32"
    heads: str = "fp32"
    head_overrides: Mapping[int, str] = field(default_factory=dict)
    layers: Mapping[str, str] = field(default_factory=dict)
    block: int = 128

    def __post_init__(self) -> None:
        for part in (self.body, self.heads, *self.head_overrides.values(), *self.layers.values()):
            if part not in PRECISIONS:
                raise InputError(
                    f"Unknown precision '{part}'.", f"There are: {', '.join(PRECISIONS)}.", _EXAMPLE
                )
        if self.block not in BLOCKS:
            raise InputError(
                f"Blocks of {self.block} rows were asked for.",
                f"Runtimes know blocks of {', '.join(map(str, BLOCKS))}.",
                "Use one of those, e.g. 'heads=int4-weight-only,block=64'.",
            )
        # A copy that nobody else holds, and nobody can change.
        for name in ("head_overrides", "layers"):
            frozen = MappingProxyType(dict(sorted(getattr(self, name).items())))
            object.__setattr__(self, name, frozen)

    def __hash__(self) -> int:
        return hash(str(self))

    @classmethod
    def parse(cls, text: str) -> Precision:
        """Read ``"int8"``, ``"body=int8,heads=fp16"`` (a part left out is fp32) and the like.

        ``head.INDEX=…`` and ``layer.NODE=…`` override single heads and layers, ``block=64`` sets
        the block of int4.

        Raises:
            InputError: It says something else, or names a part twice.
        """
        items = [item.strip() for item in text.split(",")]
        parts: dict[str, str] = {}
        for position, item in enumerate(items):
            name, equals, value = item.rpartition("=")
            if not equals and position:
                raise InputError(
                    f"'{item}' in the precision '{text}' names no part.",
                    "Only the first item may stand for body and heads alike.",
                    _EXAMPLE,
                )
            for part in (_plain(name.strip()),) if equals else ("body", "heads"):
                if part in parts:
                    raise InputError(
                        f"The precision '{text}' names a part twice.",
                        "Each part has one precision.",
                        _EXAMPLE,
                    )
                parts[part] = value.strip()
        return cls._of(parts, text)

    @classmethod
    def _of(cls, parts: Mapping[str, str], text: str) -> Precision:
        overrides: dict[int, str] = {}
        layers: dict[str, str] = {}
        block = cls.block
        for part, value in parts.items():
            if _is_head(part):
                overrides[int(part[5:])] = value
            elif part.startswith("layer.") and part[6:]:
                layers[part[6:]] = value
            elif part == "block" and value.isdecimal():
                block = int(value)
            elif part not in ("body", "heads"):
                raise InputError(
                    f"Unknown part '{part}' in the precision '{text}'.",
                    "The parts are body, heads, head.INDEX and layer.NODE, and there is block=….",
                    _EXAMPLE,
                )
        body, heads = parts.get("body", "fp32"), parts.get("heads", "fp32")
        return cls(body, heads, overrides, layers, block)

    def __str__(self) -> str:
        parts = [self.body] if self.body == self.heads else []
        parts = parts or [f"body={self.body}", f"heads={self.heads}"]
        parts += [f"head.{index}={value}" for index, value in self.head_overrides.items()]
        parts += [f"layer.{name}={value}" for name, value in self.layers.items()]
        if "int4-weight-only" in self and self.block != type(self).block:
            parts.append(f"block={self.block}")
        return ",".join(parts)

    def __contains__(self, precision: object) -> bool:
        return precision in {
            self.body,
            self.heads,
            *self.head_overrides.values(),
            *self.layers.values(),
        }

    @property
    def needs_calibration(self) -> bool:
        """Whether activations are quantized."""
        return "int8" in self or "fp8" in self

    @property
    def tells_heads_apart(self) -> bool:
        """Whether it matters which nodes are heads."""
        return self.body != self.heads or bool(self.head_overrides)


def _is_head(part: str) -> bool:
    return part.startswith("head.") and part[5:].isdecimal()


def _plain(part: str) -> str:
    """``head.1`` for ``head.01``, so that they are told to be the same part."""
    return f"head.{int(part[5:])}" if _is_head(part) else part

"""How each operator acts on M branches at once: one rule per operator, grouped by kind.

A rule receives the M equal nodes of one `branches.Step` and emits nodes for all of them. Steps that
a later rule absorbs (a MatMul before its bias, Q/DQ around a layer) are emitted only when something
else reads them.
"""

from __future__ import annotations

from collections.abc import Mapping

from hydra_edge.stacking import convolutions, elementwise, matmuls, quantized, shapes
from hydra_edge.stacking.stacker import Rule

RULES: Mapping[str, Rule] = {
    **elementwise.RULES,
    **shapes.RULES,
    **convolutions.RULES,
    **quantized.RULES,
    **matmuls.RULES,
}

"""From torch to a graph with its uncertainty in it. Exports take seconds, so they are shared."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
import torch
from onnx import TensorProto
from onnx_models import Net, assert_fuses, assert_same, feeds_for, linear, mlp_heads, ops_of
from torch import nn

from hydra_edge.artifacts.graph import Graph, Metadata
from hydra_edge.backends.onnxruntime import evaluate
from hydra_edge.compilation import compile
from hydra_edge.ensembles import Ensemble, Hydra, linear_heads
from hydra_edge.errors import ExportError, GraphError, InputError
from hydra_edge.exporting import export, merge, summarize
from hydra_edge.fusion import fuse
from hydra_edge.ops.ensemble_summary import reference_classification, reference_gaussian
from hydra_edge.quantization import quantize
from hydra_edge.runtime import load

CLASSES = ["cat", "dog", "emu", "fox"]


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().eval()


def head(norm: type[nn.Module]) -> nn.Module:
    layers = [nn.Linear(8, 6), norm(6), nn.GELU(), nn.Dropout(0.5), nn.Linear(6, 4)]
    for module in layers:  # untrained statistics are 0 and 1, which would hide a wrong fold
        if isinstance(module, nn.BatchNorm1d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.normal_(module.weight)
    return nn.Sequential(*layers)


def image_body() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


@pytest.fixture(scope="module")
def student() -> Hydra:
    heads = [head(nn.LayerNorm) for _ in range(3)]
    return seeded(lambda: Hydra(image_body(), heads, labels=CLASSES))  # type: ignore[return-value]


@pytest.fixture(scope="module")
def student_graph(student: Hydra) -> Graph:
    return export(student, np.zeros((1, 3, 8, 8), np.float32))


@pytest.fixture(scope="module")
def members() -> list[nn.Module]:
    torch.manual_seed(1)
    body = [nn.Sequential(nn.Linear(5, 8), nn.SiLU(), head(nn.BatchNorm1d)) for _ in range(3)]
    return [member.eval() for member in body]


@pytest.fixture(scope="module")
def member_graphs(members: list[nn.Module]) -> list[Graph]:
    return [export(member, torch.zeros(1, 5)) for member in members]


def logits_of(model: nn.Module, *inputs: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(*map(torch.from_numpy, inputs)).numpy()


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_a_student_at_any_batch(student: Hydra, student_graph: Graph, batch: int) -> None:
    feeds = feeds_for(student_graph, batch)
    found = evaluate(student_graph.model, feeds)
    logits = logits_of(student, feeds["input"])
    np.testing.assert_allclose(found["head_logits"], logits, rtol=1e-4, atol=1e-5)
    for name, expected in reference_classification(logits).items():
        np.testing.assert_allclose(found[name], expected, rtol=1e-4, atol=1e-5, err_msg=name)


def test_what_a_student_declares(student_graph: Graph) -> None:
    assert [str(spec) for spec in student_graph.inputs] == ["input: float32[batch, 3, 8, 8]"]
    assert [str(spec) for spec in student_graph.outputs] == [
        "mean_prob: float32[batch, 4]",
        "predictive_entropy: float32[batch]",
        "expected_entropy: float32[batch]",
        "mutual_information: float32[batch]",
        "variation_ratio: float32[batch]",
        "head_logits: float32[3, batch, 4]",
    ]
    metadata = student_graph.metadata
    assert (metadata.kind, metadata.task, metadata.heads) == ("student", "classification", 3)
    assert (metadata.labels, metadata.logits) == (tuple(CLASSES), "head_logits")
    assert metadata.provenance == (f"export:torch {torch.__version__}", "summarize:classification")


def test_torch_heads_fuse(student_graph: Graph) -> None:
    fused = assert_fuses(student_graph, rtol=1e-4)
    assert ops_of(fused).count("GroupedMatMul") == 2
    assert ops_of(fused).count("LayerNormalization") == 1


def test_torch_heads_quantize_and_fuse(student_graph: Graph) -> None:
    int8 = quantize(student_graph, "int8", calibration=feeds_for(student_graph, 64))
    fused = fuse(int8)
    assert fused.fusion[0].fused
    assert ops_of(fused).count("QuantizedGroupedMatMul") == 2
    assert_same(fused, int8, rtol=3e-2)


def test_no_trace_of_this_machine(student_graph: Graph, member_graphs: list[Graph]) -> None:
    for graph in (student_graph, *member_graphs):
        for word in (os.getcwd(), str(Path.home()), "site-packages", ".py", "File "):
            assert word.encode() not in graph.data, word


def test_same_module_same_bytes(members: list[nn.Module], member_graphs: list[Graph]) -> None:
    assert export(members[0], torch.zeros(1, 5)).data == member_graphs[0].data


def test_the_example_batch_does_not_matter(
    members: list[nn.Module], member_graphs: list[Graph]
) -> None:
    assert export(members[0], torch.randn(9, 5)).data == member_graphs[0].data


def test_a_module_is_not_changed_and_loggers_neither(members: list[nn.Module]) -> None:
    module = seeded(lambda: nn.Sequential(nn.Linear(5, 2), nn.Dropout()))
    module.train()
    logging.getLogger("torch.onnx").setLevel(logging.DEBUG)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    export(module, torch.zeros(1, 5))
    assert module.training
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert logging.getLogger("torch.onnx").level == logging.DEBUG
    logging.getLogger("torch.onnx").setLevel(logging.NOTSET)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image, self.words = nn.Linear(4, 6), nn.Embedding(10, 6)

    def forward(self, image: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.image(image)) * self.words(ids).mean(1)


def test_two_inputs_and_their_names() -> None:
    student = seeded(lambda: Hydra(TwoInputs(), linear_heads(2, 6, 3)))
    example = (torch.zeros(1, 4), torch.zeros(1, 5, dtype=torch.long))
    graph = export(student, example, input_names=["image", "ids"])
    assert [str(spec) for spec in graph.inputs] == [
        "image: float32[batch, 4]",
        "ids: int64[batch, 5]",
    ]
    rng = np.random.default_rng(0)
    for batch in (1, 3):
        image = rng.standard_normal((batch, 4)).astype(np.float32)
        ids = rng.integers(0, 10, (batch, 5))
        found = evaluate(graph.model, {"image": image, "ids": ids})["head_logits"]
        np.testing.assert_allclose(found, logits_of(student, image, ids), rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="2 example inputs and 1 input names"):
        export(student, example, input_names=["image"])


def test_regression_without_head_logits() -> None:
    student = seeded(
        lambda: Hydra(nn.Linear(4, 6), linear_heads(5, 6, 4), "regression", ["a", "b"])
    )
    graph = export(student, torch.zeros(1, 4), head_logits=False)
    assert [str(spec) for spec in graph.outputs] == [
        "mean: float32[batch, 2]",
        "aleatoric_variance: float32[batch, 2]",
        "epistemic_variance: float32[batch, 2]",
    ]
    assert graph.metadata.logits is None
    feeds = feeds_for(graph)
    expected = reference_gaussian(logits_of(student, feeds["input"]))
    for name, array in evaluate(graph.model, feeds).items():
        np.testing.assert_allclose(array, expected[name], rtol=1e-4, atol=1e-5)
    assert fuse(graph).fusion[0].fused


class Branching(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum() > 0 else -x


class FixedBatch(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(2, 4)


@pytest.mark.parametrize("module", [Branching(), FixedBatch()])
def test_what_torch_cannot_export(module: nn.Module) -> None:
    with pytest.raises(
        ExportError, match=f"Torch cannot export this {type(module).__name__}. It says"
    ):
        export(module, torch.zeros(1, 4))


@pytest.mark.parametrize("example", [np.float32(3), np.zeros((0, 4), np.float32)])
def test_examples_without_a_sample(example: object) -> None:
    with pytest.raises(InputError, match="Example input 0 has shape"):
        export(nn.Linear(4, 2), example)


# merge


def test_merged_members_are_the_torch_ensemble(
    members: list[nn.Module], member_graphs: list[Graph]
) -> None:
    merged = merge(member_graphs, labels=CLASSES)
    assert merged.metadata == Metadata(
        task="classification",
        kind="ensemble",
        heads=3,
        logits="head_logits",
        labels=tuple(CLASSES),
        provenance=("merge:3", "summarize:classification"),
    )
    assert merged.inputs == member_graphs[0].inputs
    ensemble = Ensemble(members)
    for batch in (1, 4):
        feeds = feeds_for(merged, batch)
        found = evaluate(merged.model, feeds)
        logits = logits_of(ensemble, feeds["input"])
        np.testing.assert_allclose(found["head_logits"], logits, rtol=1e-4, atol=1e-5)
        expected = reference_classification(logits)
        np.testing.assert_allclose(found["mean_prob"], expected["mean_prob"], rtol=1e-4, atol=1e-5)
    onnx.checker.check_model(merged.model, full_check=True)
    assert_fuses(merged, rtol=1e-4)  # an ensemble of MLPs fuses from its input on


def member(
    seed: int = 0,
    *,
    k: int = 6,
    c: int = 4,
    opset: int = 20,
    x: str = "x",
    batch: int | str = "batch",
    dtype: int = TensorProto.FLOAT,
    name: str = "y",
) -> Graph:
    net = Net(seed=seed, opset=opset)
    source = net.input(x, (batch, k), dtype)
    value = source if dtype == TensorProto.FLOAT else net.op("Cast", source, to=1)
    y = net.op("Identity", linear(net, net.op("Relu", linear(net, value, k, 5)), 5, c), name=name)
    return net.graph({y: (batch, c)})


def test_merge_of_other_names_and_opsets() -> None:
    graphs = [
        member(0),
        member(1, x="image", name="out", batch="N"),
        member(2, opset=13, name="x2"),
    ]
    merged = merge(graphs)
    feeds = {"x": feeds_for(graphs[0])["x"]}
    found = evaluate(merged.model, feeds)["head_logits"]
    expected = [
        next(iter(evaluate(graph.model, {graph.inputs[0].name: feeds["x"]}).values()))
        for graph in graphs
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_merge_of_one_and_of_many() -> None:
    assert merge([member()]).metadata.heads == 1
    merged = merge([member(seed) for seed in range(20)])
    assert fuse(merged).fusion[0].heads == 20


def test_merge_of_an_output_named_like_ours() -> None:
    assert_fuses(merge([member(seed, name="head_logits") for seed in range(3)]))


def test_merge_with_conditions_inside() -> None:
    """A subgraph reads the shared input too."""

    def conditional(seed: int) -> Graph:
        net = Net(seed=seed)
        x = net.input("x", ("batch", 4))
        positive = net.op("Greater", net.op("ReduceSum", x, keepdims=0), net.const(0))
        branches = [
            onnx.helper.make_graph(
                [onnx.helper.make_node(kind, ["x"], [f"{kind}_out"])],
                kind,
                [],
                [onnx.helper.make_tensor_value_info(f"{kind}_out", 1, ("batch", 4))],
            )
            for kind in ("Exp", "Neg")
        ]
        y = net.op("If", positive, then_branch=branches[0], else_branch=branches[1])
        return net.graph({linear(net, y, 4, 3): ("batch", 3)})

    graphs = [conditional(seed) for seed in range(2)]
    feeds = feeds_for(graphs[0])
    expected = [next(iter(evaluate(graph.model, feeds).values())) for graph in graphs]
    found = evaluate(merge(graphs).model, feeds)["head_logits"]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"k": 7}, r"Member 1 takes x: float32\[batch, 7\]"),
        ({"c": 5}, r"Member 1 gives y: float32\[batch, 5\]"),
        ({"dtype": TensorProto.INT64}, r"Member 1 takes x: int64"),
        ({"batch": 2}, r"Member 1 takes x: float32\[2, 6\]"),
    ],
)
def test_members_that_differ(other: dict[str, int], message: str) -> None:
    with pytest.raises(GraphError, match=message):
        merge([member(), member(**other)])  # type: ignore[arg-type]


def test_members_whose_logits_are_not_clear() -> None:
    two = mlp_heads(kind="outputs")
    names = [spec.name for spec in two.outputs]
    with pytest.raises(GraphError, match=r"Member 0 has the outputs .* Its logits are not clear"):
        merge([two, two])
    merged = merge([two, two], logits=names[1])
    assert [spec.name for spec in merged.outputs if spec.name == "head_logits"] == ["head_logits"]
    with pytest.raises(GraphError, match="there is no 'nothing'"):
        merge([two], logits="nothing")
    with pytest.raises(GraphError, match=r"Member 0 gives logits: .* of shape \[B, C\]"):
        merge([mlp_heads()])


def test_merge_of_nothing() -> None:
    with pytest.raises(InputError, match="no members to merge"):
        merge([])


def test_merge_takes_the_labels_of_the_first_member() -> None:
    graph = member()
    labelled = Graph(graph.model, Metadata(labels=tuple(CLASSES)))
    assert merge([labelled, graph]).metadata.labels == tuple(CLASSES)
    with pytest.raises(InputError, match="There are 2 labels for 4 outputs"):
        merge([labelled, graph], labels=["a", "b"])


# summarize


def test_summarize_refuses_other_ranks_and_names() -> None:
    with pytest.raises(GraphError, match="The per-head outputs 'nothing' cannot be summarized"):
        summarize(mlp_heads(), "classification", "nothing")
    with pytest.raises(GraphError, match=r"The graph gives logits: float32\[batch, 12\]"):
        summarize(mlp_heads(kind="concat1"), "classification", "logits")
    with pytest.raises(GraphError, match=r"float32\[batch, 3, 4\]"):
        summarize(mlp_heads(kind="stack1"), "classification", "logits")
    with pytest.raises(InputError, match="Unknown task 'sorting'"):
        summarize(mlp_heads(), "sorting", "logits")
    with pytest.raises(InputError, match="There are 3 labels for 4 outputs"):
        summarize(mlp_heads(), "classification", "logits", labels=["a", "b", "c"])


def test_summarize_twice_is_refused() -> None:
    once = summarize(mlp_heads(), "classification", "logits")
    with pytest.raises(GraphError, match="The graph has a tensor 'expected_entropy' already"):
        summarize(once, "classification", "head_logits")


def test_what_a_summary_omits_is_not_computed() -> None:
    x = {"x": np.random.default_rng(0).standard_normal((5, 6)).astype(np.float32)}
    whole = summarize(mlp_heads(), "classification", "logits")
    part = summarize(mlp_heads(), "classification", "logits", omit=["variation_ratio"])
    assert [spec.name for spec in whole.outputs if spec.name != "variation_ratio"] == [
        spec.name for spec in part.outputs
    ]
    engine = compile(fuse(part))
    program = onnx.ModelProto.FromString(engine.programs["main"].payload)
    assert "ArgMax" not in {node.op_type for node in program.graph.node}
    expected = evaluate(whole.model, x)
    with load(engine) as session:
        for name, value in session.run(x).items():
            np.testing.assert_allclose(value, expected[name], rtol=1e-5, atol=1e-6)
    with pytest.raises(InputError, match="has no output 'doubt' to leave out"):
        summarize(mlp_heads(), "classification", "logits", omit=["doubt"])


def test_summarize_names_the_per_head_output_and_stacks_separate_ones() -> None:
    x = {"x": np.random.default_rng(0).standard_normal((5, 6)).astype(np.float32)}
    graph = mlp_heads()
    expected = evaluate(graph.model, x)["logits"]
    once = summarize(graph, "classification")
    assert once.metadata.logits == "head_logits"
    assert np.array_equal(evaluate(once.model, x)["head_logits"], expected)
    apart = mlp_heads(kind="outputs")
    names = [spec.name for spec in apart.outputs]
    stacked = summarize(apart, "classification", names)
    assert stacked.outputs[-1].shape == (expected.shape[0], "batch", expected.shape[2])
    found = evaluate(stacked.model, x)
    assert np.array_equal(found["head_logits"], np.stack(list(evaluate(apart.model, x).values())))
    assert fuse(stacked).fusion[0].fused
    with pytest.raises(GraphError, match="not its per-head output"):
        summarize(Graph(_with_tensor_called("head_logits")), "classification", "logits")


def _with_tensor_called(name: str) -> onnx.ModelProto:
    return onnx.parser.parse_model(
        f"""<ir_version: 9, opset_import: ["" : 20]>
        g (float[2, batch, 3] x) => (float[2, batch, 3] logits) {{
        {name} = Relu(x)
        logits = Neg({name}) }}"""
    )


def test_merge_matches_inputs_by_name() -> None:
    def difference(first: str, second: str) -> Graph:
        return Graph(
            onnx.parser.parse_model(
                f"""<ir_version: 9, opset_import: ["" : 20]>
                g (float[batch, 3] {first}, float[batch, 3] {second}) => (float[batch, 3] logits) {{
                logits = Sub(a, b) }}"""
            )
        )

    merged = merge([difference("a", "b"), difference("b", "a")])
    feeds = {"a": np.full((2, 3), 5, np.float32), "b": np.ones((2, 3), np.float32)}
    assert np.array_equal(
        evaluate(merged.model, feeds)["head_logits"], np.full((2, 2, 3), 4, np.float32)
    )


def test_summarize_does_not_change_its_source() -> None:
    graph = mlp_heads()
    before = graph.model.SerializeToString()
    summarize(graph, "classification", "logits")
    assert graph.model.SerializeToString() == before

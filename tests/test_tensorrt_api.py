"""Every name of TensorRT that hydra-edge touches exists in every version it claims to support."""

from __future__ import annotations

from pathlib import Path

import pytest
import tensorrt_api
from tensorrt_api import RTX, TENSORRT
from tensorrt_objects import EVERYDAY, GIVES, NAMES, PLAIN
from tensorrt_usage import judge, uses

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "hydra_edge"
# The full lists, of which tests/data has what is needed, lie beside a checkout where there are any.
LISTS = ROOT.parent / "shared" / "tensorrt_api"
API = tensorrt_api.load()
ALL = (*TENSORRT, RTX)
# Modules that handle TensorRT's objects, and the versions each has to do with.
CLAIMS = {"backends/tensorrt.py": TENSORRT, "backends/tensorrt_rtx.py": (RTX,), "gpu": ALL}


def versions_for(path: Path) -> tuple[str, ...]:
    name = path.relative_to(PACKAGE).as_posix()
    return next(
        (v for claim, v in CLAIMS.items() if name == claim or name.startswith(f"{claim}/")), ()
    )


SOURCES = [path for path in sorted(PACKAGE.rglob("*.py")) if versions_for(path)]


def problems(source: str, versions: tuple[str, ...] = TENSORRT) -> list[str]:
    found, unclear = uses(source)
    return [*unclear, *judge(found, {version: API[version] for version in versions})]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_name_is_there(path: Path) -> None:
    assert problems(path.read_text(), versions_for(path)) == []


def test_the_sources_are_read() -> None:
    """The reader sees names in what builds engines; it would pass everything if it saw none."""
    seen = {(use.owner, use.name) for path in SOURCES for use in uses(path.read_text())[0]}
    assert {
        ("tensorrt", "Builder"),
        ("Builder", "create_network"),
        ("OnnxParser", "num_errors"),
        ("ParserError", "desc"),
        ("IBuilderConfig", "num_compute_capabilities"),
        ("ComputeCapability", "SM*"),
        ("ILogger", "INTERNAL_ERROR"),
        ("IOptimizationProfile", "set_shape"),
    } <= seen


def test_nothing_else_touches_tensorrt() -> None:
    for path in sorted(PACKAGE.rglob("*.py")):
        if path not in SOURCES:
            found, _ = uses(path.read_text())
            assert [use for use in found if use.owner == "tensorrt"] == [], path


@pytest.mark.parametrize(
    "source",
    [
        "trt.BuilderFlag.REFIT",
        "builder = trt.Builder(log)\nbuilder.create_network(0).num_layers",
        "def f(trt: types.ModuleType, network: Any): return network.get_input(0).name.upper()",
        "def f(config: trt.IBuilderConfig): config.max_aux_streams = 2",
        "class A:\n def f(self, trt): self._engine = trt.Runtime(0).deserialize_cuda_engine(b'')\n"
        " def names(self): return self._engine.num_io_tensors",
        "severity = trt.ILogger.Severity\nbad = (severity.ERROR, trt.Logger.WARNING)",
        "flag = getattr(trt.BuilderFlag, 'FP4', None)\nif flag: config.set_flag(flag)",
        "if hasattr(trt.BuilderFlag, 'FP4'):\n config.set_flag(trt.BuilderFlag.FP4)",
        "x = config.l2_limit_for_tiling if hasattr(config, 'l2_limit_for_tiling') else 0",
        "y = hasattr(parser, 'supports_model') and parser.supports_model(b'')",
        "getattr(trt, 'IStreamReaderV2', None)",
        "getattr(trt.DataType, f'INT{bits}')",
        # Of somebody else, whatever it is called.
        "def f(engine: Engine, config: Config | None, trt): return engine.kind, config.anything",
        "class A:\n engine: Engine\n def f(self, trt): return self.engine.kind",
        "config = Config()\nconfig.anything\ntrt",
        "def f(session: Session, trt): return session.engine.kind",
        "import tools\ntools.network.anything\ntrt",
        "class A:\n def f(self): self._context.push()\n"
        " def __init__(self): self._context = cuda.Device(0).retain_primary_context()",
        "from hydra_edge import runtime\nruntime.load('x')",
        "trt.__version__.split('.')",
        "def f(layers: list[dict], trt):\n"
        " return [tensor.get('x') for layer in layers for tensor in layer.get('inputs')]",
        "release.tensorrt.split('.')",
        # In a module that handles nothing of TensorRT's.
        "def f(layer, context): return layer.weights, context.push()",
    ],
)
def test_what_is_right(source: str) -> None:
    assert problems(source) == []


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("trt.BuilderFlag.REFITT", "BuilderFlag.REFITT exists in none of 10.3, 10.8"),
        ("trt.Bilder", "tensorrt.Bilder exists in none"),
        ("import tensorrt\ntensorrt.Bilder", "tensorrt.Bilder exists in none"),
        ("import tensorrt_rtx as x\nx.Bilder", "tensorrt.Bilder exists in none"),
        ("self._trt.Bilder", "tensorrt.Bilder exists in none"),
        ("trt.BuilderFlag.MONITOR_MEMORY", "MONITOR_MEMORY is not in 10.3: ask with getattr"),
        ("trt.AttentionIOForm", "tensorrt.AttentionIOForm is not in 10.3, 10.8, 10.13, 10.16:"),
        ("trt.BuilderFlag.FP16", "BuilderFlag.FP16 is not in 11.4"),
        ("getattr(trt.BuilderFlag, 'FP4')", "FP4 is not in 10.3, 11.4"),
        ("getattr(trt.BuilderFlag, 'FP5', None)", "FP5 exists in none"),
        ("hasattr(network, 'add_mlp')", "add_mlp exists in none"),
        (
            "if hasattr(trt.BuilderFlag, 'FP4'):\n pass\nelse:\n trt.BuilderFlag.FP4",
            "FP4 is not in",
        ),
        ("if hasattr(config, 'FP4'):\n trt.BuilderFlag.FP4", "line 2: BuilderFlag.FP4 is not in"),
        (
            "if not hasattr(trt.BuilderFlag, 'FP4'):\n trt.BuilderFlag.FP4",
            "line 2: BuilderFlag.FP4",
        ),
        ("if hasattr(trt.BuilderFlag, 'FP4') or x:\n trt.BuilderFlag.FP4", "FP4 is not in"),
        ("hasattr(trt.BuilderFlag, 'FP4') or trt.BuilderFlag.FP4", "FP4 is not in"),
        ("trt.BuilderFlag.FP4 if hasattr(trt.BuilderFlag, 'REFIT') else 0", "FP4 is not in"),
        ("config.max_workspace_size = 1\ntrt", "IBuilderConfig.max_workspace_size exists in none"),
        ("config.set_flags += 1\ntrt", "IBuilderConfig.set_flags exists in none"),
        (
            "self._context.execute_async_v2(0)\ntrt",
            "IExecutionContext.execute_async_v2 exists in none",
        ),
        ("built = trt.Builder(log)\nbuilt.create_net(0)", "Builder.create_net exists in none"),
        ("with trt.Builder(log) as b:\n b.create_net(0)", "line 2: Builder.create_net"),
        ("x, y = trt.Builder(log), 1\nx.create_net(0)", "Builder.create_net exists in none"),
        ("(b := trt.Builder(log)).create_net(0)", "Builder.create_net exists in none"),
        ("def f(x: trt.Runtime): x.load()", "Runtime.load exists in none"),
        ("def f(x: 'trt.Runtime | None'): x.load()", "Runtime.load exists in none"),
        (
            "f = lambda network: 0\ng = [network.get_inputs() for i in x]",
            "get_inputs exists in none",
        ),
        ("network.get_input(0).dtype.itemsizes", "DataType.itemsizes exists in none"),
        ("getattr(trt.DataType, f'FLOAT{bits}_')", r"DataType.FLOAT*_ exists in none"),
        ("getattr(trt.DataType, name)", "write the name out"),
        ("getattr(trt.DataType, name, None)", "write the name out"),
        ("builder.reset().foo", "what Builder.reset gives, whose foo is touched"),
        (
            "class A:\n def f(self): self.b.create_net(0)\n"
            " def __init__(self): self.b = trt.Builder(0)",
            "Builder.create_net exists in none",
        ),
        ("def f(product: Product):\n x = product.trt\n x.Bilder", "Bilder exists in none"),
        ("for layer in network: layer.get_inputs()\ntrt", "ILayer.get_inputs exists in none"),
        ("other.engine.kind\ntrt", "ICudaEngine.kind exists in none"),
        (
            "trt.ReduceOperation.SUM",
            "the members of ReduceOperation are not listed: see",
        ),
    ],
)
def test_what_is_wrong(source: str, message: str) -> None:
    assert any(message in problem for problem in problems(source)), problems(source)


def test_versions_are_judged_apart() -> None:
    plugin = "network.add_plugin_v3([], [], p)"
    assert problems(plugin) == []
    assert problems(plugin, ALL) == [
        "line 1: INetworkDefinition.add_plugin_v3 is not in rtx1.7: ask with getattr or hasattr"
    ]
    assert "exists in none of rtx1.7" in problems(plugin, (RTX,))[0]


def test_the_tables_agree_with_the_names() -> None:
    """A misspelt entry would let names pass that it was meant to check."""
    owners = {*tensorrt_api.CLASSES, tensorrt_api.MODULE}
    known = {version: API[version] for version in ALL}
    assert set(NAMES.values()) <= owners
    assert EVERYDAY - set(NAMES) == set()
    for (owner, name), given in GIVES.items():
        assert any(name in names.get(owner, ()) for names in known.values()), (owner, name)
        assert given == PLAIN or given in owners
    for owner in owners:
        assert any(owner in names for names in known.values()), owner


def test_the_copy_is_in_its_canonical_form() -> None:
    assert set(API) == set(ALL)
    assert tensorrt_api.dump(API) == tensorrt_api.FILE.read_text()


def test_the_copy_is_that_of_tensorrt() -> None:
    if not LISTS.is_dir():
        pytest.skip("the full lists of names are not beside this checkout")
    lists = tensorrt_api.of_lists(LISTS)
    assert set(lists) == set(TENSORRT)
    assert lists == {version: API[version] for version in TENSORRT}


def test_the_copy_is_that_of_tensorrt_rtx() -> None:
    library = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    if not library.__version__.startswith(RTX.removeprefix("rtx")):
        pytest.skip(f"tensorrt-rtx {library.__version__} is not the version of the copy")
    assert tensorrt_api.of_rtx() == API[RTX]

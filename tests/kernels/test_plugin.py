"""The TensorRT plugin: `Heads` alone, and, where TensorRT's headers are, the library around it.

Both run the same cases on the emulated kernels. A test marked gpu runs them on a GPU.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from hydra_edge.kernels import BFLOAT16, FLOAT16, INT8, Device, Library, LinearShape
from hydra_edge.ops import packing
from kernels import plugin_programs
from kernels.emulation import KERNELS
from kernels.plugin_case import Case, Results, Run, run_program
from kernels.plugin_programs import EMULATED, Plugin, build_heads, build_plugin, version_of
from kernels.test_group_linear import VARIANTS

CHAIN, LAYERS = 1, 2
BEHIND, ALONE = 1, 2
Program = Callable[[Case], Results]
Real = Callable[[Mapping[str, object]], dict[str, list[str]]]

ORIN = (87, 16, 163 * 1024)
MLP = (40, 24, 10)
WIDE, NARROW = (600, 500, 20), (87, 16, 9600)  # 8 rows of 600 halves do not fit into that
CASES = {
    **{variant: Case(variant, MLP, rows=(5, 1, 12), summary="softmax") for variant in VARIANTS},
    "one layer": Case("fp16", (50, 18), rows=(9, 2), summary="gaussian"),
    "one layer of int8": Case("w8a8", (64, 33), rows=(9,), summary="sigmoid"),
    "three layers": Case("fp16", (33, 140, 65, 10), summary="sigmoid", activation="gelu"),
    "three layers of int8": Case("w8a8-quantizing", (33, 70, 65, 10), activation="silu"),
    "four layers": Case("w4a16", (64, 7, 20, 31, 6), rows=(3,), activation="tanh"),
    "norms": Case("fp16", (64, 7, 20, 31, 6), norm=True, summary="gaussian"),
    "norms of int8": Case("w8a8", (33, 140, 10), norm=True, per_head=True),
    "norms of int4": Case("w4a16-bf16", (33, 40, 10), norm=True, summary="softmax"),
    "x per head": Case("fp16", MLP, m=3, per_head=True, summary="softmax"),
    "int8 x per head": Case("w8a8", MLP, m=3, per_head=True, rows=(9,)),
    "quantized x per head": Case("w8a8-quantizing-bf16", (40, 24), m=3, per_head=True),
    "y in fp16": Case("w8a16", (40, 24), y_type=FLOAT16),
    "y in bf16": Case("bf16", (40, 24), y_type=BFLOAT16),
    "y in int8": Case("w8a8", (40, 24), y_type=INT8, rows=(9,)),
    "y in int8 of weights only": Case("w8a16-bf16", (40, 24), m=3, y_type=INT8),
    "groups of 64": Case("w4a16", (200, 24), group=64),
    "groups of 128": Case("w4a16", (200, 140, 24), group=128),
    "one head": Case("w8a8", (20, 20, 2), m=1, rows=(1,), summary="gaussian"),
}


@pytest.fixture(scope="session")
def heads_program(library: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_heads(tmp_path_factory.mktemp("heads"), library, EMULATED)


@pytest.fixture
def heads(heads_program: Path, tmp_path: Path) -> Program:
    return lambda case: run_program([heads_program], case, tmp_path)


def bits(run: Run) -> tuple[object, ...]:
    """So that equal runs compare equal."""
    counts = (run.tactic, run.rows, run.launches, run.blocks, run.memsets, run.touched)
    return (*counts, *(y.tobytes() for y in run.outputs))


def of_tactic(results: Results, tactic: int, how: str = "attached") -> list[Run]:
    return [run for run in results.runs if (run.tactic, run.how) == (tactic, how)]


# ---- the heads alone


@pytest.mark.parametrize("name", CASES)
def test_against_float64(heads: Program, name: str) -> None:
    case = CASES[name]
    results = heads(case)
    results.check(case)
    expected = itertools.product(("detached", "attached"), [*results.tactics, 0], case.rows)
    assert [(run.how, run.tactic, run.rows) for run in results.runs] == list(expected)
    assert results.allocations == results.frees == (case.summary != "none")


@pytest.mark.parametrize("summary", ["softmax", "none"])
def test_a_tactic_does_what_its_number_says(heads: Program, summary: str) -> None:
    results = heads(Case("fp16", MLP, rows=(12,), summary=summary))
    places = (BEHIND, ALONE) if summary != "none" else (0,)
    found = {(tactic & 3, tactic >> 2 & 3) for tactic in results.tactics}
    assert found == set(itertools.product((CHAIN, LAYERS), places))
    for run in results.runs:
        if run.tactic == 0:
            continue
        form, place = run.tactic & 3, run.tactic >> 2 & 3
        assert run.launches == {CHAIN: 1, LAYERS: 2}[form] + (place == ALONE)
        cleared = run.how == "detached" and place == BEHIND
        assert run.memsets == cleared
        hidden = {CHAIN: 0, LAYERS: 2 * 12 * 24 * 2}[form]
        counters = 4 * 12 if cleared else 0
        assert hidden * 0.9 <= run.touched - counters <= hidden


def test_hidden_activations_of_integers_are_int8(heads: Program) -> None:
    results = heads(Case("w8a8-quantizing", MLP, rows=(12,), only=(LAYERS,)))
    size = 2 * 12 * 24
    assert results.workspace >= size
    assert all(0.8 * size <= run.touched <= size for run in results.runs)


@pytest.mark.parametrize(
    ("case", "tactics"),
    {
        # 2 warps in a row, 2 along K, 2 row tiles, 2 batch tiles: each can be otherwise.
        "a large layer": (Case("fp16", (300, 1600), rows=(12,)), [2, 18, 34, 50, 66]),
        "a small layer": (Case("fp16", (30, 20), rows=(5,)), [2, 34, 50]),
        # Only chains know norms.
        "a large norm": (Case("fp16", (8, 8, 900), rows=(12,), norm=True), [1, 17, 33, 49, 65]),
        "a small norm": (Case("fp16", (32, 16, 10), rows=(5,), norm=True), [1, 49]),
        "a chain that does not fit": (Case("fp16", WIDE, device=NARROW), [2, 34, 50]),
    }.values(),
)
def test_tactics_worth_timing(heads: Program, case: Case, tactics: list[int]) -> None:
    results = heads(case)
    results.check(case)
    assert results.tactics == tactics


@pytest.mark.parametrize(
    ("case", "preferred"),
    [
        (Case("fp16", MLP, summary="softmax"), CHAIN | BEHIND << 2),
        (Case("fp16", (300, 400, 8), rows=(2,), summary="softmax"), LAYERS | BEHIND << 2),
        (Case("fp16", (16, 330), m=20, rows=(8,), summary="softmax"), LAYERS | ALONE << 2),
        (Case("fp16", (16, 8, 330), m=20, rows=(8,), summary="softmax"), CHAIN | ALONE << 2),
    ],
)
def test_tactic_0_is_what_the_kernels_prefer(heads: Program, case: Case, preferred: int) -> None:
    results = heads(replace(case, only=(0, preferred)))
    results.check(case)
    rows = case.rows[0]
    assert repr(results.plans[0, rows]) == repr(results.plans[preferred, rows])
    assert results.plans[0, rows].chain == (preferred & 3 == CHAIN)
    assert results.plans[0, rows].summary_alone == (preferred >> 2 == ALONE)


def test_variants_of_a_layer(heads: Program, library: Path) -> None:
    """At one row there are no fewer batch tiles: the variant is then as the first."""
    results = heads(Case("fp16", (300, 1600), rows=(12, 1)))
    shape = LinearShape(2, 12, 300, 1600, FLOAT16, FLOAT16)
    chosen = Library(library).choose_linear(shape, Device(*ORIN))
    sizes = (chosen.batch_tiles, chosen.row_tiles, chosen.row_warps, chosen.k_warps)
    assert sizes == (2, 2, 2, 2)
    configs = {key: plan.layer_configs for key, plan in results.plans.items()}
    assert repr(configs[0, 12]) == repr(configs[2, 12]) == repr([chosen])
    for variant, expected in enumerate([(2, 2, 1, 4), (2, 2, 4, 1), (2, 1, 2, 2), (1, 2, 2, 2)], 1):
        (found,) = configs[LAYERS | variant << 4, 12]
        assert (found.batch_tiles, found.row_tiles, found.row_warps, found.k_warps) == expected
    assert repr(configs[LAYERS | 4 << 4, 1]) == repr(configs[LAYERS, 1])


def test_variants_of_a_chain(heads: Program) -> None:
    results = heads(Case("fp16", (8, 8, 900), rows=(12,), norm=True))
    plans = [results.plans[CHAIN | variant << 4, 12].chain_config for variant in range(5)]
    found = [(config.batch_tiles, config.warps, config.slices) for config in plans]
    assert found == [(2, 8, 8), (2, 8, 16), (2, 8, 4), (2, 4, 8), (1, 8, 8)]


def test_one_memory_serves_summaries_of_all_batches(heads: Program) -> None:
    """Statistics of one batch lie where counters of another must not be."""
    tactic = LAYERS | ALONE << 2
    case = Case("fp16", (8, 5000), m=7, rows=(1, 3, 2), summary="softmax", only=(tactic,))
    results = heads(case)
    results.check(case)
    for how in ("detached", "attached"):
        runs = of_tactic(results, tactic, how)
        assert [run.launches for run in runs] == [3, 3, 3]  # statistics, then slices of classes
        assert [run.memsets for run in runs] == [how == "detached"] * 3


def test_a_batch_beyond_the_engines_largest(heads: Program) -> None:
    case = Case("fp16", MLP, rows=(5, 12), summary="softmax", most=5)
    results = heads(case)
    results.check(case)
    memsets = {run.rows: run.memsets for run in of_tactic(results, CHAIN | BEHIND << 2)}
    assert memsets == {5: 0, 12: 1}


@pytest.mark.parametrize(
    ("tactic", "case"),
    [
        (1 << 20, Case("fp16", MLP)),
        (-1, Case("fp16", MLP)),
        (CHAIN - 16, Case("fp16", MLP)),
        (CHAIN | 5 << 4, Case("fp16", MLP)),
        (3, Case("fp16", MLP)),
        (CHAIN | BEHIND << 2, Case("fp16", MLP)),
        (CHAIN, Case("fp16", MLP, summary="softmax")),
        (CHAIN | 3 << 2, Case("fp16", MLP, summary="softmax")),
        (CHAIN, Case("fp16", (40, 10))),
        (LAYERS, Case("fp16", MLP, norm=True)),
    ],
)
def test_unknown_tactics_are_refused(heads: Program, tactic: int, case: Case) -> None:
    case = replace(case, only=(tactic,))
    assert heads(case).refused.startswith(f"Tactic {tactic}. These heads have none of that number")


REFUSED = {
    "Field 'heds'. HydraHeads has none of that name.": {"heds": 2},
    "Field 'heads' holds floats. HydraHeads reads ints there.": {"heads": 2.0},
    "Field 'epsilons' holds ints. HydraHeads reads floats there.": {"epsilons": [0, 0]},
    "Field 'layout' holds ints. HydraHeads reads text there.": {"layout": 2},
    "Field 'norms' is missing. HydraHeads has no defaults.": {"norms": None},
    "Field 'layout' is missing.": {"layout": None},
    "Weights packed as 'hydra-mma16-1'. These kernels read 'hydra-mma16-2'.": {
        "layout": "hydra-mma16-1"
    },
    "Weights packed as 'hydra-mma16-22'.": {"layout": "hydra-mma16-22"},
    "Weights packed as 'hydra'.": {"layout": "hydra"},
    "Heads of 5 layers. HydraHeads computes 1 to 4.": {"activations": [0] * 5},
    "Field 'widths' has 2 values. Of 2 layers it has 3.": {"widths": [40, 24]},
    "Field 'norms' has 1 values. Of 2 layers it has 2.": {"norms": 0},
    "Field 'heads' has 2 values. Of 2 layers it has 1.": {"heads": [2, 2]},
    "x_per_head is 2. It says yes or no.": {"x_per_head": 2},
    "quantize_x is -1. It says yes or no.": {"quantize_x": -1},
    "norms is 3. It says yes or no.": {"norms": [3, 0]},
    "quantize_x of x in float16 with weights in float16.": {"quantize_x": 1},
    "group 32 of weights in float16. Only int4 has groups.": {"group": 32},
    "int4 weights with a scale for every 16 values.": {"weight_type": 4, "group": 16},
    "y in float16. Heads of several layers, and heads with a summary, give float32.": {"y_type": 1},
    "2 scales of the input of layer 1. Where it is int8 there is 1, or one for each of 2": {
        "x_scales": [0, 2]
    },
    "3 scales of the input of layer 0.": {"x_type": 3, "weight_type": 3, "x_scales": [3, 1]},
    "0 scales of the input of layer 1.": {"quantize_x": 1, "weight_type": 3, "x_scales": [1, 0]},
    "1 scales of y. Where it is int8": {"y_scales": 1},
    "LayerNorm behind the output layer.": {"norms": [0, 1], "epsilons": [0.0, 1e-5]},
    "LayerNorm of layer 0 with epsilon 0.": {"norms": [1, 0]},
    "x in float32 times weights in float16.": {"x_type": 0},
    "x in float16 times weights in float32.": {"weight_type": 0},
    "A layer of M=0 heads": {"heads": 0},
    "A layer of M=2 heads, B=1, K=24, N=0.": {"widths": [40, 24, 0]},
    "Activation 5. It is 0 to 4": {"activations": [5, 0]},
    "Summary 4. It is 1 to 3": {"summary": 4},
    "Gaussian parameters of width 11.": {"summary": 3, "widths": [40, 24, 11]},
    "most_rows is -1.": {"most_rows": -1},
}


@pytest.mark.parametrize("message", REFUSED)
def test_wrong_fields_are_refused(heads: Program, message: str) -> None:
    refused = heads(Case("fp16", MLP, fields=REFUSED[message])).refused
    assert refused.startswith(message)
    assert refused.count(". ") == 2


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (Case("fp16", (40, 24), summary="softmax", y_type=1), "y in float16. Heads of several"),
        (Case("w8a8", (40, 24), y_type=INT8, fields={"y_scales": 0}), "0 scales of y."),
        (Case("w8a8", (40, 24), fields={"quantize_x": 1}), "quantize_x of x in int8 with weights"),
        (Case("bf16", MLP, device=(75, 30, 65536)), "bfloat16 on compute capability 7.5."),
        (
            Case("fp16", WIDE, norm=True, device=NARROW),
            "A chain whose activations take",
        ),
        (Case("fp16", MLP, fields={"heads": 3}), "weight of layer 0 is [2, 2, 2, 256]."),
        (
            Case("fp16", MLP, fields={"widths": [41, 24, 10]}),
            "x is [5, 40]. That of these heads is [B, 41]",
        ),
        (
            Case("fp16", MLP, fields={"widths": [40, 24, 11]}),
            "bias of layer 1 is [2, 10]. That of these heads is [2, 11]",
        ),
        (Case("fp16", MLP, rows=(0,)), "x is [0, 40]."),
        (Case("fp16", MLP, most=70000, summary="softmax"), "A summary of 2 heads and 70000 rows."),
        (
            Case("fp16", (20, 24), per_head=True, fields={"x_per_head": 0, "widths": [5, 24]}),
            "x is [2, 5, 20]. That of these heads is [B, 5]",
        ),
        (Case("fp16", MLP, fields={"x_per_head": 1}), "x is [5, 40]. That of these heads is [2, B"),
        (
            Case("fp16", MLP, fields={"norms": [1, 0], "epsilons": [0.1, 0.0]}),
            "5 inputs and 1 outputs. These heads have 7 and 1.",
        ),
    ],
)
def test_what_does_not_fit_is_refused(heads: Program, case: Case, message: str) -> None:
    refused = heads(case).refused
    assert refused.startswith(message)
    assert refused.count(". ") == 2


def test_text_may_end_in_nul(heads: Program) -> None:
    case = Case("fp16", MLP, fields={"layout": f"{packing.LAYOUT}\0"})
    heads(case).check(case)


def test_equal_heads_have_equal_names_and_others_do_not(heads: Program) -> None:
    cases = [
        *[Case(variant, MLP, rows=(1,)) for variant in VARIANTS],
        Case("fp16", (40, 25, 10), rows=(1,)),
        Case("fp16", MLP, m=3, rows=(1,)),
        Case("fp16", MLP, rows=(1,), activation="gelu"),
        Case("fp16", MLP, rows=(1,), norm=True),
        Case("fp16", MLP, rows=(1,), norm=True, fields={"epsilons": [0.10000001, 0.0]}),
        Case("fp16", MLP, rows=(1,), summary="softmax"),
        Case("fp16", MLP, rows=(1,), summary="sigmoid"),
        Case("fp16", MLP, rows=(1,), per_head=True),
        Case("w4a16", MLP, rows=(1,), group=64),
        Case("fp16", (40, 10), rows=(1,)),
        Case("fp16", (40, 10), rows=(1,), y_type=1),
        Case("w8a8", (40, 10), rows=(1,), y_type=INT8),
        Case("w8a8", (40, 10), rows=(1,), per_head=True, y_type=INT8),
    ]
    names = [heads(case).identity for case in cases]
    assert len(set(names)) == len(cases)
    assert all(name.startswith(packing.LAYOUT) for name in names)
    assert heads(Case("fp16", MLP, rows=(7, 9))).identity == names[0]


# ---- the plugin, as TensorRT would drive it


def headers_here() -> list[Path]:
    """Or one folder that is missing, so that the tests say why they are skipped."""
    return plugin_programs.tensorrt_headers() or [Path("none")]


@pytest.fixture(scope="session", params=headers_here(), ids=lambda path: "-".join(path.parts[-2:]))
def headers(request: pytest.FixtureRequest) -> Path:
    found: Path = request.param
    if not plugin_programs.is_tensorrt(found):
        pytest.skip("TensorRT's headers are not here: set TENSORRT_ROOT")
    if plugin_programs.cuda_toolkit() is None:
        pytest.skip("CUDA's headers are not here, which those of TensorRT include")
    return found


@pytest.fixture(scope="session")
def plugin(headers: Path, library: Path, tmp_path_factory: pytest.TempPathFactory) -> Plugin:
    return build_plugin(tmp_path_factory.mktemp("plugin"), library, headers, EMULATED)


def symbols(library: Path, which: str) -> set[str]:
    command = ["nm", "--dynamic", which, "--format=posix", library]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {line.split()[0] for line in listed.splitlines()}


def test_the_library_needs_and_gives_what_it_should(plugin: Plugin, headers: Path) -> None:
    exported = symbols(plugin.library, "--defined-only")
    questions = {"hydra_plugin_layout", "hydra_plugin_tensorrt"}
    assert exported == {"getCreators", "setLoggerFinder"} | questions
    needed = symbols(plugin.library, "--undefined-only")
    weak = {"__gmon_start__", "_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable"}
    # What the C and C++ libraries give has a version.
    ours = {name for name in needed - weak if "@" not in name}
    header = (KERNELS / "hydra_kernels.h").read_text()
    assert ours  # neither of TensorRT nor of CUDA
    assert all(f" {name}(" in header for name in ours)

    handle = ctypes.CDLL(str(plugin.library))
    for name in questions:
        getattr(handle, name).restype = ctypes.c_char_p
    major, minor = version_of(headers)
    assert handle.hydra_plugin_tensorrt().decode().startswith(f"{major}.{minor}.")
    assert handle.hydra_plugin_layout().decode() == packing.LAYOUT


@pytest.mark.parametrize("name", CASES)
def test_driven_as_by_tensorrt(plugin: Plugin, heads: Program, tmp_path: Path, name: str) -> None:
    case = CASES[name]
    results = run_program(plugin.command, case, tmp_path)
    results.check(case)
    alone = heads(case)
    for how in ("detached", "attached"):
        found, expected = ([bits(r) for r in of.runs if r.how == how] for of in (results, alone))
        assert found == expected
    inherited = [bits(run) for run in results.runs if run.how == "inheriting"]
    assert inherited == [bits(run) for run in of_tactic(results, results.tactics[-1])]
    assert results.tactics == alone.tactics
    assert results.workspace == alone.workspace
    assert results.identity == alone.identity
    assert results.allocations == results.frees == 2 * alone.allocations
    count, tactic, shape = results.logs
    assert "inputs and" in count
    assert tactic.startswith("HydraHeads: Tactic 1048576. These heads have none")
    assert shape.startswith("HydraHeads: weight of layer 0 is [")


@pytest.mark.parametrize("message", REFUSED)
def test_its_logger_hears_why_fields_are_refused(
    plugin: Plugin, tmp_path: Path, message: str
) -> None:
    fields = REFUSED[message]
    results = run_program(plugin.command, Case("fp16", MLP, fields=fields), tmp_path)
    known = set(Case("fp16", MLP).attributes())
    if not set(fields) <= known:  # TensorRT's parser passes only what the creator names
        assert results.runs
        return
    (log,) = results.logs
    assert log.startswith(f"heads: {message}")


def test_its_logger_hears_why_a_device_is_refused(plugin: Plugin, tmp_path: Path) -> None:
    case = Case("bf16", MLP, device=(75, 30, 65536))
    *_, log = run_program(plugin.command, case, tmp_path).logs
    assert log.startswith("HydraHeads: bfloat16 on compute capability 7.5.")


# ---- the plugin in TensorRT itself, which its Python bindings reach without a GPU


@pytest.fixture(scope="session")
def real(plugin: Plugin, headers: Path) -> Real:
    version = "import tensorrt; print(tensorrt.__version__)"
    found = subprocess.run([sys.executable, "-c", version], capture_output=True, text=True)
    major = str(version_of(headers)[0])
    if found.stdout.partition(".")[0] != major:
        pytest.skip(f"TensorRT's Python bindings of version {major} are not installed")

    def create(attributes: Mapping[str, object]) -> dict[str, list[str]]:
        given = json.dumps({name: value for name, value in attributes.items() if value is not None})
        command = [sys.executable, Path(__file__).with_name("create_plugin.py"), plugin.library]
        done = subprocess.run(command, capture_output=True, text=True, input=given)
        assert done.returncode == 0, done.stderr
        answer: dict[str, list[str]] = json.loads(done.stdout)
        return answer

    return create


@pytest.mark.parametrize("name", ["fp16", "norms of int8", "y in int8"])
def test_tensorrt_creates_it(real: Real, name: str) -> None:
    attributes = CASES[name].attributes()
    assert real(attributes) == {"fields": list(attributes), "created": True, "errors": []}


@pytest.mark.parametrize("message", list(REFUSED)[::6])
def test_tensorrt_is_told_why_it_is_not(real: Real, message: str) -> None:
    answer = real(Case("fp16", MLP, fields=REFUSED[message]).attributes())
    assert not answer["created"]
    (error,) = answer["errors"]
    assert error.startswith(f"heads: {message}")


# ---- building it


@pytest.mark.skipif(
    shutil.which("cmake") is None or shutil.which("nvcc") is None, reason="cmake or nvcc is missing"
)
def test_cmake_says_for_which_tensorrt_it_builds(tmp_path: Path) -> None:
    """One library per major version, of the first headers of each; none for what is too old."""
    version = "#define NV_TENSORRT_MAJOR {}\n#define NV_TENSORRT_MINOR {}\n"
    newer = "#define TRT_MAJOR_ENTERPRISE {}\n#define TRT_MINOR_ENTERPRISE {}\n"
    versions = {"8.6": version, "10.3": version, "10.16": newer, "11.4": newer}
    for name, text in versions.items():
        folder = tmp_path / name / ("include" if name != "11.4" else "")
        folder.mkdir(parents=True)
        (folder / "NvInferRuntime.h").touch()
        (folder / "NvInferVersion.h").write_text(text.format(*name.split(".")))

    def configured(*roots: str) -> list[str]:
        given = ";".join(str(tmp_path / root) for root in roots)
        command = ["cmake", "-S", KERNELS.parent, "-B", tmp_path / "build"]
        command += ["-DHYDRA_CUDA_ARCHS=87-real", f"-DTENSORRT_ROOT={given}"]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return re.findall(r"-- hydra-edge: (.*)", told.replace(f"{tmp_path}/", ""))

    assert configured(*versions) == [
        "no plugin for TensorRT 8.6 in 8.6/include: it needs 10.3",
        "libhydra_plugin10.so for TensorRT 10.3 in 10.3/include",
        "libhydra_plugin11.so for TensorRT 11.4 in 11.4",
    ]
    found = configured("nowhere")
    assert len(found) == 1
    assert "libhydra_plugin" in found[0] or "no headers of TensorRT 10.3 or later" in found[0]


@pytest.mark.skipif(plugin_programs.cuda_toolkit() is None, reason="CUDA's headers are not here")
def test_the_programs_compile_for_a_gpu(tmp_path: Path) -> None:
    flags = plugin_programs.gpu_machine().flags
    assert len(plugin_programs.compile_objects(tmp_path, ("host_case", "host_heads"), *flags)) == 2

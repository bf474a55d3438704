"""What only a GPU can show: `pytest -m gpu`.

The tests of the kernels run there, too, on the same cases as on the emulator; here are larger
random shapes, CUDA graphs, streams, and NVIDIA's compute-sanitizer.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from hydra_edge import kernels
from hydra_edge.kernels import FLOAT16, LinearArguments, SummaryOutputs
from hydra_edge.ops import packing
from hydra_edge.ops.ensemble_summary import CLASSIFICATION_OUTPUTS, reference_classification
from kernels.gpu import GUARD, Gpu, library_path
from kernels.plugin_case import run_program
from kernels.plugin_programs import build_heads, build_plugin, gpu_machine, tensorrt_headers
from kernels.test_group_linear import VARIANTS, Case
from kernels.test_plugin import CASES

HERE = Path(__file__).parent


def random_shape(seed: int) -> tuple[int, int, int, int]:
    """M, B, K, N: sizes that fit nothing, of up to some 10 million weights."""
    rng = np.random.default_rng(seed)
    m, b = int(rng.integers(1, 40)), int(rng.choice([1, 2, 7, 8, 16, 31, 64, 100, 300, 1024]))
    k = int(rng.choice([rng.integers(1, 3000), 64 * rng.integers(1, 40)]))
    n = int(min(rng.integers(1, 4000), max(1, min(10_000_000 // (m * k), 20_000_000 // (m * b)))))
    return m, b, k, n


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("variant", VARIANTS)
def test_random_shapes(gpu: Gpu, variant: str, seed: int) -> None:
    how = {"x_per_head": seed % 2 == 1, "group": (32, 64, 128)[seed % 3], "activation": seed % 5}
    case = Case(variant, *random_shape(seed), seed=seed, **how)
    case.check(case.run(gpu))


class Prepared:
    """A layer with its summary, ready to be launched many times."""

    def __init__(self, gpu: Gpu, seed: int) -> None:
        m, b, k, c = 20, 16, 512, 100
        self.case = Case("fp16", m, b, k, c, seed=seed)
        self.case.shape.summary = 1
        address, self.y = gpu.output((m, b, c), np.float32, "y")
        self.outputs = {
            name: gpu.output((b, c) if name == "mean_prob" else (b,), np.float32, name)
            for name in CLASSIFICATION_OUTPUTS
        }
        self.arguments = LinearArguments(
            x=gpu.array(self.case.x, "x"),
            weight=gpu.array(packing.pack(self.case.weight), "weight"),
            bias=gpu.array(self.case.bias, "bias"),
            y=address,
            summary=SummaryOutputs(*(self.outputs[name][0] for name in CLASSIFICATION_OUTPUTS)),
            counters=gpu.array(np.zeros(-(-b // 8), np.uint32), "counters", kind=1),
        )

    def launch(self, library: kernels.Library) -> None:
        stream = torch.cuda.current_stream().cuda_stream
        library.group_linear(self.case.shape, self.arguments, stream=stream)

    def check(self) -> None:
        self.case.check(self.y)
        for name, expected in reference_classification(self.y).items():
            np.testing.assert_allclose(self.outputs[name][1], expected, rtol=2e-5, atol=2e-6)


def plain_library() -> kernels.Library:
    path = library_path()
    assert path is not None
    return kernels.Library(path)


@pytest.mark.gpu
def test_a_cuda_graph_replays_bit_for_bit(gpu: Gpu) -> None:
    library, prepared = plain_library(), Prepared(gpu, 0)
    prepared.launch(library)
    gpu.bring_back()
    prepared.check()
    expected = [array.tobytes() for array in gpu.arrays]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        prepared.launch(library)
    for region in gpu.regions:
        if region.kind == 3:
            region.bytes.fill_(0xFF)
    for _ in range(3):
        graph.replay()
    gpu.bring_back()
    assert [array.tobytes() for array in gpu.arrays] == expected


@pytest.mark.gpu
def test_two_streams_at_once(gpu: Gpu) -> None:
    library = plain_library()
    work = [Prepared(gpu, seed) for seed in (1, 2)]
    streams = [torch.cuda.Stream() for _ in work]
    torch.cuda.synchronize()
    for _ in range(200):
        for stream, prepared in zip(streams, work, strict=True):
            with torch.cuda.stream(stream):
                prepared.launch(library)
    gpu.bring_back()
    for prepared in work:
        prepared.check()


@pytest.mark.gpu
@pytest.mark.parametrize("captured", [False, True])
def test_launches_in_a_row_overlap(gpu: Gpu, captured: bool) -> None:
    """Programmatic dependent launch: a kernel begins early, and waits for its x.

    Two layers read what the other wrote, round after round; without waiting some would read what
    stood there before. The result has the bits of the same rounds without overlap.
    """
    library, size = plain_library(), 1024
    cases = [Case("fp16", 1, 8, size, size, seed=seed, y_type=FLOAT16) for seed in (3, 4)]
    first, second = (gpu.output((8, size), np.float16, name)[0] for name in ("h0", "h1"))
    weights = [gpu.array(packing.pack(case.weight), "weight") for case in cases]
    biases = [gpu.array(case.bias, "bias") for case in cases]
    tensors = [region.bytes for region in gpu.regions[:2]]
    start = torch.from_numpy(cases[0].x.view(np.uint8).reshape(-1).copy()).cuda()

    def rounds(overlap: int) -> None:
        stream = torch.cuda.current_stream().cuda_stream
        for _ in range(100):
            for i, (x, y) in enumerate(((first, second), (second, first))):
                cases[i].shape.activation = 4  # tanh keeps the values in range
                config = library.choose_linear(cases[i].shape, library.device())
                config.overlap = overlap
                arguments = LinearArguments(x=x, weight=weights[i], bias=biases[i], y=y)
                library.group_linear(cases[i].shape, arguments, config, stream)

    found = []
    for overlap in (0, 1):
        tensors[0].copy_(start)
        torch.cuda.synchronize()
        if captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                rounds(overlap)
            graph.replay()
        else:
            rounds(overlap)
        torch.cuda.synchronize()
        found.append([tensor.cpu().numpy().tobytes() for tensor in tensors])
    assert found[0] == found[1]
    assert np.isfinite(np.frombuffer(found[0][0], np.float16)).all()


@pytest.fixture(scope="session")
def heads_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = library_path()
    assert path is not None
    return build_heads(tmp_path_factory.mktemp("heads"), path.resolve(), gpu_machine())


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_the_heads_of_the_plugin(
    gpu: Gpu, request: pytest.FixtureRequest, tmp_path: Path, name: str
) -> None:
    """Every tactic, launched twice and from a CUDA graph, between guards."""
    program = request.getfixturevalue("heads_program")
    run_program([program], CASES[name], tmp_path).check(CASES[name])


@pytest.mark.gpu
def test_the_plugin_driven_as_by_tensorrt(gpu: Gpu, tmp_path: Path) -> None:
    headers, path = tensorrt_headers(), library_path()
    assert path is not None
    if not headers:
        pytest.skip("TensorRT's headers are not here: set TENSORRT_ROOT")
    plugin = build_plugin(tmp_path, path.resolve(), headers[0], gpu_machine())
    for case in CASES.values():
        run_program(plugin.command, case, tmp_path).check(case)


@pytest.mark.gpu
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_compute_sanitizer_finds_nothing(gpu: Gpu, tool: str) -> None:
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", "--report-api-errors", "no"]
    command += [sys.executable, "-m", "pytest"]
    tests = [str(HERE / f"test_{name}.py") for name in ("group_linear", "head_chain")]
    tests.append(str(HERE / "test_ensemble_summary.py"))
    kernels_only = "against_float64 or summary or chain"
    result = subprocess.run(
        [*command, "-q", "-x", "-m", "gpu", "-n", "0", "-k", kernels_only, *tests],
        capture_output=True,
        text=True,
        check=False,
        cwd=HERE.parents[1],
        timeout=1800,
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "HYDRA_GUARD_BYTES": "0"},
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]


def test_the_harness_notices_what_kernels_must_not_do(tmp_path: Path, library: Path) -> None:
    """On the CPU: a write outside of an array, and one into an input."""
    gpu = Gpu(library, "cpu")
    with gpu:
        _, y = gpu.output((3,), np.float32, "y")
        gpu.array(np.ones(4, np.float16), "x")
        assert np.isnan(y).all()
        gpu.regions[0].bytes[:] = 0
        gpu.bring_back()
        assert (y == 0).all()
        gpu.regions[0].room[GUARD + 12] = 0
        with pytest.raises(AssertionError, match="written outside of y"):
            gpu.bring_back()
    with gpu:
        gpu.array(np.ones(4, np.float16), "x")
        gpu.regions[0].bytes[0] = 7
        with pytest.raises(AssertionError, match="x was written"):
            gpu.bring_back()

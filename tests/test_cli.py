"""Every verb on good input, every verb on bad input: exit codes, messages, and files left alone."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper
from onnx_models import student
from typer.testing import CliRunner, Result

import hydra_edge as he
from hydra_edge import backends, costs, detection
from hydra_edge.cli import app
from hydra_edge.exporting import summarize

FEATURES, HIDDEN, CLASSES, HEADS, SAMPLES = 12, 16, 4, 3, 120
VERBS = (
    *("demo", "export", "merge", "quantize", "fuse", "compile", "verify", "bench", "run"),
    *("refit", "join", "inspect", "targets", "plan", "doctor", "distill", "teach"),
)


def hydra(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def network(heads: int, rng: np.random.Generator) -> he.Graph:
    """A body and ``heads`` MLP heads, as an exporter writes them: Gemm, Relu, Unsqueeze, Concat."""
    lines = ["f = Gemm(input, w, b)", "r = Relu(f)"]
    weights = {"w": (FEATURES, HIDDEN), "b": (HIDDEN,)}
    for m in range(heads):
        lines += [
            f"h{m} = Gemm(r, w{m}, b{m})",
            f"a{m} = Relu(h{m})",
            f"l{m} = Gemm(a{m}, v{m}, c{m})",
            f"u{m} = Unsqueeze(l{m}, axes)",
        ]
        weights |= {
            f"w{m}": (HIDDEN, HIDDEN),
            f"b{m}": (HIDDEN,),
            f"v{m}": (HIDDEN, CLASSES),
            f"c{m}": (CLASSES,),
        }
    lines.append(f"head_logits = Concat <axis = 0> ({', '.join(f'u{m}' for m in range(heads))})")
    body = "\n".join(lines)
    model = onnx.parser.parse_model(
        f"""<ir_version: 9, opset_import: ["" : 20]>
        g (float[batch, {FEATURES}] input) => (float[{heads}, batch, {CLASSES}] head_logits)
        <int64[1] axes = {{0}}> {{ {body} }}"""
    )
    for name, shape in weights.items():
        values = rng.standard_normal(shape).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(values, name))
    return summarize(he.Graph(model), "classification", "head_logits")


def member(rng: np.random.Generator) -> he.Graph:
    model = onnx.parser.parse_model(
        f"""<ir_version: 9, opset_import: ["" : 20]>
        g (float[batch, {FEATURES}] input) => (float[batch, {CLASSES}] logits) {{
        logits = MatMul(input, w) }}"""
    )
    weight = rng.standard_normal((FEATURES, CLASSES)).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    return he.Graph(model)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    rng = np.random.default_rng(0)
    network(HEADS, rng).save(folder / "student.onnx")
    for index in range(HEADS):
        member(rng).save(folder / f"member{index}.onnx")
    x = rng.standard_normal((SAMPLES, FEATURES)).astype(np.float32)
    np.savez(folder / "test.npz", input=x, labels=rng.integers(0, CLASSES, SAMPLES))
    np.savez(folder / "calibration.npz", input=x)
    np.savez(folder / "shifted.npz", input=x * 3)
    np.savez(folder / "wrong.npz", input=x[:, :5])
    np.save(folder / "input.npy", x[:5])
    (folder / "text.onnx").write_text("hello\n")
    (folder / "text.hydra").write_text("hello\n")
    (folder / "text.npz").write_text("hello\n")
    data = (folder / "student.onnx").read_bytes()
    (folder / "corrupt.onnx").write_bytes(data[: len(data) // 2])
    compiled = hydra("compile", folder / "student.onnx", "-o", folder / "student.hydra")
    assert compiled.exit_code == 0, compiled.output
    return folder


def test_the_steps_one_by_one(files: Path, tmp_path: Path) -> None:
    int8, fused, engine = (tmp_path / name for name in ("a.onnx", "b.onnx", "c.hydra"))
    done = hydra(
        "quantize", files / "student.onnx", "--calibration", files / "calibration.npz", "-o", int8
    )
    assert done.exit_code == 0, done.output
    done = hydra("fuse", int8, "-o", fused, "--json")
    assert done.exit_code == 0, done.output
    shown = json.loads(done.stdout)
    assert shown["precision"] == "int8"
    assert shown["fusion"][0].startswith("3 branches from ")
    assert shown["fusion"][1].strip().startswith("DequantizeLinear → Gemm")
    assert shown["fusion"][-1].strip() == "fused"
    assert hydra("compile", fused, "-o", engine, "--threads", 1).exit_code == 0
    shown = json.loads(hydra("inspect", engine, "--json").stdout)
    assert (shown["kind"], shown["precision"], shown["heads"]) == ("model", "int8", HEADS)


def test_what_parts_cost_and_a_mix_inside_a_budget(files: Path, tmp_path: Path) -> None:
    mixed = tmp_path / "mixed.onnx"
    arguments = (
        *("quantize", files / "student.onnx", "--precision", "int4-weight-only"),
        *("--data", files / "test.npz", "--json"),
    )
    done = hydra(*arguments, "--report")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)["sensitivity"]
    names = [part["name"] for part in found["parts"]]
    assert names[:HEADS] == [f"head.{m}" for m in range(HEADS)]
    assert len(names) == HEADS + 1
    limit = 0.9 * found["whole"]["losses"]["mi"]
    done = hydra(*arguments, "--budget", f"mi={limit}", "--fallback", "fp32", "-o", mixed)
    assert done.exit_code == 0, done.output
    mix = json.loads(done.stdout)["mix"]
    assert mix["losses"]["mi"] <= limit
    assert mix["kept"]
    assert set(mix["kept"]) <= set(names)
    assert he.Graph.load(mixed).metadata.precision == mix["precision"]
    shown = hydra(*arguments[:-1], "--budget", f"mi={limit}", "--fallback", "fp32", "--report")
    assert "the mix" in shown.stdout
    assert f"{mix['kept'][0]} *" in shown.stdout


def test_compile_quantizes_fuses_and_verifies(files: Path, tmp_path: Path) -> None:
    engine = tmp_path / "int8.hydra"
    done = hydra(
        "compile", files / "student.onnx", "--precision", "int8",
        "--calibration", files / "calibration.npz", "--data", files / "test.npz", "-o", engine,
        "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    metrics = json.loads(done.stdout)["metrics"]
    assert metrics["mi_rank_correlation"] > 0.95
    assert {"p50_ms", "p50_ms_fp32_twin", "accuracy"} <= set(metrics)
    done = hydra(
        "verify", engine, "--against", files / "student.onnx", "--data", files / "test.npz"
    )
    assert done.exit_code == 0, done.output
    assert "passed on 120 samples" in done.stdout


def test_verify_fails_with_exit_code_3(files: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.onnx"
    network(HEADS, np.random.default_rng(9)).save(other)
    done = hydra("verify", other, "--against", files / "student.onnx", "--data", files / "test.npz")
    assert done.exit_code == 3
    assert "Verification failed" in done.stderr
    done = hydra(
        "verify", other, "--against", files / "student.onnx", "--data", files / "test.npz", "--json"
    )
    assert done.exit_code == 3
    assert json.loads(done.stdout)["failures"]  # one document, also when a gate fails


def test_merge_run_and_bench(files: Path, tmp_path: Path) -> None:
    members = [files / f"member{index}.onnx" for index in range(HEADS)]
    merged, engine = tmp_path / "ensemble.onnx", tmp_path / "ensemble.hydra"
    assert hydra("merge", *members, "-o", merged).exit_code == 0
    assert hydra("compile", merged, "-o", engine).exit_code == 0
    out = tmp_path / "prediction.npz"
    done = hydra("run", engine, files / "input.npy", "-o", out, "--head-logits")
    assert done.exit_code == 0, done.output
    with np.load(out) as arrays:
        assert arrays["mean_prob"].shape == (5, CLASSES)
        assert arrays["head_logits"].shape == (HEADS, 5, CLASSES)
    reports = [tmp_path / f"report.{kind}" for kind in ("html", "md", "json")]
    options = [part for path in reports for part in ("--report", path)]
    done = hydra(
        "bench", files / "student.hydra", "--against", engine, "--data", files / "test.npz",
        "--shifted", f"tripled={files / 'shifted.npz'}", "--batches", "1", "--threads", 1,
        "--min-speedup", "1000000", *options,
    )  # fmt: skip
    assert done.exit_code == 5, done.output
    assert "times as fast as 'ensemble' at batch 1" in done.stderr
    assert all(path.stat().st_size > 0 for path in reports)


def test_a_foreign_graph_gets_a_task_on_the_way(files: Path, tmp_path: Path) -> None:
    foreign, engine = tmp_path / "foreign.onnx", tmp_path / "foreign.hydra"
    foreign.write_bytes(_plain(network(HEADS, np.random.default_rng(1))))
    done = hydra("compile", foreign, "--data", files / "test.npz", "-o", engine)
    assert done.exit_code == 1
    assert "the graph has no task or per-head output" in done.stderr
    done = hydra(
        "compile", foreign, "--task", "classification", "--logits", "head_logits",
        "--data", files / "test.npz", "-o", engine, "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["heads"] == HEADS


def _plain(graph: he.Graph) -> bytes:
    """A student's file without our metadata, ending in its per-head output."""
    model = onnx.ModelProto()
    model.CopyFrom(graph.model)
    summary = next(node for node in model.graph.node if node.domain == "hydra")
    model.graph.node.remove(summary)
    for value in list(model.graph.output)[:-1]:
        model.graph.output.remove(value)
    del model.functions[:]
    return bytes(model.SerializeToString())


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb: str) -> None:
    done = hydra(verb, "--help")
    assert done.exit_code == 0
    assert "Usage:" in done.stdout


def test_targets_and_doctor() -> None:
    found = json.loads(hydra("targets", "--json").stdout)
    assert found["cpu"]["buildable"]
    here = [name for name, row in found.items() if row["here"]]
    assert found["jetson-thor"]["gpu"]["modes"][0] == {"name": "MAXN", "number": 0}
    done = hydra("doctor", "--json")
    assert done.exit_code == 0
    rows = json.loads(done.stdout)
    assert rows["onnxruntime"].startswith(backends.find("onnxruntime").versions()["onnxruntime"])
    assert [rows["local target"]] == here
    shown = hydra("targets").stdout
    assert "* this machine, which 'local' stands for: " in shown
    assert re.search(rf"^\* {here[0]} ", shown, re.MULTILINE)


@pytest.mark.parametrize("bad", ["missing.onnx", ".", "text.onnx", "corrupt.onnx"])
@pytest.mark.parametrize("verb", ["quantize", "fuse", "compile", "merge", "inspect"])
def test_bad_graphs(files: Path, tmp_path: Path, verb: str, bad: str) -> None:
    out = tmp_path / "out"
    out.write_text("precious")
    options = [] if verb == "inspect" else ["-o", out]
    done = hydra(verb, files / bad, *options)
    assert done.exit_code == 1, done.output
    assert done.stderr.startswith("error: ")
    assert "why: " in done.stderr
    assert "fix: " in done.stderr
    assert out.read_text() == "precious"


@pytest.mark.parametrize("bad", ["missing.hydra", ".", "text.hydra", "student.onnx"])
def test_bad_engines(files: Path, bad: str) -> None:
    for arguments in (
        ("run", files / bad, files / "input.npy"),
        ("bench", files / bad, "--data", files / "test.npz"),
    ):
        done = hydra(*arguments)
        assert done.exit_code == 1, done.output
        assert "fix: " in done.stderr


@pytest.mark.parametrize("bad", ["missing.npz", ".", "text.npz", "wrong.npz"])
def test_bad_data(files: Path, tmp_path: Path, bad: str) -> None:
    engine, graph = files / "student.hydra", files / "student.onnx"
    for arguments in (
        ("run", engine, files / bad),
        ("verify", engine, "--against", graph, "--data", files / bad),
        ("bench", engine, "--data", files / bad),
        ("quantize", graph, "--calibration", files / bad, "-o", tmp_path / "x.onnx"),
        ("compile", graph, "--data", files / bad, "-o", tmp_path / "x.hydra"),
    ):
        done = hydra(*arguments)
        assert done.exit_code == 1, (arguments, done.output)
        assert "fix: " in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["quantize", "student.onnx", "-o", "o"], 1, "int8 needs calibration data"),
        (["quantize", "student.onnx", "--precision", "int7", "-o", "o"], 1, "Unknown precision"),
        (["quantize", "student.onnx"], 2, "No output file was named"),
        (["quantize", "student.onnx", "--report"], 2, "There is nothing to measure on"),
        (
            ["quantize", "student.onnx", "--budget", "mi=x", "--data", "test.npz", "-o", "o"],
            1,
            "is not NAME=NUMBER",
        ),
        (["compile", "student.onnx", "--target", "toaster", "-o", "o"], 1, "Unknown target"),
        (["compile", "student.onnx", "--batch", "1,8", "-o", "o"], 1, "--batch names 2 sizes"),
        (["compile", "student.onnx", "--batch", "a", "-o", "o"], 1, "--batch is 'a'"),
        (["compile", "student.onnx", "--lowering", "x", "-o", "o"], 1, "Unknown lowering"),
        (["compile", "student.onnx", "-o", "no/such/folder/o"], 1, "Cannot write"),
        (["merge", "member0.onnx", "student.onnx", "-o", "o"], 1, "its logits are not clear"),
        (["export", "nothing", "--example", "1x2", "-o", "o"], 1, "nothing"),
        (["export", "os.path:join", "--example", "axb", "-o", "o"], 1, "join"),
        (["bench", "student.hydra", "--data", "test.npz", "--report", "r.pdf"], 1, "report format"),
        (["bench", "student.hydra", "--data", "test.npz", "--shifted", "x"], 1, "names no file"),
        (["bench", "student.hydra", "--data", "test.npz", "--min-speedup", "2"], 1, "--against"),
        (["export", "torch.nn:Identity", "--example", "-1x3", "-o", "o"], 1, "--example is '-1x3'"),
        (["run"], 2, "Missing argument"),
        (["compile", "student.onnx"], 2, "Missing option"),
        (["fly"], 2, "No such command"),
    ],
)
def test_messages(
    files: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, message: str
) -> None:
    monkeypatch.chdir(files)
    done = hydra(*arguments)
    assert done.exit_code == code, done.output
    assert message.lower() in done.stderr.lower()
    assert not Path("o").exists()


def test_errors_are_json_on_request(files: Path) -> None:
    done = hydra("inspect", files / "text.onnx", "--json")
    assert done.exit_code == 1
    assert set(json.loads(done.stdout)["error"]) == {"type", "what", "why", "fix"}


def test_help_is_fast_and_loads_nothing_heavy() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from hydra_edge.cli import app; "
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0; "
        "heavy = {'numpy', 'torch', 'onnx', 'onnxruntime'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_ctrl_c_says_so_and_leaves_no_file(files: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.hydra"
    code = (
        "import sys, hydra_edge.compilation as c\n"
        "def stop(*a, **k): raise KeyboardInterrupt\n"
        "c.lowering.lower = stop\n"
        "from hydra_edge.cli import main\n"
        f"graph, out = {str(files / 'student.onnx')!r}, {str(out)!r}\n"
        "sys.argv = ['hydra-edge', 'compile', graph, '-o', out]\n"
        "main()"
    )
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 130
    assert "interrupted: no file was half written" in done.stderr
    assert "Traceback" not in done.stderr
    assert not out.exists()
    assert time.monotonic() - started < 60


def test_fuse_explains_itself(tmp_path: Path) -> None:
    student().save(tmp_path / "s.onnx")
    done = hydra("fuse", str(tmp_path / "s.onnx"), "--explain")
    assert done.exit_code == 0, done.output
    assert "3 branches from" in done.stdout
    assert "Gemm → Relu → Gemm" in done.stdout
    assert list(tmp_path.iterdir()) == [tmp_path / "s.onnx"]
    done = hydra("fuse", str(tmp_path / "s.onnx"), "--explain", "--json")
    (group,) = json.loads(done.stdout)["fusion"]
    assert (group["heads"], group["join"], group["fused"]) == (3, "stack", True)
    # Weights and biases of 6x5 and 5x4, three times; two operations per weight.
    assert group["weight_bytes"] == 3 * (6 * 5 + 5 + 5 * 4 + 4) * 4
    assert group["flops_per_sample"] == 3 * 2 * (6 * 5 + 5 * 4)
    out = str(tmp_path / "f.onnx")
    assert hydra("fuse", str(tmp_path / "s.onnx"), "--explain", "-o", out).exit_code == 0
    assert he.Graph.load(out).fusion[0].fused
    done = hydra("fuse", str(tmp_path / "s.onnx"))
    assert done.exit_code == 2
    assert "No output file was named." in done.output


def test_names_are_no_markup(tmp_path: Path) -> None:
    """Steps name layers, and rich would take brackets in names for tags."""
    graph = student()
    model = onnx.ModelProto()
    model.CopyFrom(graph.model)
    (layer,) = [node for node in model.graph.node if node.name == "n0"]
    layer.name = "body[/x]"
    he.Graph(model, graph.metadata).save(tmp_path / "model.onnx")
    data = tmp_path / "data.npz"
    np.savez(data, x=np.random.default_rng(0).standard_normal((20, 6)).astype(np.float32))
    result = hydra(
        "quantize", tmp_path / "model.onnx", "--report", "--data", data, "--calibration", data
    )
    assert result.exit_code == 0, result.output
    assert "body[/x] alone" in result.output
    result = hydra(
        "compile", tmp_path / "model.onnx", "-o", tmp_path / "model.hydra", "--calibration", data,
        "--precision", "int8,layer.body[/x]=fp32",
    )  # fmt: skip
    assert result.exit_code == 0, result.output


def test_plan(files: Path) -> None:
    found = json.loads(hydra("plan", files / "student.onnx", "--target", "l4", "--json").stdout)
    assert set(found) == {
        *("target", "heads", "fusion", "flops_per_sample", "ensemble", "precisions"),
        *("features", "notes", "buildable", "steps"),
    }
    assert found["heads"] == 3
    assert found["target"]["gpu"]["compute_capability"] == 89
    assert found["features"][0]["name"] == "fp8"
    assert found["steps"][1]["command"] == "scp student.hydra DEVICE:"
    shown = hydra("plan", files / "student.onnx", "--target", "jetson-thor@jp7.0")
    assert shown.exit_code == 0, shown.output
    assert "jetson-thor@jp7.0: TensorRT 10.13" in shown.output
    assert "no rate" in shown.output
    assert "mind: No tensor rate of int8" in shown.output
    assert "    sudo nvpmodel -m 0\n" in shown.output
    bad = hydra("plan", files / "student.onnx", "--target", "l4", "--batch", "1,many")
    assert bad.exit_code == 1
    assert "--batch is '1,many'" in bad.stderr
    bad = hydra("plan", files / "student.onnx", "--target", "l4", "--precision", "fp7")
    assert bad.exit_code == 1
    assert "l4 has no fp7" in bad.stderr


def test_plan_against_an_ensemble(files: Path, tmp_path: Path) -> None:
    members = [files / f"member{index}.onnx" for index in range(HEADS)]
    merged = tmp_path / "ensemble.onnx"
    assert hydra("merge", *members, "-o", merged).exit_code == 0
    options = ("--target", "l4", "--json", "--against")
    found = json.loads(hydra("plan", files / "student.onnx", *options, merged).stdout)
    of_one = costs.cost(he.Graph.load(members[0])).flops_per_sample
    assert found["ensemble"]["what"] == "as in its graph"
    assert found["ensemble"]["flops_per_sample"] == HEADS * of_one
    bad = hydra("plan", files / "student.onnx", *options, files / "missing.onnx")
    assert bad.exit_code == 1
    assert "missing.onnx" in json.loads(bad.stdout)["error"]["what"]


def test_plan_for_this_machine(files: Path) -> None:
    done = hydra("plan", files / "student.onnx", "--target", "local", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    here = detection.detect()
    assert found["found"] == here.found
    assert found["target"]["name"] == here.target.name
    assert {step["where"] for step in found["steps"]} == {"here"}
    shown = hydra("plan", files / "student.onnx", "--target", "local")
    assert shown.stdout.splitlines()[1].startswith("found")
    assert "--target local" in shown.stdout

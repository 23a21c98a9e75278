"""Tables of README and docs are what the JSON gives; fixtures have the layouts that the benchmarks write."""

import copy
import json
from pathlib import Path

import pytest

from benchmarks.fits import checked_table, computed_bytes, fixed_bytes
from benchmarks.op_goals import GOALS, op_goals_table
from benchmarks.report import Results, add_ceilings
from benchmarks.results_table import MARKED, PAGES, ROOT, load, main, render, section, short
from d2v.config.presets import preset
from d2v.train.micro_batch import activation_bytes

PROVENANCE = {
    "device": "cpu", "cpu": "Some CPU", "gpu": None, "threads": 2, "torch": "2.13.0", "driver": None,
    "commit": "0123456789", "uncommitted_changes": False, "date": "2026-11-22T10:00:00+00:00",
}  # fmt: skip
STEP = {
    "provenance": {"cpu": "Some CPU", "torch": "2.13.0", "commit": "abcdefg", "date": "2026-11-22"},
    "results": [
        {"preset": "image_base", "precision": "fp32", "seconds": 3.0149, "share_of_fp32_matmul": 0.668,
         "peak_MiB": 2890.7, "original": {"seconds": 3.41, "share": 0.59, "MiB": 3107}},
        {"preset": "text_base", "precision": "bf16", "seconds": 12.5, "share_of_fp32_matmul": 0.9,
         "peak_MiB": 4000.0},
    ],
}  # fmt: skip


def step_row(preset, variant, precision="bf16", ours=True, **values):
    return {
        "preset": preset,
        "precision": precision,
        "variant": variant,
        "ours": ours,
        "status": "ok",
    } | values


NEW_STEP = {
    "results": [
        step_row("image_base", "eager", "fp32", ours=False, seconds=3.0, share_of_fp32_matmul=0.7,
                 peak_MiB=2900.0, against_eager=1.0, warmup_seconds=6.0,
                 original={"seconds": 3.41, "share": 0.594, "MiB": 3107},
                 hot_paths={"steps": 2, "coverage": 1.0, "rows": [
                     {"name": "student linear", "seconds": 1.2, "share": 0.4, "of_matmul": 0.85},
                     {"name": "masks/fwd/eager", "seconds": 0.03, "share": 0.01, "of_matmul": 0.0}]}),
        step_row("image_base", "compile", "fp32", ours=False, seconds=2.5, against_eager=1.2, peak_MiB=2500.0,
                 warmup_seconds=61.3),
        step_row("text_base", "eager", "fp32", ours=False, seconds=12.0, share_of_fp32_matmul=0.8,
                 peak_MiB=4300.0, hot_paths={"steps": 2, "coverage": 1.0, "rows": [
                     {"name": "conv_block/bwd/eager", "seconds": 3.0, "share": 0.2512, "of_matmul": 0.7},
                     {"name": "student linear", "seconds": 2.4, "share": 0.2, "of_matmul": 0.8}]}),
        step_row("text_base", "compile", "fp32", ours=False, status="failed", reason="gate: loss of step 2"),
    ],
}  # fmt: skip
ON_H200 = {
    "provenance": {"device": "cuda", "gpu": "NVIDIA H200", "driver": "570.1", "torch": "2.13.0"},
    "complete": False,
    "results": [
        step_row("image_base", "eager", ours=False, batch=64, seconds=0.4, **{"samples/s": 160.0},
                 share_of_own_matmul=0.083, peak_MiB=40_000.0, against_eager=1.0, warmup_seconds=3.0),
        step_row("image_base", "auto", batch=64, seconds=0.16, **{"samples/s": 400.0},
                 share_of_own_matmul=0.2, peak_MiB=20_000.0, against_eager=2.5, warmup_seconds=9.0),
        step_row("image_base", "cuda_graph", batch=64, seconds=0.1, **{"samples/s": 640.0},
                 share_of_own_matmul=0.33, peak_MiB=21_000.0, against_eager=4.0, warmup_seconds=10.0),
        step_row("image_base", "compile", ours=False, status="failed", reason="gate: loss of step 1"),
    ],
}  # fmt: skip
CURVE = {"preset": "image_tiny", "axis": "masks", "precision": "fp32", "time_exponent": 0.913,
         "memory_exponent": 0.5, "points": [{"x": 1, "seconds": 0.01, "peak_MiB": 4.0},
                                            {"x": 8, "seconds": 0.0667, "peak_MiB": 11.31}]}  # fmt: skip
PROBES = {name: {"linear": {"test": value}, "knn": {"test": value - 0.1}}
          for name, value in (("raw", 0.5), ("untrained", 0.6123), ("trained", 0.9))}  # fmt: skip
DEMO = {
    "image": {"label": "which digit", "probe": PROBES, "steps": 3000, "seconds": 211.4},
    "seconds": 211.5, "scale": 1.0, "machine": {"device": "cpu", "cores": 2, "threads": 2, "torch": "2.13.0"},
}  # fmt: skip
PROFILE = {
    "preset": "image_base", "shape": [2, 3, 224, 224], "precision": "fp32", "device": "cpu",
    "environment": {"cpu": "Some CPU", "torch_threads": 2, "gpus": [], "torch": "2.13.0", "commit": "0" * 40},
    "reports": [{"backend": "eager", "wall": 3.25, "coverage": 0.9912, "rows": [
        {"name": "student linear", "seconds": 2.0, "share": 0.62, "calls": 150, "bytes": 10, "flops": 10,
         "of_copy": 0.1, "of_matmul": 0.81},
        {"name": "masks other", "seconds": 0.02, "share": 0.0099, "calls": 2, "bytes": 0, "flops": 0,
         "of_copy": 0.0, "of_matmul": 0.0}]}],
}  # fmt: skip

MEMORY = [
    {"preset": "audio_base", "case": "student", "shape": "N8 S300", "dtype": "float32", "variant": variant,
     "direction": "forward+backward", "ours": variant == "eager", "status": "ok", "reason": "",
     "peak_MiB": mib}
    for variant, mib in (("eager", 25.0), ("pytorch", 200.0), ("sdpa", 120.25))
] + [
    {"preset": "audio_base", "case": "student", "shape": "N8 S300", "dtype": "float32", "variant": "xformers",
     "direction": "forward+backward", "ours": False, "status": "skipped", "reason": "not installed"},
]  # fmt: skip


def op_row(variant, ours, us, direction="forward", **values):
    row = {
        "stem": "mlp", "op": "gelu_mlp", "case": "student", "preset": "image_base", "shape": "N16",
        "dtype": "float32", "direction": direction, "variant": variant, "ours": ours, "bytes": 4e6,
        "flops": 2e9, "status": "ok", "us": us, "iqr_us": 1.0, "peak_MiB": 7.5,
    }  # fmt: skip
    return row | values


def ops():
    rows = [
        op_row("eager", True, 999.0),
        op_row("eager", True, 4000.0, "forward+backward"),
        op_row("compile", False, 3500.0, "forward+backward"),
        op_row("triton", True, None, "forward+backward", status="skipped", reason="no CUDA"),
        op_row("pytorch", False, 5000.0, "forward+backward"),
        op_row("apex", False, None, "forward+backward", status="skipped", reason="not installed"),
    ]
    add_ceilings(rows, copy=2e10, matmul={"float32": 1e12})
    return {"schema": 1, "provenance": PROVENANCE, "rows": rows, "steps": []}


@pytest.fixture
def results(tmp_path):
    """A folder with one file for each table."""
    folder = tmp_path / "results"
    folder.mkdir()
    files = {"step_cpu": STEP, "ops_cpu": ops(), "demo_cpu": DEMO, "profile_image": PROFILE,
             "scaling_cpu": {"provenance": PROVENANCE, "curves": [CURVE]},
             "memory_cpu": {"provenance": PROVENANCE, "rows": MEMORY}}  # fmt: skip
    for name, data in files.items():
        (folder / f"{name}.json").write_text(json.dumps(data))
    return folder


@pytest.fixture
def readme(tmp_path):
    path = tmp_path / "README.md"
    tables = "\n".join(f"## {n}\n<!-- results:{n} -->\n<!-- /results:{n} -->\n"
                       for n in ("step", "ops", "profile", "scaling", "demo", "hotpaths",
                                 "memory"))  # fmt: skip
    path.write_text(f"# Title\n\n{tables}\nThe end.\n")
    return path


def update(readme, results, *more):
    return main(["--pages", str(readme), "--results", str(results), *more])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_say_what_the_json_gives(page):
    text = page.read_text(encoding="utf-8")
    assert MARKED.search(text)
    assert render(text, load(ROOT / "benchmarks" / "results")) == text, "run `make results`"


def test_computed_memory_is_near_what_was_measured():
    lines = checked_table(load(ROOT / "benchmarks" / "results")["step"])[2:]
    shares = {line: int(line.split("|")[-2].strip(" %")) for line in lines}
    assert {line.split(" | ")[1] for line in lines} == {"image_base", "audio_base", "text_base"}
    for line, share in shares.items():
        assert 80 <= share <= (160 if "NVIDIA" in line else 110), line


def test_computed_memory_grows_by_the_activations():
    one, three = (computed_bytes("image_tiny", "fp32", (n, 1, 24, 24)) for n in (1, 3))
    cfg = preset("image_tiny")
    assert (three - one, one) == (2 * activation_bytes(cfg), fixed_bytes(cfg)[1] + activation_bytes(cfg))
    trained, fixed = fixed_bytes(cfg)
    assert 16 * trained <= fixed <= 20 * trained * 1.1


def test_tables_hold_the_numbers_of_the_files(readme, results):
    assert update(readme, results) == 0
    lines = readme.read_text().splitlines()
    for line in (
        "| image_base | fp32 | 3.01 | 67% | 2,890" + 4 * " | not measured" + " | 3.41 | 59% | 3,110 |",
        "| text_base | bf16 | 12.5 | 90% | 4,000" + 7 * " | not measured" + " |",
        "| gelu_mlp, student | image_base | N16 float32 | 2,000 | 4,000 | 50% | 7.5 | 3,500 "
        "| 5,000 (pytorch) |",
        "| student linear | 2,000 | 62% | 150 | 10% | 81% |",
        "| image_tiny | masks 1 to 8 | 10 to 66.7 | 0.91 | 4 to 11.3 | 0.50 |",
        "| preset | pass | shape | materialised MiB | eager MiB | sdpa MiB | ours of it |",
        "| audio_base | student, forward+backward | N8 S300 float32 | 200 | 25 | 120 | 12% |",
        "| image | which digit | test | 50.0 | 61.2 | 90.0 | 80.0 | 3,000 | 211 |",
        "`ops_cpu.json`: Some CPU, threads 2, torch 2.13.0, commit 0123456, 2026-11-22.",
        "`step_cpu.json`: Some CPU, torch 2.13.0, commit abcdefg, 2026-11-22.",
        "`demo_cpu.json`: cpu, cores 2, threads 2, torch 2.13.0.",
        "`profile_image.json`: Some CPU, threads 2, torch 2.13.0, commit 0000000.",
    ):
        assert line in lines
    assert lines.count("On a GPU: not measured.") == 6
    assert not any("masks other" in line for line in lines)
    assert (lines[0], lines[-1]) == ("# Title", "The end.")


def test_twice_is_once(readme, results):
    update(readme, results)
    once = {path: path.read_bytes() for path in (readme, *results.iterdir())}
    assert {path.name for path in results.glob("*.png")} == {"step_cpu.png", "ops_cpu.png", "scaling_cpu.png"}
    stamps = {path: path.stat().st_mtime_ns for path in results.glob("*.png")}
    assert update(readme, results) == 0
    assert {path: path.read_bytes() for path in (readme, *results.iterdir())} == once
    assert {path: path.stat().st_mtime_ns for path in results.glob("*.png")} == stamps


def test_a_typed_number_is_found_and_undone(readme, results, capsys):
    update(readme, results)
    right = readme.read_text()
    assert update(readme, results, "--check") == 0
    readme.write_text(right.replace("| 3.01 |", "| 2.01 |"))
    assert update(readme, results, "--check") == 1
    out = capsys.readouterr().out
    assert "table step is not what" in out and "table ops" not in out
    assert "| 2.01 |" in readme.read_text()  # --check writes nothing
    update(readme, results)
    assert readme.read_text() == right


def test_new_measurements_change_table_and_plot(readme, results):
    update(readme, results)
    plot = (results / "step_cpu.png").read_bytes()
    faster = copy.deepcopy(STEP)
    faster["results"][0]["seconds"] = 1.5
    (results / "step_cpu.json").write_text(json.dumps(faster))
    assert update(readme, results, "--check") == 1
    update(readme, results)
    assert "| image_base | fp32 | 1.5 |" in readme.read_text()
    assert (results / "step_cpu.png").read_bytes() != plot


def test_without_files_nothing_is_claimed(readme, tmp_path):
    assert update(readme, tmp_path / "nowhere") == 0
    text = readme.read_text()
    assert text.count("On a GPU: not measured.") == 6 and text.count("Not measured.") == 1
    lines = [line for line in text.splitlines() if line.startswith("| ") and "---" not in line]
    assert [line for line in lines if not line.startswith(("| goal on", "| op on"))] == [
        f"| {goal} | not measured | not measured | not measured |"
        for goal in ("at least 50% of the measured matmul rate", "at least 3 times as fast as eager",
                     "at least 1.3 times as fast as torch.compile")
    ] + [
        f"| {goal.op}, {goal.case} | {goal.preset} | {goal.direction} | {goal.words} | not measured |  |"
        for goal in GOALS
    ]  # fmt: skip


def test_goals_of_ops_are_judged_on_an_h200_only():
    def row(direction, us, floor_us, variant="triton", ours=True, **key):
        case = {"op": "conv_block_2d", "case": "decoder", "preset": "image_base", "dtype": "bfloat16"} | key
        return case | {"direction": direction, "variant": variant, "ours": ours, "status": "ok", "us": us,
                       "floor_us": floor_us}  # fmt: skip

    def verdicts(rows, gpu="NVIDIA H200"):
        found = Results(Path("ops_cuda.json"), {"rows": rows, "provenance": {"gpu": gpu}})
        cells = [line.split(" | ") for line in op_goals_table([found])[2:]]
        return [" | ".join(one[2:]) for one in cells if one[0] == "| conv_block_2d, decoder"]

    both = "forward+backward"
    rows = [row("forward", 212.4, 55.3), row(both, 560.0, 129.3), row("forward", 90.0, 55.3, "eager"),
            row("forward", 80.0, 55.3, "channels-first", ours=False), row("forward", 300.0, 55.3, "native"),
            row("forward", 1.0, 0.5, preset="image_large"), row("forward", 1.0, 0.5, dtype="float16"),
            row("forward", 1.0, 0.5) | {"status": "failed"}]  # fmt: skip
    # eager, peers, other presets, failures and fp16 do not count; backward is the same variant's difference
    assert verdicts(rows[:-1]) == ["forward | at most 165 us | 212 us (triton) | not met |",
                                   "backward | at most 360 us | 348 us (triton) | met |"]  # fmt: skip
    assert verdicts(rows) == verdicts(rows[:-1])
    assert verdicts(rows, "NVIDIA H100") == ["forward | at most 165 us | not measured |  |",
                                             "backward | at most 360 us | not measured |  |"]  # fmt: skip
    assert verdicts([row("forward", 150.0, 55.3)])[0].endswith("| 150 us (triton) | met |")
    floors = [row("forward", 31.0, 15.0, op="multimask_attention", case="student"),
              row("forward", 300.0, 240.0, op="ema_update_", case="fp32", dtype="float32")]  # fmt: skip
    lines = op_goals_table([Results(Path("ops_cuda.json"), {"rows": floors, "provenance": {"gpu": "H200"}})])
    assert any(line.endswith("| at most 2 floors | 31 us, 2.1 floors (triton) | not met |") for line in lines)
    assert any(line.endswith("of the ceiling | 300 us, 80% (triton) | not met |") for line in lines)


def test_gpu_results_end_the_not_measured_line(results):
    data = ops()
    data["provenance"] = PROVENANCE | {"device": "cuda", "gpu": "NVIDIA H200", "driver": "570.1"}
    (results / "ops_h200.json").write_text(json.dumps(data))
    text = section("ops", load(results)["ops"])
    assert "not measured." not in text
    assert "`ops_h200.json`: NVIDIA H200, threads 2, driver 570.1," in text
    assert text.index("ops_cpu") < text.index("ops_h200")


def test_a_new_backend_gets_its_column_and_the_share_is_of_the_fastest(results):
    data = ops()
    rows = data["rows"] + [op_row("triton", True, 2500.0, "forward+backward", peak_MiB=3.0)]
    rows = [row for row in rows if not (row["variant"] == "triton" and row["status"] != "ok")]
    add_ceilings(rows, copy=2e10, matmul={"float32": 1e12})
    (results / "ops_cpu.json").write_text(json.dumps(data | {"rows": rows}))
    text = section("ops", load(results)["ops"])
    assert "| floor us | eager us | triton us | of ceiling | peak MiB |" in text
    assert "| 2,000 | 4,000 | 2,500 | 80% | 3 |" in text


def test_failed_gates_have_no_number(results):
    data = ops()
    for row in data["rows"]:
        row |= {"status": "failed", "reason": "gate: out"}
    (results / "ops_cpu.json").write_text(json.dumps(data))
    assert "| 2,000 | not measured | not measured | not measured | not measured | not measured |" in section(
        "ops", load(results)["ops"]
    )


def step_section(results, name="step", **files):
    for path in results.glob("step_*.json"):
        path.unlink()
    for stem, data in files.items():
        (results / f"step_{stem}.json").write_text(json.dumps(data))
    return section(name, load(results)["step"])


def test_variants_of_the_step_get_columns_on_a_cpu(results):
    data = NEW_STEP | {"provenance": PROVENANCE}
    text = step_section(results, cpu=data)
    assert "| torch.compile: s | speed over eager | peak MiB | warm-up s | original: s |" in text
    assert "| image_base | fp32 | 3 | 70% | 2,900 | 2.5 | 1.2 | 2,500 | 61.3 | 3.41 | 59% | 3,110 |" in text
    assert "| text_base | fp32 | 12 | 80% | 4,300" + 7 * " | not measured" + " |" in text
    assert "\n- text_base, fp32, compile: failed, gate: loss of step 2\n" in text
    rows = data["results"] + [step_row("image_base", "auto", "fp32", seconds=2.0, against_eager=1.5)]
    text = step_section(results, cpu=data | {"results": rows})
    assert "| auto: s | speed over eager | peak MiB | warm-up s | original: s |" in text
    assert "| 61.3 | 2 | 1.5 | not measured | not measured | 3.41 |" in text


def test_steps_on_a_gpu_have_lines_of_their_own(results):
    text = step_section(results, cpu=STEP, cuda=ON_H200)
    assert "On a GPU" not in text
    assert "| image_base | bf16 | eager | 64 | 400 | 160 | 8% | 40,000 | 1 | 3 |" in text
    assert "| image_base | bf16 | cuda_graph | 64 | 100 | 640 | 33% | 21,000 | 4 | 10 |" in text
    assert "| image_base | bf16 | torch.compile" + 7 * " | not measured" + " |" in text
    assert "\n- image_base, bf16, compile: failed, gate: loss of step 1\n" in text
    assert "`step_cuda.json`: NVIDIA H200, driver 570.1, torch 2.13.0, incomplete." in text


def test_goals_are_judged_by_our_fastest_on_an_h200_only(results):
    def goals(data):
        return [line.split(" | ")[1] for line in step_section(results, cuda=data).splitlines()
                if line.startswith("| at least")]  # fmt: skip

    assert goals(ON_H200) == ["33% (cuda_graph): not met", "4 (cuda_graph): met", "not measured"]
    data = copy.deepcopy(ON_H200)
    data["results"][3] |= {"status": "ok", "samples/s": 320.0}
    assert goals(data)[2] == "2 (cuda_graph): met"
    data["results"][3] |= {"samples/s": 500.0}
    assert goals(data)[2] == "1.28 (cuda_graph): not met"
    data["results"] = [row for row in data["results"] if not row["ours"]]
    assert goals(data) == ["not measured"] * 3
    assert goals(ON_H200 | {"provenance": {"device": "cuda", "gpu": "NVIDIA H100"}}) == ["not measured"] * 3


def test_hot_paths_are_the_eager_steps_of_new_files(results):
    assert "|" not in step_section(results, "hotpaths", cpu=STEP)
    lines = step_section(results, "hotpaths", cpu=NEW_STEP, old=STEP).strip().splitlines()
    assert lines == [
        "| hot path of the eager step | image_base fp32 | text_base fp32 |",
        "| --- | ---: | ---: |",
        "| student linear | 40.0% (85%) | 20.0% (80%) |",
        "| conv_block/bwd/eager |  | 25.1% (70%) |",
        "",
        "`step_cpu.json`: .",
        "",
        "On a GPU: not measured.",
    ]


def test_new_steps_are_drawn(results, readme):
    (results / "step_cuda.json").write_text(json.dumps(ON_H200))
    assert update(readme, results) == 0
    assert (results / "step_cuda.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- results:step -->\n", "must be closed"),
        ("<!-- /results:step -->\n", "must be closed"),
        ("<!-- results:step -->\n<!-- /results:ops -->\n", "must be closed"),
        ("<!-- results:steps -->\n<!-- /results:steps -->\n", "marker must be one of step, ops"),
    ],
)
def test_markers_that_cannot_be_used(text, message, readme, results, capsys):
    readme.write_text(text)
    assert update(readme, results) == 2
    assert message in capsys.readouterr().err
    assert readme.read_text() == text


def test_a_file_of_no_table_is_named(readme, results, capsys):
    (results / "speed.json").write_text("{}")
    assert update(readme, results) == 2
    assert "speed.json must begin with one of step, ops" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "not measured"), (0, "0"), (0.00123456, "0.00123"), (9.996, "10"), (123456, "123,000")],
)
def test_three_digits(value, text):
    assert short(value) == text


def test_make_results_is_there():
    makefile = Path(ROOT / "Makefile").read_text()
    assert "results: $(INSTALLED)\n\t$(RUN) -m benchmarks.results_table\n" in makefile

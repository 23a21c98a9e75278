"""The command line: refusals come before anything runs, in words, with the exit codes that cli/main.py
names."""

import json
import subprocess
import sys

import pytest

from d2v.cli import main as cli
from d2v.cli.main import main
from d2v.data.open import guess_modality

COLUMNS = {"text_column": None, "label_column": None}
"""as in the config of the model"""


def refused(capsys, *arguments):
    """Exit code 2, nothing on stdout, no traceback; the message."""
    assert main(list(arguments)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    return err


def test_help_needs_neither_torch_nor_matplotlib():
    code = (
        "import sys\nfrom d2v.cli.main import main\nassert main(['--help']) == 0\n"
        "assert main(['presets', 'image_base']) == 0\n"
        "sys.exit(sorted({'torch', 'matplotlib', 'rich'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert all(name in done.stdout for name in cli.COMMANDS)


def test_module_and_function_are_the_same_command():
    done = subprocess.run(
        [sys.executable, "-m", "d2v", "presets"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert "audio_large" in done.stdout


@pytest.mark.parametrize("name", sorted(cli.COMMANDS))
def test_every_command_explains_itself(name, capsys):
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert not stop.value.code
    assert f"usage: d2v {name}" in capsys.readouterr().out


BLOCKED = (
    "import sys\n"
    "class Blocked:\n"
    "    def find_spec(self, name, path=None, target=None):\n"
    "        if name.partition('.')[0] in {libraries!r}:\n"
    "            raise ModuleNotFoundError(f'No module named {{name!r}}', name=name)\n"
    "sys.meta_path.insert(0, Blocked())\n"
)
"""before anything else: as if libraries were not installed"""


@pytest.mark.parametrize("name", ["tyro", "soundfile"])
def test_without_the_trainers_libraries_one_line_says_what_to_install(name, tmp_path):
    """For every command, `python -m d2v` and `import d2v`."""
    wanted = f'd2v needs {name}, which is not installed: pip install "d2vkern[train]"\n'
    code = BLOCKED.format(libraries=(name,)) + (
        "from d2v.cli.main import main\n"
        "assert main(['--help']) == 0\n"
        "sys.exit(main(['train', 'audio_tiny', '--data', sys.argv[1], '--out', sys.argv[1] + '/r']))"
    )
    (tmp_path / "a.wav").write_bytes(b"")
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (2, wanted)
    assert not (tmp_path / "r").exists()
    code = BLOCKED.format(libraries=(name,)) + "import d2v\nprint(d2v.__version__)\nd2v.load"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if name == "tyro":  # which a model does not need
        assert (done.returncode, done.stderr) == (0, "")
    else:
        assert done.stderr.endswith(f"ImportError: {wanted}")


def test_what_is_missing_besides_is_a_bug(monkeypatch):
    def broken(arguments):
        raise ModuleNotFoundError("No module named 'd2v.nothing'", name="d2v.nothing")

    monkeypatch.setattr(cli, "command", lambda name: broken)
    with pytest.raises(ModuleNotFoundError):
        main(["plot"])


def test_no_command_prints_the_overview(capsys):
    assert main([]) == 2
    assert "pretrain a preset" in capsys.readouterr().out


def test_unknown_command_names_the_nearest(capsys):
    assert "no command 'trian'; nearest: train" in refused(capsys, "trian")


def test_unknown_preset_names_the_nearest(capsys, tmp_path):
    err = refused(capsys, "train", "image_bse", "--data", "digits", "--out", str(tmp_path / "r"))
    assert err == "presets: no preset 'image_bse'; nearest: image_base, image_large, image_huge14\n"


@pytest.mark.parametrize(
    ("key", "nearest"),
    [("--optm.lr", "--optim.lr"), ("--model.front.hieght", "--model.front.height"), ("--oot", "--out")],
)
def test_unknown_key_names_the_nearest_before_anything_runs(key, nearest, capsys, tmp_path):
    out = tmp_path / "r"
    err = refused(capsys, "train", "image_tiny", "--data", "digits", "--out", str(out), key, "32")
    assert f"Unrecognized options: {key}" in err
    assert nearest in err
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optim.lr", "-3"], "config: optim.lr must be positive, got -3.0\n"),
        (["--train.seed", "-1"], "config: train.seed must be in 0 .. 2^64 - 1, got -1\n"),
        (
            ["--train.seed", str(2**64)],
            "config: train.seed must be in 0 .. 2^64 - 1, got 18446744073709551616\n",
        ),
        (
            ["--model.front.height", "33"],
            "config: front.height must be a positive multiple of patch 4, got 33\n",
        ),
        (["--model.depth", "2"], "config: target.top_k must be at most depth 2, got 3\n"),
        (["--train.device", "tpu9"], "config: train.device must be auto, cpu or cuda[:N], got 'tpu9'\n"),
    ],
)
def test_impossible_value_is_one_clean_line(arguments, message, capsys, tmp_path):
    out = tmp_path / "r"
    assert (
        refused(capsys, "train", "image_tiny", "--data", "digits", "--out", str(out), *arguments) == message
    )
    assert not out.exists()


def test_a_word_for_a_number_names_its_flag(capsys):
    assert "--optim.lr" in refused(capsys, "train", "image_tiny", "--optim.lr", "fast")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "d2v train: the preset is missing (or --resume RUN)"),
        (["train", "image_tiny", "--out", "r"], "d2v train: --data PATH is missing"),
        (["train", "image_tiny", "--data", "digits"], "d2v train: --out RUN is missing"),
        (["train", "image_tiny", "--resume", "r"], "goes without a preset"),
        (["train", "--resume", "nowhere"], "not a run directory"),
        (["check", "--data", "folder"], "folder does not exist"),
        (["check", "--data", "."], "holds no image, audio or text file"),
        (["check", "--data", "nowhere", "--modality", "image"], "nowhere does not exist"),
        (["probe", "r", "--data", "d", "--layer", "top"], "--layer"),
        (["probe", "r"], "--data"),
        (["plot", "nowhere"], "nowhere/metrics.jsonl does not exist"),
        (["demo", "--minutes-scale", "0"], "must be positive, got 0.0"),
        (["presets", "txt_base"], "nearest: text_base"),
    ],
)
def test_refusals_say_what_is_wrong(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, *arguments)
    assert list(tmp_path.iterdir()) == []


def test_overrides_reach_the_run(monkeypatch, tmp_path):
    import d2v.train.pretrain

    seen = {}

    def fake_run(cfg, data, out, *, resume, capture, probe):
        seen.update(cfg=cfg, data=data, out=out, resume=resume, capture=capture)
        return d2v.train.pretrain.RunResult(out, 0, False, 1, 0.0, [])

    monkeypatch.setattr(d2v.train.pretrain, "run", fake_run)
    overrides = [
        "--model.front.height",
        "32",
        "--data.batch",
        "4",
        "--train.micro-batch",
        "2",
        "--optim.clip",
        "None",
    ]
    assert main(["train", "image_tiny", "--data", "digits", "--out", "r", *overrides]) == 1
    cfg = seen.pop("cfg")
    assert seen == {"data": "digits", "out": "r", "resume": False, "capture": None}
    assert (cfg.preset, cfg.model.front.height, cfg.model.front.width) == ("image_tiny", 32, 24)
    assert (cfg.data.batch, cfg.train.micro_batch, cfg.optim.clip) == (4, 2, None)


@pytest.mark.parametrize(
    ("arguments", "function", "positional", "named"),
    [
        (
            ["probe", "r", "--data", "d", "--layer", "-2", "--kind", "knn", "--weights", "teacher",
             "--backend", "eager", "--backend.mlp=triton"],
            "d2v.evaluate.probe.run_probe", ("r", "d"),
            {"layer": -2, "weights": "teacher", "kinds": ["knn"], "backend": "eager,mlp=triton", **COLUMNS},
        ),
        (
            ["probe", "r", "--data", "d"],
            "d2v.evaluate.probe.run_probe", ("r", "d"),
            {"layer": -1, "weights": "student", "kinds": ["linear", "knn"], "backend": None, **COLUMNS},
        ),
        (
            ["extract", "r", "--data", "d", "--out", "f.npz", "--pool", "none"],
            "d2v.evaluate.features.run_extract", ("r", "d", "f.npz"),
            {"layer": -1, "pool": "none", "weights": "student", "backend": None},
        ),
        (["demo", "--minutes-scale", "0.5"], "d2v.tools.demo.run_demo", ("runs/demo", 0.5), {}),
    ],
)  # fmt: skip
def test_commands_hand_their_arguments_on(arguments, function, positional, named, monkeypatch):
    calls = []
    monkeypatch.setattr(function, lambda *args, **kwargs: calls.append((args, kwargs)))
    assert main(arguments) == 0
    assert calls == [(positional, named)]


def test_presets_mark_what_differs_from_the_default(capsys):
    assert main(["presets", "image_large"]) == 0
    out = capsys.readouterr().out
    assert "large_images_only_task.yaml" in out
    assert "* model.dim = 1024" in out
    assert "  model.mask.clones = 16" in out
    assert "* model.front = 'ImageFront'" in out


def test_check_counts_the_embedded_digits(capsys):
    assert main(["check", "--data", "digits"]) == 0
    out = capsys.readouterr().out
    assert "digits: " in out
    assert "0 unreadable" in out


def test_a_bug_shows_its_traceback(monkeypatch):
    def broken(arguments):
        raise KeyError("a bug")

    monkeypatch.setattr(cli, "command", lambda name: broken)
    with pytest.raises(KeyError):
        main(["plot"])


def test_traceback_on_request(monkeypatch):
    monkeypatch.setenv("D2V_TRACEBACK", "1")
    with pytest.raises(FileNotFoundError):
        main(["plot", "nowhere"])


@pytest.mark.parametrize(
    ("error", "code"), [(OSError(28, "No space left on device"), 1), (KeyboardInterrupt(), 130)]
)
def test_exit_codes_of_failures_while_running(error, code, monkeypatch, capsys):
    def failing(arguments):
        raise error

    monkeypatch.setattr(cli, "command", lambda name: failing)
    assert main(["plot"]) == code
    assert capsys.readouterr().err.count("\n") == 1


def test_check_knows_the_modality_by_the_files(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    for name, text in (("a/one.txt", "rain"), ("two.TXT", "sun"), ("labels.npz", "")):
        (tmp_path / name).write_text(text)
    assert guess_modality(".") == "text" and guess_modality("labels.npz") == "image"
    (tmp_path / "two.TXT").rename("two.txt")
    for modality, suffix in (("audio", ".wav"), ("image", ".png")):
        (tmp_path / modality).mkdir()
        for number in range(3):
            (tmp_path / modality / f"{number}{suffix}").write_bytes(b"")
            (tmp_path / modality / f"{number}.txt").write_text("its label or transcript")
        (tmp_path / modality / "notes.txt").write_text("a text")
        assert guess_modality(modality) == modality
        for number in range(3):
            (tmp_path / modality / f"more{number}.txt").write_text("texts of their own")
        assert guess_modality(modality) == "text"
    assert main(["check", "--data", "a"]) == 1
    said = capsys.readouterr().out
    assert said.startswith("a: 1 samples, 1 usable, 0 unreadable, 0 skipped\n")
    assert "training would stop: data: a: " in said and "less than one block; data.block is 512" in said
    assert main(["check", "--data", "a", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["total"] == 1 and report["refused"] in said and report["left_out"] == {}

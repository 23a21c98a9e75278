"""How speech was normalised, its letters and texts' tokens: what else passes through every conversion."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from torch import Tensor

from d2v.config.recipes import recipe
from d2v.config.run import ProbeConfig
from d2v.config.toml import read_tuned_config
from d2v.config.tune import HeadConfig
from d2v.data.text.tokenizer import load_tokenizer
from d2v.data.types import DataError
from d2v.evaluate.features import run_extract
from d2v.evaluate.scores import run_eval
from d2v.formats.convert import run_convert, save_folder
from d2v.formats.open import open_model
from d2v.formats.recorded import recorded_waves
from d2v.model.encoder import ModalityEncoder
from d2v.model.tuned import FineTuned
from d2v.tools.race import run_race
from tests.d2v.test_normalisation import SOUND, one_step
from tests.d2v.tiny_models import make_model
from tests.d2v.tiny_runs import LINES, make_data, run, run_finetune, tiny


def sounds(folder: Path) -> str:
    """Two classes of tones of 0.2 of full scale, five files each, recorded at 16 kHz."""
    t = np.arange(12_000) / 16_000
    for number in range(10):
        (folder / f"{number % 2}").mkdir(parents=True, exist_ok=True)
        wave = 0.2 * np.sin(2 * np.pi * (200 + 60 * number) * t)
        soundfile.write(folder / f"{number % 2}" / f"{number}.wav", wave.astype(np.float32), 16_000)
    return str(folder)


@pytest.mark.parametrize("norm", ["none", "transformers"])
def test_speech_is_read_alike_everywhere(
    norm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Sample rate and wave_norm, as pictures' mean and deviation."""
    data = sounds(tmp_path / "sounds")
    cfg = tiny("audio", steps=3, model={"front": SOUND}, data={"wave_norm": norm})
    cfg = dataclasses.replace(cfg, probe=ProbeConfig(every=1))
    seen: list[tuple[int, float]] = []
    local = ModalityEncoder.local

    def look(encoder: ModalityEncoder, source: Tensor, *rest: Any) -> Tensor:
        seen.append((source.shape[1], float(source.std())))
        return local(encoder, source, *rest)

    def looked() -> bool:
        """Waves of 0.75 s at 8 kHz reached a model, as loud as they are, or of unit variance."""
        loud = 0.2 / 2**0.5 if norm == "none" else 1.0
        fits = all(samples == 6_000 and abs(std - loud) < 0.01 for samples, std in seen)
        return bool(seen) and fits and not seen.clear()

    monkeypatch.setattr(ModalityEncoder, "local", look)
    run(cfg, data, tmp_path / "run", stop=one_step)
    assert looked()
    stations = [tmp_path / "run"]
    for target in ("safetensors", "hf", "original", "hf", "safetensors"):
        stations.append(tmp_path / f"{len(stations)}-{target}")
        run_convert(stations[-2], stations[-1], target)  # type: ignore[arg-type]
    preprocessor = json.loads((stations[2] / "preprocessor_config.json").read_text())
    assert (preprocessor["sampling_rate"], preprocessor["do_normalize"]) == (8_000, norm != "none")
    for place in stations:
        model, opened, _ = open_model(place)
        assert (model.cfg.front, opened.data.wave_norm) == (SOUND, norm)
    run_extract(stations[-1], data, tmp_path / "features.npz")
    assert looked()
    for number, place in enumerate(stations[:4]):
        opened = open_model(place)
        tuned_cfg = recipe("sound_tiny").on("sound_tiny", opened[0].cfg)
        train = dataclasses.replace(tuned_cfg.train, steps=3, evaluate_every=1, device="cpu")
        changed = dataclasses.replace(tuned_cfg.data, batch=4, max_seconds=1.0)
        tuned_cfg = dataclasses.replace(tuned_cfg, train=train, data=changed)
        tuned = tmp_path / f"tuned{number}"
        run_finetune(tuned_cfg, place, data, tuned, opened=opened, stop=one_step)
        assert looked() and read_tuned_config(tuned)[0].data.wave_norm == norm
    changed = dataclasses.replace(changed, wave_norm="none" if norm == "transformers" else "transformers")
    wish = dataclasses.replace(tuned_cfg, data=changed)
    run_finetune(wish, place, data, tmp_path / "wish", opened=opened, stop=one_step)
    assert f"normalised as given, data.wave_norm {changed.wave_norm}; {place} was" in capsys.readouterr().out
    seen.clear()
    run_eval(tuned, data)
    assert looked()
    run_convert(tuned, tmp_path / "tuned-folder", "safetensors")
    assert recorded_waves(tmp_path / "tuned-folder", SOUND) == norm


def test_channels_are_read_as_the_run_read_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of sound whose second channel cancels the first: features, fine-tuning and scores hear the first."""
    data = sounds(tmp_path / "sounds")
    for file in Path(data).rglob("*.wav"):
        wave, rate = soundfile.read(file)
        soundfile.write(file, np.stack([wave, -wave], axis=1), rate)
    heard: list[float] = []
    local = ModalityEncoder.local

    def look(encoder: ModalityEncoder, source: Tensor, *rest: Any) -> Tensor:
        heard.append(float(source.std()))
        return local(encoder, source, *rest)

    def looked() -> bool:
        return bool(heard) and min(heard) > 0.1 and not heard.clear()

    monkeypatch.setattr(ModalityEncoder, "local", look)
    cfg = tiny("audio", steps=3, model={"front": SOUND}, data={"wave_norm": "none", "channels": "first"})
    run(dataclasses.replace(cfg, probe=ProbeConfig(every=1)), data, tmp_path / "run", stop=one_step)
    assert looked()
    run_extract(tmp_path / "run", data, tmp_path / "features.npz")
    assert looked()
    opened = open_model(tmp_path / "run")
    tuned = recipe("sound_tiny").on("sound_tiny", opened[0].cfg)
    train = dataclasses.replace(tuned.train, steps=3, evaluate_every=1, device="cpu")
    tuned = dataclasses.replace(tuned, train=train, data=dataclasses.replace(tuned.data, batch=4))
    run_finetune(tuned, tmp_path / "run", data, tmp_path / "tuned", opened=opened, stop=one_step)
    assert looked() and read_tuned_config(tmp_path / "tuned")[0].data.channels == "first"
    run_eval(tmp_path / "tuned", data)
    assert looked()
    tuned = dataclasses.replace(tuned, data=dataclasses.replace(tuned.data, channels="refuse"))
    with pytest.raises(DataError, match="10 of 10 .* unreadable"):
        run_finetune(tuned, tmp_path / "run", data, tmp_path / "wish", opened=opened, stop=one_step)
    assert f"read as given, data.channels refuse; {tmp_path / 'run'} was" in capsys.readouterr().out


def test_letters_pass_through_files_of_the_original(tmp_path: Path) -> None:
    model = FineTuned(make_model("audio", front=SOUND).cfg, HeadConfig(task="ctc", outputs=7))
    save_folder(model.eval(), tmp_path / "a")
    given = {"labels.json": '["<s>", "<pad>", "</s>", "<unk>", "|", "A", "B"]\n', "vocabulary.json": "[]\n"}
    for name, text in given.items():
        (tmp_path / "a" / name).write_text(text)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "labels.json").write_text("[]")  # of another model
    run_convert(tmp_path / "a", tmp_path / "other" / "b.pt", "original")
    run_convert(tmp_path / "other" / "b.pt", tmp_path / "c", "safetensors")
    assert {name: (tmp_path / "c" / name).read_text() for name in given} == given
    run_convert(tmp_path / "other" / "b.pt", tmp_path / "d", "hf")
    assert "A" in json.loads((tmp_path / "d" / "vocab.json").read_text())


def test_tokens_are_the_same_everywhere(tmp_path: Path) -> None:
    data, other = make_data("text", tmp_path / "data"), labelled_texts(tmp_path / "other")
    run(tiny("text", steps=3), data, tmp_path / "run", stop=one_step)
    ids = load_tokenizer(tmp_path / "run" / "tokenizer.json").encode("the cat sat </s>").ids
    stations = [tmp_path / "run"]
    for target in ("safetensors", "hf", "original", "hf", "safetensors"):
        stations.append(tmp_path / f"{len(stations)}" / target)
        run_convert(stations[-2], stations[-1], target)  # type: ignore[arg-type]
    for number, place in enumerate(stations):
        opened = open_model(place)
        assert opened[2] is not None
        found = load_tokenizer(opened[2] / "tokenizer.json").encode(
            "the cat sat </s>", add_special_tokens=False
        )
        assert found.ids == ids
        if number < 4:
            cfg = recipe("text_tiny").on("text_tiny", opened[0].cfg)
            train = dataclasses.replace(cfg.train, steps=3, evaluate_every=1, device="cpu")
            cfg = dataclasses.replace(cfg, train=train, data=dataclasses.replace(cfg.data, batch=4, block=24))
            tuned = tmp_path / f"tuned{number}"
            run_finetune(cfg, place, other, tuned, opened=opened, stop=one_step)
            kept = load_tokenizer(tuned / "tokenizer.json").encode(
                "the cat sat </s>", add_special_tokens=False
            )
            assert kept.ids == ids


def labelled_texts(folder: Path, part: str = "dev") -> str:
    """Texts of two classes. part: what the held-out ones are called."""
    folder.mkdir()
    for name in ("train", part):
        lines = [{"text": f"{LINES[i % 4]} {i}", "label": "ab"[i % 2]} for i in range(12)]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return str(folder)


def test_a_race_takes_its_tokens_from_what_it_trains_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, other = make_data("text", tmp_path / "data"), labelled_texts(tmp_path / "other", part="test")
    cfg = tiny("text", steps=3)
    run(cfg, data, tmp_path / "run", stop=one_step)
    monkeypatch.setattr("d2v.tools.race_report.plot_race", lambda *_: None)
    raced = dataclasses.replace(cfg, probe=ProbeConfig(data=other))
    short: dict[str, Any] = {"minutes": 1e-4, "seeds": 1, "lr_scales": (1.0,), "evaluations": 1}
    run_race(raced, data, tmp_path / "race", objectives=("mlm",), supervised=False, **short)
    tokens = [(tmp_path / name / "tokenizer.json").read_text() for name in ("run", "race")]
    assert tokens[0] == tokens[1]
    wrong = dataclasses.replace(cfg, probe=ProbeConfig(data=data))
    with pytest.raises(DataError, match="labels missing"):
        run_race(wrong, data, tmp_path / "none", objectives=("mlm",), **short)
    assert not (tmp_path / "none").exists()

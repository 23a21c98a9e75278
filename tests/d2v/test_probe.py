"""Probes: right numbers on features whose answer is known, padding, both label levels, refusals."""

import json

import numpy as np
import pytest
import torch

from d2v.cli.main import main
from d2v.data.open import open_labelled
from d2v.data.types import DataError, Labelled, Split
from d2v.evaluate.features import token_features
from d2v.evaluate.probe import features_of, probe_model, probe_raw, probe_rows, run_probe
from d2v.formats import open as opening
from d2v.formats.open import open_model
from d2v.model import Data2Vec
from d2v.model.pool import mean_over_tokens
from d2v.train.pretrain import run

from .tiny_runs import make_data, tiny


def separable(n: int, classes: int = 3, noise: float = 0.1, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Classes as directions in 8 dimensions; one dimension is constant, one much larger than the others."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    x = np.eye(8)[labels] + noise * rng.standard_normal((n, 8))
    x[:, 6], x[:, 7] = 5.0, 1e4 * rng.standard_normal(n)
    return x.astype(np.float32), labels


class Fixed(Split):
    """A split that is a list of batches."""

    def __init__(self, batches, raw=None):
        self.given, self.baseline = batches, raw

    def __len__(self):
        return sum(len(source) for source, _, _ in self.given)

    def batches(self, size):
        yield from self.given

    def select(self, keep):
        (one,) = self.given
        return Fixed([tuple(None if part is None else part[keep] for part in one)])

    def raw(self):
        return self.baseline


@pytest.fixture
def text_model():
    torch.manual_seed(0)
    return Data2Vec(tiny("text").model)


def text_batch(seed: int = 0):
    """Four sequences of 9, 9, 5 and 2 tokens, padded."""
    tokens = torch.randint(4, 300, (4, 9), generator=torch.Generator().manual_seed(seed))
    padding = torch.arange(9) >= torch.tensor([9, 9, 5, 2])[:, None]
    return tokens.masked_fill(padding, 1), padding


@pytest.mark.parametrize("level", ["sample", "token"])
def test_separable_classes_are_found_and_labels_without_meaning_are_not(level):
    rows = {"train": separable(1_500), "test": separable(600, seed=1)}
    found = probe_rows(rows, level, ("linear", "knn"))
    assert found["linear"]["test"] > 0.99 and found["knn"]["test"] > 0.97
    assert found["n_train"] == 1_500 and found["n_test"] == {"test": 600}
    chance = np.random.default_rng(2).integers(0, 3, 1_500)
    found = probe_rows({"train": (rows["train"][0], chance), "test": rows["test"]}, level, ("linear", "knn"))
    assert 0.2 < found["linear"]["test"] < 0.47 and 0.2 < found["knn"]["test"] < 0.47


def test_every_further_split_is_scored_and_repeats_are_equal():
    rows = {"train": separable(300), "test": separable(100, seed=1), "noisy": separable(100, noise=2, seed=2)}
    found = probe_rows(rows, "sample", ("linear", "knn"))
    for kind in ("linear", "knn"):
        assert set(found[kind]) == {"test", "noisy"}
        assert found[kind]["noisy"] < found[kind]["test"]
    assert probe_rows(rows, "sample", ("linear", "knn")) == found
    assert "linear" not in probe_rows(rows, "sample", ("knn",))


def test_a_handful_of_rows_is_enough():
    x, y = np.eye(3, dtype=np.float32), np.array([0, 1, 2])
    found = probe_rows({"train": (x, y), "test": (x, y)}, "sample", ("linear", "knn"))
    assert found["linear"]["test"] == found["knn"]["test"] == 1.0


def test_one_class_is_refused():
    x = np.zeros((5, 2), dtype=np.float32)
    with pytest.raises(DataError, match="at least 2 classes .* got 1"):
        probe_rows({"train": (x, np.zeros(5, int)), "test": (x, np.zeros(5, int))}, "sample", ("linear",))


def test_the_mean_leaves_padding_out(text_model):
    source, padding = text_batch()
    whole, _ = features_of(text_model, Fixed([(source, padding, torch.zeros(4, dtype=torch.long))]))
    for row, length in enumerate([9, 9, 5, 2]):
        alone = source[row : row + 1, :length]
        single, _ = features_of(
            text_model, Fixed([(alone, torch.zeros_like(alone, dtype=torch.bool), torch.zeros(1).long())])
        )
        np.testing.assert_allclose(whole[row], single[0], rtol=1e-4, atol=1e-5)


def test_mean_over_tokens_of_an_all_padding_row_is_zero():
    x = torch.ones(2, 3, 4)
    padding = torch.tensor([[False, True, True], [True, True, True]])
    assert torch.equal(mean_over_tokens(x, padding), torch.tensor([[1.0], [0.0]]).expand(2, 4))


def test_token_labels_give_a_row_for_each_labelled_token(text_model):
    source, padding = text_batch()
    labels = torch.arange(36).view(4, 9).masked_fill(padding, -1)
    labels[0, 3] = -1
    x, y = features_of(text_model, Fixed([(source, padding, labels)]), layer=-1)
    assert y.tolist() == [i for i in range(36) if labels.flatten()[i] >= 0]
    expected, _ = token_features(text_model.eval(), source, padding, layer=1, weights="student")
    np.testing.assert_array_equal(x, expected[labels >= 0].numpy())


def test_layers_and_weights_choose_what_they_say(text_model):
    source, padding = text_batch()
    with torch.no_grad():
        for p in text_model.teacher.parameters():
            p.mul_(1.1)
    text_model.eval()

    def get(layer, weights="student"):
        return token_features(text_model, source, padding, layer=layer, weights=weights)[0]

    with torch.no_grad():
        assert torch.equal(get(-1), text_model.features(source, padding).x)
    assert torch.equal(get(-1), get(1)) and not torch.allclose(get(0), get(1))
    assert torch.allclose(get("mean"), (get(0) + get(1)) / 2)
    assert torch.equal(get("all"), torch.cat([get(0), get(1)], dim=-1))
    assert not torch.allclose(get(0), get(0, "teacher"))
    with pytest.raises(ValueError, match=r"layer must be in -2\.\.1, mean or all, got 2"):
        get(2)


def test_probing_leaves_the_mode_of_the_model(text_model):
    source, padding = text_batch()
    for mode in (True, False):
        features_of(text_model.train(mode), Fixed([(source, padding, torch.zeros(4).long())]))
        assert text_model.training is mode


def test_no_readable_sample_is_refused(text_model):
    with pytest.raises(DataError, match="no readable sample"):
        features_of(text_model, Fixed([]))


def test_the_model_is_probed_on_its_features_and_the_baseline_on_raw_rows(text_model):
    """Classes that are single tokens: the raw rows are noise, the encoder sees them."""
    generator = torch.Generator().manual_seed(3)

    def part(n, seed):
        labels = torch.randint(0, 3, (n,), generator=generator)
        source = (labels[:, None] * 7 + 10).repeat(1, 4)
        noise = np.random.default_rng(seed).standard_normal((n, 4)).astype(np.float32)
        return Fixed([(source, torch.zeros_like(source, dtype=torch.bool), labels)], (noise, labels.numpy()))

    labelled = Labelled({"train": part(120, 0), "test": part(60, 1)}, ["a", "b", "c"], "sample")
    found, raw = probe_model(text_model, labelled), probe_raw(labelled)
    assert found["linear"]["test"] == found["knn"]["test"] == 1.0
    assert (found["layer"], found["weights"], found["n_train"]) == (-1, "student", 120)
    assert raw["linear"]["test"] < 0.6
    _, train = labelled.splits["train"].raw()
    frequent = np.bincount(train).argmax()
    assert raw["majority"]["test"] == pytest.approx((labelled.splits["test"].raw()[1] == frequent).mean())


@pytest.fixture(scope="module")
def image_run(tmp_path_factory):
    """A trained run and labelled pictures: bright and dark squares."""
    folder = tmp_path_factory.mktemp("probe")
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 2
    images = (100 * labels[:, None, None] + rng.integers(0, 60, (60, 24, 24))).astype(np.uint8)
    np.savez(folder / "squares.npz", images=images, labels=labels)
    out = folder / "run"
    run(tiny("image", steps=2), str(folder / "squares.npz"), out)
    return out, folder / "squares.npz"


def test_run_probe_prints_one_table_and_returns_its_numbers(image_run, capsys):
    out, data = image_run
    found = run_probe(out, str(data), layer=-1, weights="teacher")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{out}: teacher, layer -1, 48 training rows"
    assert lines[1].split() == ["accuracy,", "%", "test"]
    printed = {line[:24].strip(): float(line[24:]) for line in lines[2:]}
    assert printed["linear, features"] == pytest.approx(100 * found["linear"]["test"], abs=0.051)
    assert printed["knn, raw input"] == pytest.approx(100 * found["raw"]["knn"]["test"], abs=0.051)
    assert len(printed) == 5
    assert found["raw"]["linear"]["test"] == 1.0, "brightness separates the classes"


def test_a_checkpoint_folder_is_probed_like_its_run(image_run, capsys):
    out, data = image_run
    kwargs = {"layer": "mean", "kinds": ("linear",)}
    whole = run_probe(out, str(data), **kwargs)
    part = run_probe(out / "checkpoints" / "step_2", str(data), **kwargs)
    assert whole["linear"] == part["linear"]


def test_pictures_are_normalised_as_in_training(image_run):
    out, _ = image_run
    _, cfg, folder = open_model(out)
    assert folder == out
    assert list(cfg.data.mean) == json.loads((out / "data.json").read_text())["meta"]["mean"]


def test_missing_labels_are_named(image_run, tmp_path, capsys):
    out, _ = image_run
    np.savez(tmp_path / "bare.npz", images=np.zeros((20, 24, 24), np.uint8))
    assert main(["probe", str(out), "--data", str(tmp_path / "bare.npz")]) == 2
    assert capsys.readouterr().err.startswith(f"labels missing: {tmp_path / 'bare.npz'}")


def test_no_such_layer_is_a_users_error(image_run, capsys):
    out, data = image_run
    assert main(["probe", str(out), "--data", str(data), "--layer", "7"]) == 2
    assert "layer must be in -2..1, mean or all, got 7" in capsys.readouterr().err


def test_text_runs_are_probed_with_their_own_tokenizer(tmp_path, capsys):
    cfg = tiny("text", steps=1)
    data = make_data("text", tmp_path / "texts")
    run(cfg, data, tmp_path / "run")
    lines = [json.dumps({"text": f"{word} " * 5, "label": word}) for word in ("rain", "mat") * 20]
    (tmp_path / "labelled.jsonl").write_text("\n".join(lines))
    before = (tmp_path / "run" / "tokenizer.json").read_bytes()
    found = run_probe(tmp_path / "run", str(tmp_path / "labelled.jsonl"))
    assert found["linear"]["test"] == 1.0
    assert (tmp_path / "run" / "tokenizer.json").read_bytes() == before


def test_an_original_text_model_needs_a_tokenizer_beside_it(text_model, tmp_path, monkeypatch):
    monkeypatch.setattr(opening, "load", lambda path, device: text_model)
    with pytest.raises(ValueError, match="tokenizer.json must lie beside"):
        open_model(tmp_path / "nlp_base.pt")
    (tmp_path / "tokenizer.json").write_text("{}")
    _, cfg, folder = open_model(tmp_path / "nlp_base.pt")
    assert (cfg.preset, cfg.data.block, folder) == ("nlp_base", 32, tmp_path)


def test_an_original_image_checkpoint_is_probed(goldens, tmp_path, capsys):
    model, cfg, _ = open_model(goldens / "ckpt_image_base.pt")
    front = model.cfg.front
    rng, labels = np.random.default_rng(0), np.arange(20) % 2
    images = (
        rng.integers(0, 100, (20, front.height, front.width, front.channels))
        + 100 * labels[:, None, None, None]
    )
    np.savez(tmp_path / "p.npz", images=images.astype(np.uint8), labels=labels)
    labelled = open_labelled(str(tmp_path / "p.npz"), cfg)
    found = probe_model(model, labelled, kinds=("knn",))
    assert found["n_train"] == 16 and set(found["knn"]) == {"test"}

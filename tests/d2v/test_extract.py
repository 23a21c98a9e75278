"""`d2v extract`: what the file holds is what the model says, for each pooling; a failure loses nothing."""

import errno
import os

import numpy as np
import pytest
import torch

import d2v
from d2v.cli.main import main
from d2v.data.open import open_data
from d2v.evaluate import features
from d2v.evaluate.features import run_extract, token_features
from d2v.formats.open import open_model
from d2v.train.pretrain import run

from .tiny_runs import make_data, tiny


@pytest.fixture(scope="module", params=["image", "audio", "text"])
def trained(request, tmp_path_factory):
    """(modality, run, data): two steps on 20 pictures, on wav files, on text."""
    folder, modality = tmp_path_factory.mktemp(request.param), request.param
    if modality == "image":
        data = str(folder / "some.npz")
        np.savez(data, images=np.random.default_rng(0).integers(0, 255, (20, 24, 24)).astype(np.uint8))
    else:
        data = make_data(modality, folder / "data")
    run(tiny(modality, steps=2), data, folder / "run")
    return modality, folder / "run", data


def read(path):
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


def test_tokens_and_their_mean_agree_with_the_model(trained, tmp_path, capsys):
    modality, out, data = trained
    pooled = read(run_extract(out, data, tmp_path / "mean.npz"))
    tokens = read(run_extract(out, data, tmp_path / "deep" / "tokens.npz", pool="none"))
    n, width = pooled["features"].shape
    assert width == 16 and pooled["features"].dtype == np.float32
    assert f"{n} samples, features {n} x 16" in capsys.readouterr().out
    assert tokens["lengths"].sum() == len(tokens["features"])
    assert pooled["ids"].tolist() == tokens["ids"].tolist() == list(range(n))
    assert pooled["names"].tolist() == tokens["names"].tolist() and len(set(pooled["names"])) == n
    pieces = np.split(tokens["features"], np.cumsum(tokens["lengths"])[:-1])
    np.testing.assert_allclose(pooled["features"], [piece.mean(0) for piece in pieces], rtol=1e-4, atol=1e-5)
    if modality == "audio":
        assert len(set(tokens["lengths"].tolist())) > 1, "utterances differ in length"

    model, cfg, folder = open_model(out)
    pipeline = open_data(data, cfg, purpose="eval", run_dir=folder)
    for place, (names, batch) in enumerate(pipeline.in_order(1)):
        assert names == [pooled["names"][place]]
        with torch.no_grad():
            alone = model.features(batch.source, batch.padding_mask).x[0]
        np.testing.assert_allclose(pieces[place], alone.numpy(), rtol=1e-4, atol=1e-5)


def test_cls_is_the_extra_token_where_there_is_one(trained, tmp_path, capsys):
    modality, out, data = trained
    arguments = ["extract", str(out), "--data", data, "--out", str(tmp_path / "f.npz"), "--pool", "cls"]
    if modality != "image":
        assert main(arguments) == 2
        assert "pool must be mean or none for a model without CLS token" in capsys.readouterr().err
        assert not (tmp_path / "f.npz").exists()
        return
    assert main([*arguments, "--layer", "0"]) == 0
    model, cfg, _ = open_model(out)
    _, batch = next(open_data(data, cfg, purpose="eval").in_order(20))
    expected = token_features(model, batch.source, None, layer=0, weights="student")[0][:, 0]
    assert not torch.allclose(expected, expected[:1].expand_as(expected)), "it sees the picture"
    np.testing.assert_allclose(read(tmp_path / "f.npz")["features"], expected.numpy(), rtol=1e-4, atol=1e-5)


def test_layer_and_weights_reach_the_model(trained, tmp_path):
    _, out, data = trained
    files = [
        run_extract(out, data, tmp_path / f"{i}.npz", layer=layer, weights=weights)
        for i, (layer, weights) in enumerate([(0, "student"), (1, "student"), (1, "teacher")])
    ]
    first, last, teacher = (read(file)["features"] for file in files)
    assert not np.allclose(first, last) and not np.array_equal(last, teacher)


def test_a_failed_write_keeps_the_file_before(trained, tmp_path, monkeypatch):
    _, out, data = trained
    file = run_extract(out, data, tmp_path / "f.npz")
    before = file.read_bytes()

    def full(*arguments, **arrays):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(features.np, "savez", full)
    with pytest.raises(OSError, match="No space left"):
        run_extract(out, data, file, layer=0)
    assert file.read_bytes() == before and os.listdir(tmp_path) == ["f.npz"]


def test_a_folder_without_a_run_is_refused(tmp_path, capsys):
    assert main(["extract", str(tmp_path), "--data", "digits", "--out", str(tmp_path / "f.npz")]) == 2
    assert "config.toml" in capsys.readouterr().err


def test_loading_gives_the_same_weights_as_the_run(trained):
    _, out, _ = trained
    model, _, _ = open_model(out)
    for (name, tensor), other in zip(
        model.state_dict().items(), d2v.load(out).state_dict().values(), strict=True
    ):
        assert torch.equal(tensor.cpu(), other), name

"""Folders of transformers whose config, sizes or weights cannot be: one line each."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from d2v.formats.open import open_encoder
from tests.d2v.test_hf_encoder import saved

os.environ.setdefault("HF_HUB_OFFLINE", "1")
pytest.importorskip("transformers")


@pytest.mark.parametrize(("values", "said"), [
    ({"hidden_size": 10**9}, "hidden_size of its config is 1,000,000,000, no weight has that size"),
    ({"vocab_size": 10**12}, r"the sizes of its config need 16,000,\S+ values, its weights hold"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers of its config is 1,000,000,000, it holds 39 weights"),
    ({"num_hidden_layers": 3}, r"16 weights are missing, the first: encoder.layer.2."),
    ({"intermediate_size": 33}, "6 weights have other shapes than its config says, the first: encoder"),
    ({"num_attention_heads": 0}, "num_attention_heads must be a positive whole number, got 0"),
    ({"model_type": "t5"}, "t5 has a decoder: an encoder is needed"),
    ({"model_type": "clip"}, "its config has no hidden_size"),
    ({"pad_token_id": None}, "its config has no pad_token_id"),
    ({"add_adapter": True}, "add_adapter of its config.json must be false"),
])  # fmt: skip
def test_configs_that_are_not_of_the_weights_are_refused(
    values: dict[str, Any], said: str, tmp_path: Path
) -> None:
    file = saved("BERT", tmp_path) / "config.json"
    kept = {} if "model_type" in values else json.loads(file.read_text())
    file.write_text(json.dumps({**kept, **values}))
    with pytest.raises(ValueError, match=rf"^hf:{tmp_path}: {said}") as caught:
        open_encoder(f"hf:{tmp_path}")
    assert "\n" not in str(caught.value)


def test_weights_that_are_pickled_damaged_or_missing_are_refused(tmp_path: Path) -> None:
    weights = saved("BERT", tmp_path) / "model.safetensors"
    tensors, whole = load_file(weights), weights.read_bytes()

    def refused(said: str) -> None:
        with pytest.raises(ValueError, match=rf"^hf:{tmp_path}: {said}") as caught:
            open_encoder(f"hf:{tmp_path}")
        assert "\n" not in str(caught.value)

    weights.write_bytes(whole[:-100])
    refused("model.safetensors: damaged or missing: ")
    header = int.from_bytes(whole[:8], "little")
    changed = whole[8 : 8 + header].replace(b'"shape":[64,16]', b'"shape":[9999999999,16]')
    weights.write_bytes(len(changed).to_bytes(8, "little") + changed + whole[8 + header :])
    refused("model.safetensors: damaged or missing: ")
    save_file({name: t for name, t in tensors.items() if "layer.1" not in name}, weights, {"format": "pt"})
    refused(r"16 weights are missing, the first: encoder.layer.1.attention.output.LayerNorm.bias")
    save_file({name: t for name, t in tensors.items() if "pooler" not in name}, weights, {"format": "pt"})
    open_encoder(f"hf:{tmp_path}")  # no feature is made with it

    weights.unlink()
    refused("no model.safetensors")
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    refused("pytorch_model.bin is pickled, and what is pickled is never opened: .*save_pretrained")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../other.safetensors"}}))
    refused("model.safetensors.index.json names no files of the folder")
    table = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "one.safetensors")}
    index.write_text(json.dumps(table))
    refused("one.safetensors: damaged or missing")
    save_file(tensors, tmp_path / "one.safetensors", {"format": "pt"})
    open_encoder(f"hf:{tmp_path}")  # in shards, beside the pickle

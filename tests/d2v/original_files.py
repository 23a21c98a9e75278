"""Files as the original's trainer writes them: published configs at a tiny width, in every container.

Pickles name their classes, so those of omegaconf and fairseq are made here under their names and are gone
again when `pickled` ends; what they hold follows omegaconf 2.0 to 2.3 (`__getstate__` of its nodes and
containers).
"""

from __future__ import annotations

import collections
import contextlib
import copy
import dataclasses
import enum
import sys
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from d2v.config.fronts import TextFront, WaveformFront
from d2v.config.model import ModelConfig
from d2v.config.presets import preset
from d2v.model import Data2Vec

DEPTH, DECODER_DIM = 2, 32
NAMES = {
    name: "text_large_1m" if name == "text_large_pgrp_1M" else name
    for name in ("image_base", "image_large", "image_huge14", "audio_base", "audio_large", "text_base",
                 "text_large", "text_large_pgrp_1M")
}  # fmt: skip
"""published config -> our preset"""


def shrunk(model: dict[str, Any], modality: str) -> dict[str, Any]:
    """`cfg.model` with fewer blocks and narrower layers, and everything else as it is."""
    model = copy.deepcopy(model)
    section = model["modalities"][modality]
    model["embed_dim"] = 4 * model.get("num_heads", 12)
    model["depth"] = model["average_top_k_layers"] = DEPTH
    section["prenet_depth"] = min(1, section["prenet_depth"])
    section["decoder"]["decoder_dim"] = DECODER_DIM
    if modality == "image":
        section["embed_dim"] = model["embed_dim"]
    if modality == "audio":
        section["feature_encoder_spec"] = section["feature_encoder_spec"].replace("512", "8")
    return model


def shrunk_preset(name: str) -> ModelConfig:
    """Our config of the same model."""
    cfg = preset(NAMES[name]).model
    front = cfg.front
    if isinstance(front, WaveformFront):
        layers = tuple((8, kernel, stride) for _, kernel, stride in front.conv_layers)
        front = dataclasses.replace(front, conv_layers=layers)
    if isinstance(front, TextFront):
        front = dataclasses.replace(front, vocab_size=40, max_positions=20)
    return dataclasses.replace(
        cfg,
        front=front,
        dim=4 * cfg.heads,
        depth=DEPTH,
        prenet_depth=min(1, cfg.prenet_depth),
        target=dataclasses.replace(cfg.target, top_k=DEPTH),
        decoder=dataclasses.replace(cfg.decoder, dim=DECODER_DIM),
        cls_rows=None,
    )


def weights(cfg: ModelConfig) -> dict[str, Tensor]:
    """Random weights under flat names, as a run in fp16 keeps them: student in fp16, teacher in fp32."""
    with torch.device("meta"):
        made = Data2Vec(cfg).state_dict()
    generator = torch.Generator().manual_seed(0)
    return {
        name: (0.1 * torch.randn(t.shape, generator=generator)).to(
            torch.float32 if name.startswith("_ema.") else torch.float16
        )
        for name, t in made.items()
    }


def nested(flat: dict[str, Tensor]) -> collections.OrderedDict[str, Any]:
    """The original's layout: the teacher in a dict of its own; a state dict has `_metadata`."""
    student = collections.OrderedDict((k, t) for k, t in flat.items() if not k.startswith("_ema."))
    student._metadata = collections.OrderedDict({"": {"version": 1}})  # type: ignore[attr-defined]
    teacher = ((k.removeprefix("_ema."), t) for k, t in flat.items() if k.startswith("_ema."))
    student["_ema"] = collections.OrderedDict(teacher)  # type: ignore[assignment]
    return student


def source_of(cfg: ModelConfig) -> Tensor:
    if cfg.modality == "image":
        return torch.randn(1, 3, 224, 224)
    return torch.randn(1, 8_000) if cfg.modality == "audio" else torch.randint(4, 40, (2, 20))


@contextlib.contextmanager
def pickled() -> Iterator[types.SimpleNamespace]:
    """Classes of absent packages, while a file is written: `omega(value)` makes an OmegaConf tree of plain
    containers, `Modality`, `PredictionMode`, `Dictionary` and `Config` are fairseq's."""
    before = dict(sys.modules)

    def make(name: str, made: Callable[[str, str], Any] | None = None) -> Any:
        module, _, short = name.rpartition(".")
        if module not in sys.modules or sys.modules[module] is before.get(module):
            parts = module.split(".")
            for i in range(1, len(parts) + 1):
                key = ".".join(parts[:i])
                if key not in sys.modules or sys.modules[key] is before.get(key):
                    sys.modules[key] = types.ModuleType(key)
        cls = made(short, module) if made else type(short, (), {"__module__": module})
        setattr(sys.modules[module], short, cls)
        return cls

    def member(names: str) -> Callable[[str, str], Any]:
        return lambda short, module: enum.Enum(short, names, module=module)

    found = types.SimpleNamespace(
        Modality=make("examples.data2vec.data.modality.Modality", member("AUDIO IMAGE TEXT")),
        PredictionMode=make(
            "examples.data2vec.models.mae_image_classification.PredictionMode",
            member("MEAN_POOLING CLS_TOKEN LIN_SOFTMAX"),
        ),
        Dictionary=make("fairseq.data.dictionary.Dictionary"),
        Config=make("data2vec.models.data2vec2.Data2VecMultiConfig"),
    )
    nodes = {
        kind: make(f"omegaconf.nodes.{name}Node")
        for kind, name in {
            str: "String",
            bool: "Boolean",
            int: "Integer",
            float: "Float",
            None: "Any",
        }.items()
    }
    enum_node, dict_config = make("omegaconf.nodes.EnumNode"), make("omegaconf.dictconfig.DictConfig")
    list_config, metadata = make("omegaconf.listconfig.ListConfig"), make("omegaconf.base.Metadata")
    container_metadata = make("omegaconf.base.ContainerMetadata")

    def of(cls: Any, parent: Any, about: Any, **state: Any) -> Any:
        node = cls()
        about.__dict__ |= {"optional": True, "flags": {}, "flags_root": False, "key": None}
        about.__dict__ |= {"resolver_cache": collections.defaultdict(dict)}
        node.__dict__.update(_metadata=about, _parent=parent, _flags_cache=None, **state)
        return node

    def omega(value: Any, parent: Any = None) -> Any:
        if isinstance(value, (dict, list)):
            about = container_metadata()
            about.__dict__ |= {"ref_type": typing.Any, "object_type": found.Config, "key_type": str}
            about.element_type = typing.Optional[typing.Dict[str, typing.Any]]  # noqa: UP006, UP045
            node = of(dict_config if isinstance(value, dict) else list_config, parent, about)
            if isinstance(value, dict):
                node._content = {key: omega(item, node) for key, item in value.items()}
            else:
                node._content = [omega(item, node) for item in value]
            return node
        about = metadata()
        about.__dict__ |= {"ref_type": typing.Optional[float], "object_type": type(None)}  # noqa: UP045
        if isinstance(value, enum.Enum):
            return of(enum_node, parent, about, _val=value, enum_type=type(value))
        kind = None if isinstance(value, str) and value.startswith("${") else type(value)
        return of(nodes.get(kind, nodes[None]), parent, about, _val=value)

    found.omega = omega
    try:
        yield found
    finally:
        for name in set(sys.modules) - set(before):
            del sys.modules[name]
        sys.modules.update(before)


def trainer_state(cfg: Any, model: Any, classes: types.SimpleNamespace) -> dict[str, Any]:
    """All of what `Trainer.state_dict` puts beside config and model."""
    letters = classes.Dictionary()
    letters.__dict__.update(symbols=["<s>", "<pad>"], count=[1, 1], indices={"<s>": 0}, pad_index=1)
    moments = {i: {"step": 7, "exp_avg": torch.zeros(3), "exp_avg_sq": torch.ones(3)} for i in range(2)}
    groups = [{"lr": 1e-3, "betas": [0.9, 0.98], "params": [0, 1], "amsgrad": False}]
    marked = torch.nn.Parameter(torch.ones(2))
    marked.optim_overrides = {"optimizer": {"weight_decay_scale": 0}}  # type: ignore[attr-defined]
    view = torch.arange(6.0)[1:5]
    view.param_group = "decoder"  # type: ignore[attr-defined]
    return {
        "args": None,
        "cfg": cfg,
        "model": model,
        "criterion": None,
        "optimizer_history": [
            {
                "criterion_name": "ModelCriterion",
                "optimizer_name": "FP16Optimizer",
                "lr_scheduler_state": {"best": None},
                "num_updates": 400_000,
            }
        ],
        "task_state": {"target_dictionary": letters, "dictionaries": [letters]},
        "extra_state": {
            "metrics": {"default": [(600, "loss", "AverageMeter", {"val": np.float64(0.5), "sum": view[0]})]},
            "previous_training_time": np.float32(12.5),
            "train_iterator": {"version": 2, "epoch": 3, "iterations_in_epoch": 0, "shuffle": True},
            "val_loss": None,
            "seen": {1, 2},
            "random": np.arange(3),
            "size": torch.Size([2]),
            "device": torch.device("cpu"),
            "dtype": torch.float16,
        },
        "last_optimizer_state": {"default": {"state": moments, "param_groups": groups}, "loss_scale": 128.0,
                                 "params": [marked, view]},
    }  # fmt: skip

"""Configs of the original (fairseq) as they lie in its files: plain values, checked one by one.

A config is a tree of plain containers, of OmegaConf's or a Namespace; values may be interpolations. `Section`
reads one mapping of it. What changes a model's maths and is not ours is refused by name; what has no effect
is collected in `Tree.ignored`, with the reason. Source: fairseq, models/data2vec2.py (Data2VecMultiConfig),
models/modalities/{base,audio,images,text,modules}.py.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config.toml import CheckpointError
from .pt_file import Inert

_logger = logging.getLogger("d2v")

MISSING = "???"
"""OmegaConf's mark of a value that was never given"""

MODALITIES = ("AUDIO", "IMAGE", "TEXT")
"""in the order of the original's enum, which counts from 1"""

KNOWN: dict[str, frozenset[str]] = {
    section: frozenset(names.split())
    for section, names in {
        "": """_name loss_beta loss_scale depth start_drop_path_rate end_drop_path_rate num_heads norm_eps
            norm_affine encoder_dropout post_mlp_drop attention_dropout activation_dropout dropout_input
            layerdrop embed_dim mlp_ratio layer_norm_first average_top_k_layers end_of_block_targets
            clone_batch layer_norm_target_layer batch_norm_target_layer instance_norm_target_layer
            instance_norm_targets layer_norm_targets ema_decay ema_same_dtype log_norms ema_end_decay
            ema_anneal_end_step ema_encoder_only max_update modalities shared_decoder min_target_var
            min_pred_var supported_modality mae_init seed skip_ema cls_loss recon_loss d2v_loss
            decoder_group""",
        "modality": """type prenet_depth prenet_layerdrop prenet_dropout start_drop_path_rate
            end_drop_path_rate num_extra_tokens init_extra_token_zero mask_noise_std mask_prob_min mask_prob
            inverse_mask mask_prob_adjust keep_masked_pct mask_length add_masks remove_masks mask_dropout
            encoder_zero_mask mask_channel_prob mask_channel_length ema_local_encoder local_grad_mult
            use_alibi_encoder alibi_scale learned_alibi alibi_max_pos learned_alibi_scale
            learned_alibi_scale_per_head learned_alibi_scale_per_layer num_alibi_heads model_depth
            decoder""",
        "AUDIO": """extractor_mode feature_encoder_spec conv_pos_width conv_pos_groups conv_pos_depth
            conv_pos_pre_ln""",
        "IMAGE": """input_size in_chans patch_size embed_dim alibi_dims alibi_distance fixed_positions
            transformer_decoder enc_dec_transformer""",
        "TEXT": """max_source_positions learned_pos dropout no_scale_embedding layernorm_embedding
            no_token_positional_embeddings""",
        "decoder": """decoder_dim decoder_groups decoder_kernel decoder_layers input_dropout
            add_positions_masked add_positions_all decoder_residual projection_layers projection_ratio""",
    }.items()
}
"""keys of the original's dataclasses; what is neither read nor checked concerns optimisation, logging or
initial values"""

SWITCHES: dict[str, dict[str, Any]] = {
    "": {"layer_norm_first": False, "norm_affine": True},
    "modality": {"learned_alibi": False, "learned_alibi_scale_per_layer": False},
    "IMAGE": {"use_alibi_encoder": False, "fixed_positions": True},
    "AUDIO": {"extractor_mode": "layer_norm", "conv_pos_pre_ln": False},
    "TEXT": {
        "use_alibi_encoder": False, "learned_pos": True, "no_scale_embedding": True,
        "layernorm_embedding": True, "no_token_positional_embeddings": False,
    },
}  # fmt: skip
"""the only accepted value of each switch, by section; what a file leaves out has its default, which is the
accepted one except where `DEFAULTS` says otherwise"""

PRETRAINING: dict[str, dict[str, Any]] = {
    "": {
        "end_of_block_targets": False, "dropout_input": 0, "start_drop_path_rate": 0,
        "end_drop_path_rate": 0, "shared_decoder": None, "recon_loss": 0, "d2v_loss": 1,
        "decoder_group": False,
    },
    "modality": {
        "prenet_layerdrop": 0, "start_drop_path_rate": 0, "end_drop_path_rate": 0, "mask_prob_min": None,
        "keep_masked_pct": 0, "add_masks": False, "remove_masks": False, "mask_dropout": 0,
        "encoder_zero_mask": True, "mask_channel_prob": 0, "local_grad_mult": 1,
    },
    "IMAGE": {
        "inverse_mask": True, "ema_local_encoder": True, "transformer_decoder": False,
        "enc_dec_transformer": False,
    },
    "AUDIO": {"inverse_mask": False, "ema_local_encoder": False},
    "TEXT": {"inverse_mask": False, "ema_local_encoder": False, "mask_length": 1},
    "decoder": {"add_positions_masked": False, "add_positions_all": False},
}  # fmt: skip
"""as `SWITCHES`, of what only pretraining computes; fine-tuning overwrites some of it, by name"""

DEFAULTS: dict[str, Any] = {
    "inverse_mask": False, "ema_local_encoder": False, "mask_length": 5, "use_alibi_encoder": False,
    "learned_alibi_scale": False, "learned_alibi_scale_per_head": False,
}  # fmt: skip
"""of switches whose accepted value is another one"""


@dataclass(frozen=True)
class Tree:
    """A whole config, and what of it was ignored."""

    values: Mapping[str, Any]
    path: str | Path
    """file that errors name"""
    outer: Mapping[str, Any] | None = None
    """config of a fine-tuned file around this one, where its interpolations may lead too"""
    ignored: list[str] = field(default_factory=list)

    def resolve(self, value: Any, place: tuple[str, ...] = (), budget: Iterator[object] | None = None) -> Any:
        """Follow `${a.b.0}` from the root, or `${..a}` from `place`, the keys of its mapping, to a value."""
        found = re.fullmatch(r"\$\{(\.*)([\w.\[\]]+)\}", value) if isinstance(value, str) else None
        if not found:
            return value
        budget = iter(range(100)) if budget is None else budget
        if next(budget, None) is None:
            raise CheckpointError(f"{self.path}: {value} in its cfg leads in a circle")
        dots, steps = found[1], tuple(re.findall(r"\w+", found[2]))
        keys = (*place[: len(place) + 1 - len(dots)], *steps) if dots else steps
        for root in (self.values, self.outer):
            target: Any = root
            for depth, key in enumerate(keys):
                target = self.resolve(_child(target, key), keys[:depth], budget)
            if target is not _NOTHING:
                return target
        raise CheckpointError(f"{self.path}: {value} in its cfg leads nowhere")

    def ignore(self, what: str, why: str) -> None:
        self.ignored.append(f"{what} ({why})")

    def report(self) -> None:
        """Say in one line what was ignored."""
        if self.ignored:
            _logger.warning("%s: ignored in its cfg: %s", self.path, ", ".join(self.ignored))


_NOTHING = object()


def _child(node: Any, key: str) -> Any:
    if isinstance(node, Mapping):
        return node.get(key, _NOTHING)
    if isinstance(node, list) and key.isdigit() and int(key) < len(node):
        return node[int(key)]
    return _NOTHING


class Section:
    """One mapping of the config, read with checks; errors name the full key and the value.

    optional: one that is absent or null is empty. CheckpointError where another one is.
    """

    def __init__(self, tree: Tree, keys: tuple[str, ...], *, optional: bool = False) -> None:
        self.tree, self.keys = tree, keys
        values: Any = tree.values
        for depth, key in enumerate(keys):
            values = tree.resolve(values.get(key), keys[:depth]) if isinstance(values, Mapping) else None
        if values is None and optional:
            values = {}
        if not isinstance(values, Mapping):
            raise CheckpointError(f"{tree.path}: no section {'.'.join(keys)} in its cfg")
        self.values = values

    def raw(self, key: str, default: Any) -> Any:
        """The value of `key` as it is."""
        value = self.tree.resolve(self.values.get(key, default), self.keys)
        return default if isinstance(value, str) and value == MISSING else value

    def get(self, key: str, default: Any) -> Any:
        """The value of `key`, in the type of `default` (numbers and strings are converted)."""
        value = self.raw(key, default)
        truth = isinstance(value, bool) and not isinstance(default, bool)
        if value is None or default is None or (isinstance(value, type(default)) and not truth):
            return value
        try:
            if isinstance(default, float) and not truth:
                return float(value)
            if isinstance(default, int) and not truth and int(value) == float(value):
                return int(value)
        except (TypeError, ValueError, OverflowError):
            pass
        raise self.error(key, value, f"a {type(default).__name__}")

    def error(self, key: str, value: Any, contract: str) -> CheckpointError:
        return CheckpointError(f"{self.tree.path}: {self._name(key)} is {value!r}, supported is {contract}")

    def ignore(self, key: str, why: str) -> None:
        value = self.values.get(key)
        shown = "" if isinstance(value, Mapping) else f" = {value!r}"
        self.tree.ignore(self._name(key) + shown, why)

    def _name(self, key: str) -> str:
        return ".".join((*self.keys, key))

    def require(self, switches: Mapping[str, Any], idle: Mapping[str, str] | None = None) -> None:
        """Refuse what differs from `switches`, but for the `idle` ones: key -> why it has no effect."""
        for key, accepted in switches.items():
            value = self.raw(key, DEFAULTS.get(key, accepted))
            if value != accepted:
                if key not in (idle or {}):
                    raise self.error(key, value, f"only {accepted!r}")
                assert idle is not None
                self.ignore(key, idle[key])

    def require_choice(self, key: str, names: tuple[str, ...], accepted: str, why: str = "") -> None:
        """Refuse another member of an enum, be it a name, a value (from 1) or pickled; absent ones pass."""
        value = self.raw(key, None)
        name = value.args[0] if isinstance(value, Inert) and value.args else value
        if isinstance(name, int) and 1 <= name <= len(names):
            name = names[name - 1]
        if name is not None and str(name).rsplit(".", 1)[-1].upper() != accepted:
            raise self.error(key, value, accepted + why)

    def ignore_unknown(self, known: Collection[str]) -> None:
        """Note what the original's own code drops as well."""
        for key in self.values:
            if key not in known:
                self.ignore(str(key), "unknown to the original")


def plain(value: Any) -> Any:
    """OmegaConf's containers and nodes, a Namespace or dataclass as plain containers; interpolations stay."""
    if isinstance(value, Inert) and isinstance(value.state, dict):
        if value.name.startswith("omegaconf."):
            return plain(value.state["_content" if "_content" in value.state else "_val"])
        return plain(value.state)
    if isinstance(value, dict):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value

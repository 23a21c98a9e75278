"""MaskPlan: which tokens each masked version of a sample keeps, read by every other op."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad as pad_columns
from torch.utils import _pytree as pytree

from d2vkern._checks import check_choice, check_dtype, check_range, check_same_device, check_shape
from d2vkern.reference.masks import ascending_positions, plan_tensors

_TENSORS = ("mask", "ids_keep", "slot", "lengths", "kept_lengths", "padded_ids_mask")


@dataclass(frozen=True, eq=False)
class MaskPlan:
    """Which tokens each of the N = B * clones rows keeps; row b * clones + m is masked version m of sample b.

    mask: [N, T] bool, True where masked.
    ids_keep: [N, K] int32, original positions of the kept tokens, ascending; -1 behind them in padded rows.
    slot: [N, T] int32, index of the token among its row's kept tokens, -1 where masked.
    clones: M, masked versions per sample.
    lengths: [N] int32 or None: in a padded batch, how many of the T tokens of a row are real (before masking;
        padding stands at the end). The ops here mask padding like any other token; who pads reads `lengths`.
    kept_lengths: [N] int32 or None: how many tokens each row keeps, K at most. None: K, all of them. Places
        behind them are padding: gathered as 0, never scattered, without gradient; attention passes them over
        with `attention_lengths`.
    padded_ids_mask: [N, P] int32, with kept_lengths only: `ids_mask` of a padded plan, whose width does not
        follow from K.

    A pytree of its tensors, for torch.export and torch.compile. Construction checks shapes, dtypes and
    devices, not values; see `from_mask` and `from_ids_keep`.
    """

    mask: Tensor
    ids_keep: Tensor
    slot: Tensor
    clones: int
    lengths: Tensor | None = None
    kept_lengths: Tensor | None = None
    padded_ids_mask: Tensor | None = None

    def __post_init__(self) -> None:
        op = "MaskPlan"
        check_shape(op, "mask", self.mask, ("N", "T"))
        rows, tokens = self.mask.shape
        check_range(op, "tokens T", tokens, minimum=1)
        check_range(op, "clones", self.clones, minimum=1)
        if rows % self.clones:
            raise ValueError(f"{op}: mask must have a multiple of clones = {self.clones} rows, got {rows}")
        check_shape(op, "ids_keep", self.ids_keep, (rows, "K"))
        check_range(op, "kept tokens K", self.ids_keep.shape[1], maximum=tokens)
        check_shape(op, "slot", self.slot, (rows, tokens), like="mask")
        check_dtype(op, "mask", self.mask, (torch.bool,))
        if (self.kept_lengths is None) != (self.padded_ids_mask is None):
            raise ValueError(f"{op}: kept_lengths and padded_ids_mask must be given together, got one")
        if self.padded_ids_mask is not None:
            check_shape(op, "padded_ids_mask", self.padded_ids_mask, (rows, "P"))
            check_range(op, "masked tokens P", self.padded_ids_mask.shape[1], maximum=tokens)
        tensors = self._tensors()
        for name in ("lengths", "kept_lengths"):
            if name in tensors:
                check_shape(op, name, tensors[name], (rows,))
        for name, tensor in tensors.items():
            if name != "mask":
                check_dtype(op, name, tensor, (torch.int32,))
        check_same_device(op, **tensors)
        if torch.compiler.is_compiling():
            return
        for name, tensor in tensors.items():
            if tensor.is_inference():
                # autograd saves no tensor that was made under inference_mode, and a plan may outlive it
                with torch.inference_mode(False):
                    object.__setattr__(self, name, tensor.clone())

    def _tensors(self) -> dict[str, Tensor]:
        """Those that are there."""
        every = ((name, getattr(self, name)) for name in _TENSORS)
        return {name: tensor for name, tensor in every if tensor is not None}

    def _each(self, change: Callable[[Tensor], Tensor]) -> MaskPlan:
        return MaskPlan(
            clones=self.clones, **{name: change(tensor) for name, tensor in self._tensors().items()}
        )

    @property
    def samples(self) -> int:
        """B, samples before they are repeated."""
        return self.mask.shape[0] // self.clones

    @property
    def tokens(self) -> int:
        """T, tokens before masking."""
        return self.mask.shape[1]

    @property
    def kept(self) -> int:
        """K, kept tokens of every row, or of the fullest one."""
        return self.ids_keep.shape[1]

    @property
    def masked(self) -> int:
        """P, masked tokens of every row, or of the one with the most."""
        return self.tokens - self.kept if self.padded_ids_mask is None else self.padded_ids_mask.shape[1]

    @property
    def ids_mask(self) -> Tensor:
        """[N, P] int32: original positions of the masked tokens, ascending; made at the first use.

        In padded rows -1 stands behind them.
        """
        if self.padded_ids_mask is not None:
            return self.padded_ids_mask
        # Dynamo cannot trace the lock that cached_property takes before Python 3.12.
        return self._find_masked() if torch.compiler.is_compiling() else self._masked

    @cached_property
    def _masked(self) -> Tensor:
        with torch.inference_mode(False):
            return self._find_masked()

    def _find_masked(self) -> Tensor:
        return ascending_positions(self.mask, self.masked)

    def attention_lengths(self, extras: int = 0) -> Tensor | None:
        """[N] int32, `lengths` of attention over the kept tokens behind `extras` others; None: all count."""
        return None if self.kept_lengths is None else self.kept_lengths + extras

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> MaskPlan:
        """The same plan on another device (itself when it is there already)."""
        if self.mask.to(device, non_blocking=non_blocking) is self.mask:
            return self
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> MaskPlan:
        """The same plan in pinned memory; a DataLoader with pin_memory=True calls it."""
        return self._each(Tensor.pin_memory)

    def __getitem__(self, samples: Any) -> MaskPlan:
        """The plan of some samples: an index, a slice, or indices or bools of them. K stays as it is."""
        rows = torch.arange(self.mask.shape[0], device=self.mask.device)
        rows = rows.view(self.samples, self.clones)[samples].reshape(-1)
        return self._each(lambda tensor: tensor[rows])

    @staticmethod
    def collate(plans: Sequence[MaskPlan]) -> MaskPlan:
        """One plan of all samples in turn, for a DataLoader; rows are padded where plans differ in K.

        Raises ValueError for no plan, or plans that differ in T or clones.
        """
        if not plans:
            raise ValueError("MaskPlan.collate: plans must be at least one, got none")
        first = plans[0]
        for name in ("tokens", "clones"):
            for plan in plans:
                if getattr(plan, name) != getattr(first, name):
                    raise ValueError(
                        f"MaskPlan.collate: plans must have equally many {name}, "
                        f"got {getattr(first, name)} and {getattr(plan, name)}"
                    )

        def joined(name: str, otherwise: str) -> Tensor | None:
            if all(getattr(plan, name) is None for plan in plans):
                return None
            return torch.cat(
                [
                    plan.mask.new_full(plan.mask.shape[:1], getattr(plan, otherwise), dtype=torch.int32)
                    if getattr(plan, name) is None
                    else getattr(plan, name)
                    for plan in plans
                ]
            )

        def widest(tensors: list[Tensor]) -> Tensor:
            width = max(tensor.shape[1] for tensor in tensors)
            return torch.cat([pad_columns(t, (0, width - t.shape[1]), value=-1) for t in tensors])

        padded = any(plan.kept_lengths is not None or plan.kept != first.kept for plan in plans)
        if padded:
            plans = [plan._padded() for plan in plans]
        return MaskPlan(
            torch.cat([plan.mask for plan in plans]),
            widest([plan.ids_keep for plan in plans]),
            torch.cat([plan.slot for plan in plans]),
            first.clones,
            joined("lengths", "tokens"),
            joined("kept_lengths", "kept"),
            widest([plan.ids_mask for plan in plans]) if padded else None,
        )

    def _padded(self) -> MaskPlan:
        """The same plan with kept_lengths."""
        if self.kept_lengths is not None:
            return self
        kept = torch.full_like(self.mask[:, 0], self.kept, dtype=torch.int32)
        return MaskPlan(self.mask, self.ids_keep, self.slot, self.clones, self.lengths, kept, self.ids_mask)

    def mask_major(self, x: Tensor) -> Tensor:
        """x [N, ...] in this plan's order, as I-JEPA orders it: row m * B + b is version m of sample b."""
        return _transposed(x, self.clones, self.samples)

    def sample_major(self, x: Tensor) -> Tensor:
        """x [N, ...] in I-JEPA's order (all samples' version 0, then 1, ...), as this plan orders it."""
        return _transposed(x, self.samples, self.clones)

    @classmethod
    def from_mask(
        cls,
        mask: Tensor,
        clones: int,
        lengths: Tensor | None = None,
        *,
        order: str = "sample",
        pad: bool = False,
    ) -> MaskPlan:
        """The plan of anyone's mask.

        mask: [N, T] bool or integer, non-zero = masked, or floating with 0 and 1 alone, 1 = masked.
        clones: M, a divisor of N; rows b * M .. b * M + M - 1 belong to sample b.
        order: of the rows given (of lengths too): "mask" is m * B + b, I-JEPA's. The plan's own is "sample".
        pad: rows may keep different numbers of tokens; K is the largest, see `kept_lengths`. Without it every
            row must keep equally many.
        Reads the kept counts, so on CUDA it waits for the device, and torch.compile cannot trace it.
        Raises ValueError naming the first row whose kept count differs from row 0's, and for other floats.
        """
        op = "MaskPlan.from_mask"
        check_shape(op, "mask", mask, ("N", "T"))
        if mask.is_complex():
            raise TypeError(f"{op}: mask must be bool, integer or floating, got {mask.dtype}")
        if mask.is_floating_point() and not bool(((mask == 0) | (mask == 1)).all()):
            odd = mask[(mask != 0) & (mask != 1)][0].item()
            raise ValueError(f"{op}: a floating mask must hold 0 and 1 alone, got {odd}")
        mask, lengths = _ordered(op, mask != 0, lengths, clones, order)
        counts = (~mask).sum(1, dtype=torch.int32)
        known = counts.tolist() or [0]
        if pad:
            most, masked = max(known), mask.shape[1] - min(known)
            mask, ids_keep, slot = plan_tensors(mask, most, padded=True)
            ids_mask = ascending_positions(mask, masked, padded=True)
            return cls(mask, ids_keep, slot, clones, lengths, counts, ids_mask)
        for row, count in enumerate(known):
            if count != known[0]:
                raise ValueError(
                    f"{op}: mask must keep equally many tokens in every row (or be padded: pad=True), "
                    f"got row {row} keeps {count} tokens, row 0 keeps {known[0]}"
                )
        mask, ids_keep, slot = plan_tensors(mask, known[0])
        return cls(mask, ids_keep, slot, clones, lengths)

    @classmethod
    def from_ids_keep(
        cls,
        ids_keep: Tensor | Sequence[Tensor],
        tokens: int,
        clones: int | None = None,
        lengths: Tensor | None = None,
        *,
        order: str = "sample",
        pad: bool = False,
        check: bool = True,
    ) -> MaskPlan:
        """The plan of anyone's indices of kept tokens, such as MAE's ids_keep; the plan orders them.

        ids_keep: [N, K] int32 or int64 of [0, T), distinct within a row, in any order; with pad, -1 stands
            for none. Or a list of M such tensors [B, K_m], as I-JEPA's masks, one for each masked version.
        tokens: T.
        clones: M, a divisor of N; None is the length of the list, of a tensor 1.
        lengths, order, pad: as in `from_mask`; of a list the order is "mask", whatever is given.
        check: read the values; False takes them as they are: no wait for the device, and torch.compile can
            trace it. Not with pad.
        Raises ValueError naming the row of an index that is out of range or stands there twice.
        """
        op = "MaskPlan.from_ids_keep"
        check_range(op, "tokens", tokens, minimum=1)
        if not isinstance(ids_keep, Tensor):
            parts = list(ids_keep)
            for index, part in enumerate(parts):
                check_shape(op, f"ids_keep[{index}]", part, (parts[0].shape[0], "K"), like="ids_keep[0]")
            if clones not in (None, len(parts)) or not parts:
                raise ValueError(f"{op}: ids_keep must hold clones = {clones} tensors, got {len(parts)}")
            widest = max(part.shape[1] for part in parts)
            ids_keep = torch.cat([pad_columns(x, (0, widest - x.shape[1]), value=-1) for x in parts])
            clones, order = len(parts), "mask"
        clones = 1 if clones is None else clones
        check_shape(op, "ids_keep", ids_keep, ("N", "K"))
        check_dtype(op, "ids_keep", ids_keep, (torch.int32, torch.int64))
        if pad and not check:
            raise ValueError(f"{op}: check must be True with pad, got False")
        ids, none = ids_keep.long(), ids_keep == -1
        if check:
            _refuse(op, ids, ((ids < 0) & ~none) | (ids >= tokens), f"be >= 0 and < {tokens}")
            ascending = ids.sort(1).values
            twice = (ascending[:, 1:] == ascending[:, :-1]) & (ascending[:, 1:] >= 0)
            _refuse(op, ascending[:, 1:], twice, "be distinct within a row")
        mask = torch.ones(ids.shape[0], tokens + 1, dtype=torch.bool, device=ids.device)
        mask = mask.scatter_(1, torch.where(none, tokens, ids), False)[:, :tokens]
        if check:
            return cls.from_mask(mask, clones, lengths, order=order, pad=pad)
        mask, lengths = _ordered(op, mask, lengths, clones, order)
        return cls(*plan_tensors(mask, ids.shape[1]), clones, lengths)


def _refuse(op: str, ids: Tensor, wrong: Tensor, contract: str) -> None:
    if bool(wrong.any()):
        row, place = wrong.nonzero()[0].tolist()
        raise ValueError(f"{op}: ids_keep must {contract}, got {ids[row, place].item()} in row {row}")


def _ordered(
    op: str, rows: Tensor, lengths: Tensor | None, clones: int, order: str
) -> tuple[Tensor, Tensor | None]:
    """Rows and lengths in `order` as a plan orders them."""
    check_choice(op, "order", order, ("sample", "mask"))
    check_range(op, "clones", clones, minimum=1)
    if order == "sample" or rows.shape[0] % clones:  # which the plan itself refuses
        return rows, lengths
    samples = rows.shape[0] // clones
    if lengths is not None:
        check_shape(op, "lengths", lengths, (rows.shape[0],), like="mask")
        lengths = _transposed(lengths, samples, clones)
    return _transposed(rows, samples, clones), lengths


def _transposed(x: Tensor, inner: int, outer: int) -> Tensor:
    """Rows i * outer + o of rows o * inner + i."""
    return x.unflatten(0, (outer, inner)).transpose(0, 1).flatten(0, 1)


def _flatten(plan: MaskPlan) -> tuple[list[Tensor | None], int]:
    return [getattr(plan, name) for name in _TENSORS], plan.clones


def _unflatten(tensors: Any, clones: int) -> MaskPlan:
    """Whatever stands in for the tensors: nothing is checked."""
    plan = object.__new__(MaskPlan)
    for name, tensor in (*zip(_TENSORS, tensors, strict=True), ("clones", clones)):
        object.__setattr__(plan, name, tensor)
    return plan


pytree.register_pytree_node(
    MaskPlan,
    _flatten,
    _unflatten,
    serialized_type_name="d2vkern.MaskPlan",
    flatten_with_keys_fn=lambda plan: (
        [(pytree.GetAttrKey(name), getattr(plan, name)) for name in _TENSORS],
        plan.clones,
    ),
)
torch.serialization.add_safe_globals([MaskPlan])

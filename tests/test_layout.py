"""One stem names an op everywhere: its files exist; public names are importable, documented, swappable."""

import inspect
from pathlib import Path

import pytest

import d2vkern
from d2vkern._backend import REGISTRY, STEMS

ROOT = Path(__file__).resolve().parents[1]
LONGEST = 450
PUBLIC = {
    "masks": ("MaskPlan", "inverse_block_mask", "span_mask", "random_mask"),
    "gather": ("gather_tokens", "scatter_tokens"),
    "attention": ("multimask_attention",),
    "conv_block": ("conv_block_1d", "conv_block_2d"),
    "conv_stem": ("conv_stem",),
    "residual_norm": ("residual_norm",),
    "mlp": ("gelu_mlp", "linear"),
    "targets": ("LayerTargets", "layer_targets"),
    "loss": ("masked_regression_loss",),
    "ema": ("ema_update_", "EMA"),
    "adamw_ema": ("AdamWEMA",),
}
NAMES = [(stem, name) for stem, names in PUBLIC.items() for name in names]
# A value, not a computation: nothing to swap.
WITHOUT_BACKEND = {"MaskPlan"}
FOLDERS = ("d2vkern", "kernels", "csrc", "d2v", "tests", "benchmarks")
SOURCES = (".py", ".cu", ".cuh", ".cpp", ".hpp", ".h")


def test_the_table_is_complete() -> None:
    assert tuple(PUBLIC) == STEMS == tuple(REGISTRY)


@pytest.mark.parametrize("stem", STEMS)
def test_every_stem_has_its_files(stem: str) -> None:
    wanted = [
        f"d2vkern/ops/{stem}.py",
        f"d2vkern/reference/{stem}.py",
        f"tests/test_{stem}.py",
        f"benchmarks/bench_{stem}.py",
    ]
    if "triton" in REGISTRY[stem]:
        wanted.append(f"kernels/{stem}.py")
    missing = [path for path in wanted if not (ROOT / path).is_file()]
    if "native" in REGISTRY[stem] and not list((ROOT / "csrc").glob(f"{stem}.*")):
        missing.append(f"csrc/{stem}.*")
    assert not missing


@pytest.mark.parametrize("folder", ["d2vkern/ops", "kernels"])
def test_no_file_is_named_after_nothing(folder: str) -> None:
    # `_fwd` and `_bwd` are how a long kernel file is split.
    names = [path.stem.removesuffix("_fwd").removesuffix("_bwd") for path in (ROOT / folder).glob("*.py")]
    assert [name for name in names if name not in STEMS and not name.startswith("_")] == []


def test_kernels_is_flat_and_no_package() -> None:
    # With an __init__.py the folder would hide the PyPI package `kernels` from whoever works here.
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not [path for path in (ROOT / "kernels").iterdir() if path.is_dir() and path.name != "__pycache__"]
    import d2vkern.kernels

    assert str(ROOT / "kernels") in d2vkern.kernels.__path__


def test_no_file_is_longer_than_one_sitting() -> None:
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in SOURCES]
    assert len(files) > 4 * len(STEMS)
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in files
    }
    assert {path: length for path, length in lengths.items() if length > LONGEST} == {}


@pytest.mark.parametrize(("stem", "name"), NAMES)
def test_public_names(stem: str, name: str) -> None:
    public = getattr(d2vkern, name)
    assert name in d2vkern.__all__
    assert public.__module__ == f"d2vkern.ops.{stem}"
    assert len(inspect.cleandoc(public.__doc__ or "")) > 60
    if name not in WITHOUT_BACKEND:
        backend = inspect.signature(public).parameters["backend"]
        assert backend.default is None and backend.kind is inspect.Parameter.KEYWORD_ONLY


@pytest.mark.parametrize(("stem", "name"), NAMES)
def test_public_names_are_typed(stem: str, name: str) -> None:
    public = getattr(d2vkern, name)
    signature = inspect.signature(public.__init__ if inspect.isclass(public) else public)
    untyped = [
        parameter.name
        for parameter in signature.parameters.values()
        if parameter.annotation is inspect.Parameter.empty and parameter.name != "self"
    ]
    assert not untyped
    assert signature.return_annotation is not inspect.Signature.empty

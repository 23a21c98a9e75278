"""One stem names an op everywhere: its files exist; public names are importable, documented, swappable.

A name that begins with an underscore belongs to its file: no other one imports it.
"""

import ast
import inspect
from collections.abc import Iterator
from importlib.util import resolve_name
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
# A value, not a computation: nothing to swap. It has a file of its own.
WITHOUT_BACKEND = {"MaskPlan": "_plan"}
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
    if {"triton", "native"} <= REGISTRY[stem].keys():
        wanted.append(f"d2vkern/functions/{stem}.py")
    missing = [path for path in wanted if not (ROOT / path).is_file()]
    if "native" in REGISTRY[stem] and not list((ROOT / "csrc").glob(f"{stem}.*")):
        missing.append(f"csrc/{stem}.*")
    assert not missing


@pytest.mark.parametrize("folder", ["d2vkern/functions", "d2vkern/ops", "kernels"])
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
    assert public.__module__ == f"d2vkern.ops.{WITHOUT_BACKEND.get(name, stem)}"
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


def borrowed(root: Path, packages: dict[str, str]) -> Iterator[str]:
    """`FILE:LINE: NAME` of every private name that a file takes from another one; packages: folder -> name.

    Modules may have private names: `from d2vkern import _nvtx` is a package's own business.
    """
    modules = {
        ".".join([package, *path.relative_to(root / folder).with_suffix("").parts]).removesuffix(
            ".__init__"
        ): path
        for folder, package in packages.items()
        for path in (root / folder).rglob("*.py")
    }
    for importer, path in modules.items():
        package = importer if path.name == "__init__.py" else importer.rpartition(".")[0]
        known: dict[str, str] = {}  # what a name of this file is, where that is one of the modules
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                source = resolve_name("." * node.level + (node.module or ""), package)
                for name in node.names:
                    full = f"{source}.{name.name}"
                    if full in modules:
                        known[name.asname or name.name] = full
                    elif source in modules and is_private(name.name):
                        yield f"{path.relative_to(root)}:{node.lineno}: {full}"
            elif isinstance(node, ast.Import):
                known |= {
                    name.asname: name.name for name in node.names if name.asname and name.name in modules
                }
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and is_private(node.attr) and isinstance(node.value, ast.Name):
                full = f"{known.get(node.value.id)}.{node.attr}"
                if node.value.id in known and full not in modules:
                    yield f"{path.relative_to(root)}:{node.lineno}: {full}"


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def test_no_file_takes_a_private_name_of_another() -> None:
    packages = {"d2vkern": "d2vkern", "kernels": "d2vkern.kernels", "d2v": "d2v", "benchmarks": "benchmarks"}
    assert list(borrowed(ROOT, packages)) == []


def test_borrowed_names_are_found(tmp_path: Path) -> None:
    files = {
        "__init__.py": "from ._ground import made\n",
        "_ground.py": "def _made(): ...\ndef made(): ...\n",
        "near.py": "def use():\n    from ._ground import (made,\n        _made)\n",
        "deep/far.py": "from shop import _ground as ground\nfrom os import _exit\nground._made\n",
        "other.py": "import shop._ground as ground\nground._made\n",
    }
    for name, text in files.items():
        (tmp_path / "src" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "src" / name).write_text(text, encoding="utf-8")
    assert sorted(borrowed(tmp_path, {"src": "shop"})) == [
        "src/deep/far.py:3: shop._ground._made",
        "src/near.py:2: shop._ground._made",
        "src/other.py:2: shop._ground._made",
    ]

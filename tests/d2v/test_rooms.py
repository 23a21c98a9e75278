"""Imports of `d2v` run one way: a room imports rooms before it alone, lazily or for types too."""

import graphlib
from pathlib import Path

import grimp
import pytest

ROOMS = ("config", "model", "data", "train", "formats", "evaluate", "tools", "cli")
ROOT = Path(__file__).resolve().parents[2]


def wrong_imports(package: str, root: Path) -> list[str]:
    """`FILE:LINE: STATEMENT` of every import against the order, and of what stands in no room.

    The package itself and its `__main__` stand above all rooms, so no room imports them.
    """
    graph = grimp.build_graph(package, cache_dir=None)
    place = {f"{package}.{room}": number for number, room in enumerate(ROOMS)}
    above = {package, f"{package}.__main__"}

    def rank(module: str) -> int:
        return place.get(".".join(module.split(".")[:2]), len(ROOMS))

    found = [f"{module}: in no room" for module in graph.modules - above if rank(module) == len(ROOMS)]
    for importer in graph.modules:
        for imported in graph.find_modules_directly_imported_by(importer):
            if rank(imported) <= rank(importer):
                continue
            file = root / importer.replace(".", "/")
            file = file / "__init__.py" if file.is_dir() else file.with_suffix(".py")
            for detail in graph.get_import_details(importer=importer, imported=imported):
                line, statement = detail["line_number"], detail["line_contents"].strip()
                found.append(f"{file.relative_to(root)}:{line}: {statement} ({imported})")
    return sorted(found)


def test_a_room_imports_only_rooms_before_it() -> None:
    assert wrong_imports("d2v", ROOT) == []


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = grimp.build_graph("d2v", cache_dir=None)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    graphlib.TopologicalSorter(imports).prepare()  # CycleError names the circle


def test_every_room_is_there() -> None:
    rooms = {path.name for path in (ROOT / "d2v").iterdir() if (path / "__init__.py").is_file()}
    assert rooms == set(ROOMS)


def test_imports_against_the_order_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "__init__.py": "def load():\n    from .formats import open\n",
        "config/__init__.py": "",
        "config/run.py": "import typing\n\nif typing.TYPE_CHECKING:\n    from ..model import encoder\n",
        "model/__init__.py": "from ..config import run\n",
        "model/encoder.py": "def build():\n    import sample_of_rooms.train.step\n",
        "train/__init__.py": "",
        "train/step.py": "from . import loop\nfrom ..config import run\n",
        "train/loop.py": "from .. import load\n",
        "formats/__init__.py": "",
        "formats/open.py": "from ..train import step\n",
        "stray.py": "",
    }
    for name, text in files.items():
        path = tmp_path / "sample_of_rooms" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    found = wrong_imports("sample_of_rooms", tmp_path)
    assert [line.split(": ", 1)[0] for line in found] == [
        "sample_of_rooms.stray",
        "sample_of_rooms/config/run.py:4",
        "sample_of_rooms/model/encoder.py:2",
        "sample_of_rooms/train/loop.py:1",
    ]
    assert found[2].endswith("import sample_of_rooms.train.step (sample_of_rooms.train.step)")

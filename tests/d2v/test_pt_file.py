"""Hostile and damaged `.pt` files: every call is refused by name, every damage is named, nothing runs."""

from __future__ import annotations

import collections
import io
import os
import pickle
import random
import zipfile
from pathlib import Path

import pytest
import torch

from d2v.config.toml import CheckpointError
from d2v.formats.fairseq import load_original
from d2v.formats.pt_file import PtFile


def tiny(tmp_path: Path, root: object, **options: object) -> Path:
    torch.save(root, tmp_path / "tiny.pt", **options)
    return tmp_path / "tiny.pt"


def opened(path: Path) -> object:
    with PtFile(path) as file:
        return file.root


class _Calls:
    """Pickles as a call of `function(*args)`."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "stream"])
@pytest.mark.parametrize(
    ("function", "name"),
    [
        (os.system, f"{os.system.__module__}.system"),
        (eval, "builtins.eval|__builtin__.eval"),
        (getattr, "builtins.getattr|__builtin__.getattr"),
        (torch.load, "torch.serialization.load"),
        (Path, "pathlib"),
    ],
)
def test_any_call_is_refused_by_name(tmp_path, function, name, zipped):
    marker = tmp_path / "ran"
    path = tiny(tmp_path, {"x": _Calls(function, f"touch {marker}")}, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=rf"tiny\.pt: refusing to call `({name})"):
        load_original(path)
    assert not marker.exists()


def test_getattr_reaches_nothing_real(tmp_path):
    path = tiny(tmp_path, {"x": _Calls(getattr, dict, "fromkeys")})
    with pytest.raises(CheckpointError, match="getattr"):
        load_original(path)


def test_tensors_with_attributes_are_rebuilt_by_nothing_but_our_code(tmp_path):
    """What makes the tensor is named in the file, so a file may name a class that is called instead."""
    call = _Calls(torch._tensor._rebuild_from_type_v2, dict, torch.Tensor, ([("a", 1)],), {})
    path = tiny(tmp_path, {"x": call})
    with pytest.raises(CheckpointError, match="refusing to call `torch._tensor._rebuild_from_type_v2`"):
        load_original(path)
    marked = torch.nn.Parameter(torch.arange(3.0))
    marked.note = {"lr_scale": 0.5}
    for root in (marked, marked.detach().as_subclass(torch.Tensor)):
        root.mark = 1
        with PtFile(tiny(tmp_path, {"a": root})) as file:
            assert torch.equal(file.tensor(file.root["a"]), torch.arange(3.0))


@pytest.mark.parametrize(
    "stream",
    [
        b"cos\nsystem\n(S'true'\ntR.",  # protocol 0
        b"(S'true'\nios\nsystem\n.",  # INST
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.",  # STACK_GLOBAL
        b"\x80\x04\x8c\x0acollections\x8c\x17OrderedDict.__init__.__s\x93.",  # dotted names
    ],
)
def test_every_way_to_name_a_global_is_refused(tmp_path, stream):
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as file:
        file.writestr("x/data.pkl", stream)
    with pytest.raises(CheckpointError, match="refusing to call|damaged"):
        load_original(tmp_path / "x.pt")


@pytest.mark.parametrize(
    "stream",
    [
        b"\x80\x02ccollections\nOrderedDict\n}X\x01\x00\x00\x00aK\x01sb.",  # BUILD on a class
        b"\x80\x02comegaconf.nodes\nAnyNode\n}X\x01\x00\x00\x00aK\x01sb.",
        b"\x80\x02K\x01r\xff\xff\xff\xff.",  # a memo index of 4 billion
        b"\x80\x02K\x01K\x02R.",  # a call of a number
        b"\x80\x02", b"", b"\x80\x02Q.", b"\x80\x7f.",
    ],
)  # fmt: skip
def test_forged_streams_do_no_harm(tmp_path, stream):
    before = set(dir(collections.OrderedDict))
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as file:
        file.writestr("x/data.pkl", stream)
    with pytest.raises(CheckpointError, match=r"x\.pt"):
        load_original(tmp_path / "x.pt")
    assert set(dir(collections.OrderedDict)) == before


def _doubled(levels: int = 60) -> list[object]:
    """Short in a file and in memory, for each list holds the one before it twice."""
    made: list[object] = []
    for _ in range(levels):
        made = [made, made]
    return made


@pytest.mark.parametrize(
    ("root", "words"),
    [
        ({"cfg": {"model": {"x": _doubled()}}, "model": {"modality_encoders.AUDIO.x": torch.zeros(1)}},
         "its cfg is damaged: ValueError.'more than 100,000 values'"),
        ({"model": {"x": _doubled()}}, "x must be a tensor, got "),
        ({"x": _Calls(torch._utils._rebuild_tensor_v2, _doubled(), 0, (1,), (1,))},
         "tensor over .* is malformed"),
    ],
)  # fmt: skip
def test_what_is_held_twice_does_not_explode(tmp_path, root, words):
    with pytest.raises(CheckpointError, match=rf"tiny\.pt: {words}"):
        load_original(tiny(tmp_path, root))


def test_keys_that_are_never_done_hashing_are_refused(tmp_path):
    doubled = b"".join(bytes((*b"q", level, *b"h", level, *b"\x86")) for level in range(60))
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as file:
        file.writestr("x/data.pkl", b"\x80\x02})" + doubled + b"K\x01s.")
    with pytest.raises(CheckpointError, match=r"x\.pt: a tuple in it has more than 100,000 values"):
        load_original(tmp_path / "x.pt")


def test_a_compressed_pickle_is_not_unpacked(tmp_path):
    """It could be of any size."""
    with zipfile.ZipFile(tmp_path / "x.pt", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("x/data.pkl", b"\x80\x02" + b"N0" * 10_000 + b"N.")
    with pytest.raises(CheckpointError, match=r"x\.pt: x/data\.pkl is compressed"):
        load_original(tmp_path / "x.pt")


def _rewrite(source: Path, target: Path, change) -> Path:
    """Copy a zip, entry by entry through `change(name, bytes) -> bytes | None`."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            if (data := change(name, old.read(name))) is not None:
                new.writestr(name, data)
    return target


def test_tensors_cannot_reach_past_their_storage(tmp_path):
    path = tiny(tmp_path, {"model": {"a": torch.arange(4.0)}})

    def widen(name, data):
        return data.replace(b"K\x04\x85", b"K\x05\x85") if name.endswith("data.pkl") else data

    with pytest.raises(CheckpointError, match="reaches past the 4 values of storage 0"):
        opened(_rewrite(path, tmp_path / "wide.pt", widen))


@pytest.mark.parametrize("case", ["short", "gone", "flipped", "big_endian"])
def test_tampered_storages_are_named(tmp_path, goldens, case):
    source = goldens / "ckpt_image_base.pt"
    target = tmp_path / "bad.pt"
    if case == "flipped":
        data = bytearray(source.read_bytes())
        data[len(data) // 2] ^= 1
        target.write_bytes(data)
    else:
        changes = {
            "short": lambda name, data: data[:-4] if name.endswith("data/7") else data,
            "gone": lambda name, data: None if name.endswith("data/7") else data,
            "big_endian": lambda name, data: b"big" if name.endswith("byteorder") else data,
        }
        _rewrite(source, target, changes[case])
    with pytest.raises(CheckpointError, match=r"bad\.pt: (storage \d+|written on a big-endian)"):
        load_original(target)


def test_files_that_are_no_checkpoints(tmp_path):
    with pytest.raises(CheckpointError, match=r"absent\.pt: No such file"):
        load_original(tmp_path / "absent.pt")
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(CheckpointError, match=r"text\.pt"):
        load_original(tmp_path / "text.pt")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr("a.txt", "x")
    with pytest.raises(CheckpointError, match=r"a\.zip: not a file of torch\.save"):
        load_original(tmp_path / "a.zip")
    (tmp_path / "p.pt").write_bytes(pickle.dumps([1, 2]))
    with pytest.raises(CheckpointError, match=r"p\.pt"):
        load_original(tmp_path / "p.pt")


def test_every_dtype_and_empty_tensors(tmp_path):
    names = "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool"
    dtypes = [getattr(torch, name) for name in names.split()]
    saved = {str(d): torch.tensor([[0, 1, 2]]).to(d) for d in dtypes}
    saved.update(empty=torch.empty(0, 3), scalar=torch.tensor(2.5))
    saved["parameter"] = torch.nn.Parameter(torch.ones(2))
    with PtFile(tiny(tmp_path, saved)) as file:
        for key, tensor in saved.items():
            got = file.tensor(file.root[key])
            assert got.dtype == tensor.dtype and torch.equal(got, tensor), key


def test_the_old_stream_is_read_in_any_order(tmp_path):
    """The old stream format holds several pickles in one file: each is read to its own end."""
    buffer = io.BytesIO()
    torch.save({"a": torch.arange(3), "b": torch.arange(5.0)}, buffer, _use_new_zipfile_serialization=False)
    (tmp_path / "s.pt").write_bytes(buffer.getvalue())
    with PtFile(tmp_path / "s.pt") as file:
        assert torch.equal(file.tensor(file.root["b"]), torch.arange(5.0))
        assert torch.equal(file.tensor(file.root["a"]), torch.arange(3))


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "stream"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_truncated_files_are_named(tmp_path, share, zipped):
    root = {"model": {"a": torch.arange(1000.0), "b": torch.arange(1000)}}
    data = tiny(tmp_path, root, _use_new_zipfile_serialization=zipped).read_bytes()
    (tmp_path / "cut.pt").write_bytes(data[: int(len(data) * share)])
    with pytest.raises(CheckpointError, match=r"cut\.pt"):
        load_original(tmp_path / "cut.pt")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "stream"])
def test_random_damage_raises_nothing_else(tmp_path, zipped):
    root = {"model": {"a": torch.arange(6.0), "_ema": {}}, "cfg": {"model": {"depth": 2}, "x": [1, "y"]}}
    data = tiny(tmp_path, root, _use_new_zipfile_serialization=zipped).read_bytes()
    draw = random.Random(0)
    for _ in range(300):
        damaged = bytearray(data)
        for _ in range(draw.randint(1, 4)):
            damaged[draw.randrange(len(data))] = draw.randrange(256)
        (tmp_path / "damaged.pt").write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"damaged\.pt"):  # undamaged, it holds no modality
            load_original(tmp_path / "damaged.pt")


def test_tensors_are_read_when_asked_for(tmp_path):
    """An optimizer state that cannot be read does not matter until someone wants it."""
    path = tiny(tmp_path, {"model": torch.arange(5), "optimizer": torch.arange(777.0)})
    _rewrite(path, tmp_path / "y.pt", lambda name, data: None if len(data) == 777 * 4 else data)
    with PtFile(tmp_path / "y.pt") as file:
        assert torch.equal(file.tensor(file.root["model"]), torch.arange(5))
        with pytest.raises(CheckpointError, match=r"y\.pt: storage 1 cannot be read"):
            file.tensor(file.root["optimizer"])

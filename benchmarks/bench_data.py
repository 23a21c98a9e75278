"""Samples a second that one core reads, crops and decodes: pictures, sounds, text; and cores for a fast GPU.

    python -m benchmarks.bench_data                    half a minute; writes results/data_cpu.json
    python -m benchmarks.bench_data --data photos/     pictures of your own beside these
    python -m benchmarks.bench_data --against OTHER/   another version of the project beside this one

A sample is what leaves a worker: `Source.read` of the training data, without the device's part. Each kind
stands beside the plain way to do it: of pictures Pillow's decoder and its resize of the box; of sounds
libsndfile's whole file; of text a slice of an array, and the tokenizer alone. They take turns; time is that
of the process (with the tokenizer's threads), the median of the rounds, on one thread. Pictures are
scikit-learn's two photographs, sounds the embedded speech, text the embedded prose.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from subprocess import PIPE
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from benchmarks.data_reader import tokenised
from benchmarks.machine import provenance
from benchmarks.report import Results, markdown, short, write_json
from d2v.config.presets import preset
from d2v.data.loader import Loader, Source, generator
from d2v.data.open import open_data

RESULTS = Path(__file__).parent / "results"
PICTURES = {
    "JPEG 500x375": (500, 375, "JPEG", {"quality": 90}),
    "JPEG 1600x1200": (1600, 1200, "JPEG", {"quality": 90}),
    "JPEG 4000x3000": (4000, 3000, "JPEG", {"quality": 90}),
    "PNG 500x375": (500, 375, "PNG", {}),
}
"""width, height, format, what Pillow saves it with: as in ImageNet, from the web, from a phone"""
SOUNDS = ("flac", "ogg", "mp3", "wav")
GPU_PICTURES = 900
"""pictures a second that an H200 trains image_base on; docs/results.md has the step"""

Read = Callable[[int, int], Any]
"""one sample by number and epoch"""


@dataclasses.dataclass(frozen=True)
class Kind:
    """Samples of one kind and the ways to read them."""

    name: str
    unit: str
    count: int
    ours: Read
    plain: Read
    folder: Path
    preset: str
    tokenizer: Path | None = None
    per_sample: float = 1.0
    """units that a sample holds"""


class Version:
    """Another version of the project, which reads in a process of its own."""

    def __init__(self, root: Path) -> None:
        environment = os.environ | {"PYTHONPATH": str(root.resolve()), "OMP_NUM_THREADS": "1"}
        script = Path(__file__).with_name("data_reader.py")
        self.process = subprocess.Popen(
            [sys.executable, str(script)], cwd=root, env=environment, text=True, stdin=PIPE, stdout=PIPE
        )

    def ask(self, **request: Any) -> dict[str, float]:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps(request), file=self.process.stdin, flush=True)
        if not (answer := self.process.stdout.readline()):
            raise RuntimeError(f"the other version ended with {self.process.wait()} at {request}")
        return json.loads(answer)

    def open(self, kind: Kind) -> None:
        tokenizer = None if kind.tokenizer is None else str(kind.tokenizer)
        found = self.ask(open=str(kind.folder), preset=kind.preset, tokenizer=tokenizer)
        assert found["samples"] == kind.count, "it finds other samples"

    def close(self) -> None:
        self.process.communicate()


def image_kind(name: str, folder: Path) -> Kind:
    """The pictures of a folder, as image_base reads them."""
    from PIL import Image

    from d2v.data.images.source import ImageSource, crop_box
    from d2v.data.loader import AUGMENT

    source = _source(folder, "image_base")
    assert isinstance(source, ImageSource)

    def plain(index: int, epoch: int) -> np.ndarray:
        front = source.front
        with open(source.name(index), "rb") as file:
            picture = Image.open(file)
            width, height = picture.size
            box = crop_box(generator(source.seed, AUGMENT, epoch, index), height, width, source.scale)
            h, w = min(box[3] - box[1], front.height), min(box[2] - box[0], front.width)
            wanted = math.ceil(width * w / (box[2] - box[0])), math.ceil(height * h / (box[3] - box[1]))
            picture.draft(None, wanted)
            scale = picture.size[0] / width, picture.size[1] / height
            scaled = tuple(side * scale[i % 2] for i, side in enumerate(box))
            cut = picture.convert("RGB").resize((w, h), Image.Resampling.BICUBIC, box=scaled)
        return np.asarray(cut)

    return Kind(name, "pictures", len(source), source.read, plain, folder, "image_base")


def sound_kind(suffix: str, folder: Path, count: int) -> Kind:
    """Embedded utterances of 16 kHz in a format, as audio_base reads them; counted in seconds of sound."""
    import soundfile

    from d2v.data.embedded.speech import utterances

    folder.mkdir()
    for number, utterance in enumerate(utterances()[:count]):
        soundfile.write(folder / f"{number:02}.{suffix}", utterance.wave(), 16_000)
    source = _source(folder, "audio_base")
    return Kind(
        suffix.upper() if suffix != "ogg" else "Ogg Vorbis",
        "utterances",
        len(source),
        source.read,
        lambda index, _: soundfile.read(folder / source.name(index), dtype="float32"),
        folder,
        "audio_base",
    )


def text_kinds(folder: Path, texts: Sequence[str]) -> list[Kind]:
    """Blocks of 512 tokens of a corpus that is tokenised, and tokenising one, in millions of characters."""
    folder.mkdir()
    for number, text in enumerate(texts):
        (folder / f"{number}.txt").write_text(text, encoding="utf-8")
    source = _source(folder, "text_base")
    tokenizer = Path(source.meta["tokenizer"])
    tokens = np.arange(512 * len(source), dtype=np.int32)
    block = 512
    blocks = Kind(
        "text, blocks of 512",
        "blocks",
        len(source),
        source.read,
        lambda index, _: tokens[index * block : (index + 1) * block].astype(np.int64),
        folder,
        "text_base",
        tokenizer,
    )
    plain = Tokenizer.from_file(str(tokenizer))
    tokenising = Kind(
        "text, tokenised",
        "million characters",
        1,
        lambda *_: tokenised(str(folder), "text_base", str(tokenizer)),
        lambda *_: plain.encode_batch(list(texts), add_special_tokens=False),
        folder,
        "text_base",
        tokenizer,
        per_sample=sum(map(len, texts)) / 1e6,
    )
    return [blocks, tokenising]


def _source(path: Path, name: str) -> Source:
    cfg = preset(name)
    loader = open_data(str(path), dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, batch=30)))
    assert isinstance(loader, Loader)
    return loader.source


def draw_pictures(folder: Path, width: int, height: int, kind: str, options: dict[str, Any]) -> Path:
    """Eight pictures: scikit-learn's two, mirrored and upside down."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    folder.mkdir()
    for number, pixels in enumerate(load_sample_images().images):
        picture = Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS)
        for turn in range(4):
            picture = picture.transpose(Image.Transpose(turn % 2))
            picture.save(folder / f"{number}{turn}.{kind.lower()}", kind, **options)
    return folder


def measure(kind: Kind, seconds: float, rounds: int, other: Version | None) -> list[dict[str, Any]]:
    """A row for each way, with its samples a second of one core: the median of rounds that take turns."""
    ways: dict[str, Callable[[int], float]] = {
        "ours": lambda epoch: _rate(kind.ours, kind.count, seconds, epoch),
        "plain": lambda epoch: _rate(kind.plain, kind.count, seconds, epoch),
    }
    if other is not None and kind.unit == "million characters":
        request = {"tokenise": str(kind.folder), "preset": kind.preset, "tokenizer": str(kind.tokenizer)}
        ways["before"] = lambda _: 1 / other.ask(**request)["taken"]
    elif other is not None:
        other.open(kind)

        def before(epoch: int) -> float:
            found = other.ask(seconds=seconds, epoch=epoch)
            return found["done"] / found["taken"]

        ways["before"] = before
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for epoch in range(rounds):
        for name, way in ways.items():
            rates[name].append(kind.per_sample * way(epoch))
    return [
        {
            "kind": kind.name,
            "unit": kind.unit,
            "variant": name,
            "per_second": statistics.median(some),
            "rounds": some,
        }
        for name, some in rates.items()
    ]


def _rate(read: Read, count: int, seconds: float, epoch: int) -> float:
    began, done = time.process_time(), 0
    while (taken := time.process_time() - began) < seconds or not done:
        read(done % count, epoch)
        done += 1
    return done / taken


def data_table(found: Results) -> list[str]:
    """Rates, their ratio, and of pictures the cores that a GPU needs."""
    rows: dict[str, dict[str, Any]] = {}
    for row in found.data["rows"]:
        rows.setdefault(row["kind"], {"unit": row["unit"]})[row["variant"]] = row["per_second"]
    compared = any("before" in row for row in rows.values())
    cells = []
    for name, row in rows.items():
        before = [short(row["before"]), f"{row['ours'] / row['before']:.2f}"] if compared else []
        cores = f"{GPU_PICTURES / row['ours']:.1f}" if row["unit"] == "pictures" else ""
        ratio = f"{row['ours'] / row['plain']:.2f}"
        cells.append([name, row["unit"], short(row["plain"]), short(row["ours"]), ratio, *before, cores])
    head = ["a core, a second", "of", "plain", "d2v", "ratio", *["before", "ratio"] * compared]
    return markdown([*head, f"cores for {GPU_PICTURES} a second"], cells, 2)


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_data",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, help="a folder of pictures to measure as well")
    parser.add_argument("--against", type=Path, help="a checkout of another version to measure as well")
    parser.add_argument("--seconds", type=float, default=0.5, help="of each turn")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--smoke", action="store_true", help="toy sizes of pictures, little text")
    parser.add_argument("--out", type=Path, default=RESULTS / "data_cpu.json")
    args = parser.parse_args(arguments)
    if args.smoke:
        texts = [Path(__file__).read_text(encoding="utf-8")] * 20
    else:
        from d2v.data.embedded.text import documents

        texts = [text for _, text in documents()[:200]]
    with tempfile.TemporaryDirectory() as place, _one_thread():
        folder = Path(place)
        os.environ.setdefault("D2V_CACHE", str(folder / "cache"))
        kinds = []
        for name, (width, height, form, options) in PICTURES.items():
            side = (width // 16, height // 16) if args.smoke else (width, height)
            kinds.append(image_kind(name, draw_pictures(folder / name, *side, form, options)))
        if args.data:
            kinds.append(image_kind(args.data.name, args.data))
        kinds += [sound_kind(suffix, folder / suffix, 12 if args.smoke else 24) for suffix in SOUNDS]
        kinds += text_kinds(folder / "text", texts)
        other = None if args.against is None else Version(args.against)
        rows = []
        for kind in kinds:
            found = measure(kind, args.seconds, args.rounds, other)
            rates = {row["variant"]: row["per_second"] for row in found}
            ours, rows = rates.pop("ours"), rows + found
            beside = ", ".join(f"{rate:,.1f} {name} ({ours / rate:.2f})" for name, rate in rates.items())
            print(f"{kind.name}: {ours:,.1f} {kind.unit}/s here, {beside}")
        if other is not None:
            other.close()
    write_json(args.out, {"provenance": provenance(torch.device("cpu")) | {"threads": 1}, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())

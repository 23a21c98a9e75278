"""Pictures as people have them: which way up, of which colours and depth, see-through, animated."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from d2v.data.images.eval_picture import eval_picture
from d2v.data.images.jpeg import decoded
from d2v.data.images.source import shrunk
from d2v.data.images.store import opened
from d2v.data.open import check_data, open_data
from tests.d2v.pictures import config, encoded, first, pixels, source_of, tiff, unnormalised, write


def read(path: Path, **settings) -> np.ndarray:
    """Pixels of the only picture at a path, as evaluation sees them."""
    return source_of(path, **settings).read(0, None)[0]


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[274] = orientation
    return exif


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_pictures_stand_as_their_orientation_says(tmp_path: Path, kind: str, orientation: int):
    """In evaluation and in training: with the tag as if they had been turned before they were saved."""
    drawn = Image.fromarray(pixels(40, 70, 3))
    lossless = {"WEBP": {"lossless": True}, "JPEG": {"quality": 90}}.get(kind, {})
    write(tmp_path / "tag" / "a", encoded(drawn, kind, exif=turned(orientation), **lossless)).rename(
        tmp_path / "tag" / f"a.{kind.lower()}"
    )
    (file,) = (tmp_path / "tag").iterdir()
    with Image.open(file) as picture:
        upright = ImageOps.exif_transpose(picture)
    assert (upright.size == (40, 70)) == (orientation > 4)
    write(tmp_path / "plain" / "a.png", encoded(upright))
    assert np.array_equal(read(tmp_path / "tag"), read(tmp_path / "plain"))
    tagged, plain = (source_of(tmp_path / folder).read(0, 3) for folder in ("tag", "plain"))
    assert tagged[1:] == plain[1:] and np.array_equal(tagged[0], plain[0])


def test_a_damaged_block_of_metadata_leaves_the_picture_as_it_is(tmp_path: Path):
    image = pixels(16, 16, 3)
    write(tmp_path / "a.png", encoded(image, exif=b"Exif\0\0II*\0\xff\xff\xff\xff"))
    assert np.array_equal(read(tmp_path), image)


def test_orientation_and_reduced_decoding_together(tmp_path: Path):
    ramp = np.broadcast_to(np.linspace(0, 255, 700).astype(np.uint8)[:, None, None], (700, 300, 3))
    ramp = np.ascontiguousarray(ramp)
    write(tmp_path / "a.jpg", encoded(ramp, "JPEG", quality=95, exif=turned(6)))
    source = source_of(tmp_path, crop_scale=(1.0, 1.0), flip=False)
    picture, *_ = source.read(0, 0)
    across = picture[..., 0].astype(int).mean(0)  # dark at the top is dark at the right
    assert picture.shape == (16, 16, 3) and (np.diff(across) < -3).all()


def test_crops_of_reduced_jpegs_lie_where_they_were_drawn(tmp_path: Path):
    """A side of 1,001 pixels decodes to 126 at an eighth, which cover 1,008."""
    image = np.zeros((1001, 1001, 3), np.uint8)
    image[960:] = image[:, 960:] = 255
    write(tmp_path / "jpg" / "a.jpg", encoded(image, "JPEG", quality=95))
    write(tmp_path / "png" / "a.png", encoded(image))
    both = [
        source_of(tmp_path / kind, crop_scale=(1.0, 1.0)).read(0, 0)[0].astype(int) for kind in ("jpg", "png")
    ]
    assert abs(both[0] - both[1]).max() <= 6


def test_mixed_colours_are_converted_and_said_once(tmp_path: Path):
    """Grey and colour in one folder, for one, three and four channels."""
    for i in range(6):
        write(tmp_path / f"{i}.png", encoded(pixels(20, 20, *[3][: i % 2], seed=i)))
    said = {
        1: ["pictures in colour, made grey (--model.front.channels 3 keeps their colours): the first is {1}"],
        3: ["pictures grey, made three equal channels (--model.front.channels 1 is enough where all are)"],
        4: ["pictures without transparency, made opaque (--model.front.channels 3 is enough where all are)"],
    }
    for channels, lines in said.items():
        pipeline = open_data(
            str(tmp_path), config(channels=channels, mean=(0.0,) * channels, std=(1.0,) * channels)
        )
        for batch in first(pipeline, 4):
            assert batch.source.shape == (4, channels, 16, 16)
        notes = pipeline.report.notes
        assert len(notes) == 1 and notes[0].startswith(lines[0].format(*"012345").split(": the first")[0])
        assert notes[0].endswith(".png") and not pipeline.report.unreadable
    report = check_data(str(tmp_path), config(channels=1))
    assert report.notes == [
        "3 of 6 pictures are in colour, made grey (--model.front.channels 3 keeps their colours): "
        f"the first is {tmp_path}/1.png"
    ]


@pytest.mark.parametrize("kind", ["uint8", "float32"])
def test_arrays_are_converted_as_files_are(tmp_path: Path, kind: str):
    images = pixels(2, 16, 16, 3)
    scale = 1 if kind == "uint8" else 255
    np.savez(tmp_path / "colour.npz", images=images if scale == 1 else (images / 255).astype(np.float32))
    np.savez(tmp_path / "grey.npz", images=images[..., 0] if scale == 1 else images[..., 0] / 255)
    made = read(tmp_path / "colour.npz", channels=1) * scale
    wanted = np.asarray(Image.fromarray(images[0]).convert("L"))
    assert abs(made[..., 0] - wanted).max() <= (0 if scale == 1 else 0.51)
    made = read(tmp_path / "grey.npz") * scale
    np.testing.assert_allclose(made, images[0, ..., :1].repeat(3, 2), atol=1e-4)


def see_through(mode: str) -> Image.Image:
    """16 x 16, red where it is solid and green (grey: dark and middling) in the left, transparent half."""
    image = np.zeros((16, 16, 4), np.uint8)
    image[:, :8] = 0, 200, 0, 0
    image[:, 8:] = 200, 0, 0, 255
    if mode.startswith("L") or mode.startswith("I"):
        grey = np.where(np.arange(16) < 8, 100, 60)[None].repeat(16, 0).astype(np.uint8)
        if mode == "I;16":
            return Image.fromarray(grey.astype(np.uint16) * 257)
        return Image.merge("LA", (Image.fromarray(grey), Image.fromarray(image[..., 3]))).convert(mode)
    picture = Image.fromarray(image)
    if mode in ("P", "PA"):
        solid = picture.convert("RGB").convert("P", palette=Image.Palette.ADAPTIVE, colors=2)
        if mode == "P":
            return solid
        alpha = picture.getchannel("A")
        made = Image.new("PA", (16, 16))
        made.putpalette(solid.getpalette())
        made.paste(solid.convert("PA"))
        made.putalpha(alpha)
        return made
    return picture.convert(mode)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("mode", "key"),
    [
        *[(mode, None) for mode in ("RGBA", "RGBa", "LA", "La", "PA")],
        ("L", 100),
        ("RGB", (0, 200, 0)),
        ("P", "index"),
        ("P", "table"),
        ("I;16", 25_700),
    ],
)
def test_transparency_is_put_on_white(tmp_path: Path, mode: str, key: object, channels: int):
    picture = see_through(mode)
    if mode == "P":
        clear = int(np.asarray(picture)[0, 0])
        key = clear if key == "index" else bytes(0 if i == clear else 255 for i in range(2))
    if key is not None:
        write(tmp_path / "a.png", encoded(picture, transparency=key))
        made = read(tmp_path, channels=channels)
    elif mode in ("RGBA", "LA"):
        write(tmp_path / "a.png", encoded(picture))
        made = read(tmp_path, channels=channels)
    else:  # modes that no file of ours is opened in
        made = eval_picture(picture, 16, 16, channels)
    assert (made[:, :8] == 255).all()
    solid = {1: [60], 3: [200, 0, 0] if mode[0] in "RP" else [60] * 3}[channels]
    assert mode[0] in "RP" and channels == 1 or (made[:, 8:] == solid).all()
    half = see_through("RGBA")
    half.putalpha(128)
    assert (eval_picture(half, 16, 16, 3)[0, 0] == [127, 227, 127]).all()


def test_transparency_of_colours_of_16_bits(tmp_path: Path):
    """Pillow keeps the upper 8 bits of the pixels and all 16 of the colour that is transparent."""
    rows = b"".join(b"\0" + b"\x40\x11\x50\x22\x60\x33" * 8 + b"\x70\0\x80\0\x90\0" * 8 for _ in range(16))
    head = b"\0\0\0\x10\0\0\0\x10\x10\x02\0\0\0"
    chunks = {b"IHDR": head, b"tRNS": b"\x40\x11\x50\x22\x60\x33", b"IDAT": zlib.compress(rows), b"IEND": b""}
    write(tmp_path / "a.png", b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*item) for item in chunks.items()))
    made = read(tmp_path)
    assert (made[:, :8] == 255).all() and (made[:, 8:] == [0x70, 0x80, 0x90]).all()


def chunk(kind: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


RAMP = np.linspace(0, 1, 256).reshape(16, 16)


def packed(values: np.ndarray) -> bytes:
    """Two values of 12 bits in three bytes, as TIFF has them."""
    a, b = values.reshape(-1, 2).astype(np.uint16).T
    return np.stack([a >> 4, (a & 15) << 4 | b >> 8, b & 255], 1).astype(np.uint8).tobytes()


def with_significant(data: bytes, bits: int) -> bytes:
    return data[:33] + chunk(b"sBIT", bytes([bits])) + data[33:]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("name", "bits"),
    [("a.tif", 12), ("b.png", 12), ("c.tif", 10), ("d.png", 10), ("e.png", 16), ("f.tif", 16), ("g.png", 8)],
)
def test_grey_of_16_bits_spans_what_is_used(tmp_path: Path, name: str, bits: int, channels: int):
    """TIFF's BitsPerSample and MaxSampleValue, PNG's sBIT, else 12 bits where no more are used."""
    values = np.round(RAMP * ((1 << bits) - 1)).astype(np.uint16)
    image = encoded(Image.fromarray(values))
    data = {
        "a": lambda: tiff(packed(values), 16, 16, bits_per_sample=12),
        "b": lambda: image,
        "c": lambda: tiff(values.tobytes(), 16, 16, bits_per_sample=16, max_sample_value=1000),
        "d": lambda: with_significant(image, 10),
        "e": lambda: with_significant(image, 12),  # as the standard has it: scaled to 16 bits
        "f": lambda: tiff(values.tobytes(), 16, 16, bits_per_sample=16),
        "g": lambda: with_significant(image, 8),
    }[name[0]]()
    write(tmp_path / name, data)
    made = read(tmp_path, channels=channels)
    assert made.min() == 0 and made.max() == 255
    assert abs(made[..., 0] - RAMP * 255).max() <= 1
    notes = check_data(str(tmp_path), config(channels=channels)).notes
    assert any("fewer are used" in note for note in notes) == (bits < 16)


@pytest.mark.parametrize("alpha", ["none", "as deep", "full"])
@pytest.mark.parametrize("bits", [10, 12, 16])
@pytest.mark.parametrize("kind", ["png", "tiff", "deflated"])
def test_colours_of_16_bits_span_what_is_used(tmp_path: Path, kind: str, bits: int, alpha: str):
    """Solid ones, of 12 bits where no more are used, or as the header says; Pillow keeps the upper 8."""
    colours = np.stack([RAMP, RAMP[::-1], RAMP.T * 0.5], 2)
    values = np.round(colours * ((1 << bits) - 1)).astype(">u2")
    if alpha != "none":
        solid = np.full((16, 16, 1), (1 << (bits if alpha == "as deep" else 16)) - 1)
        values = np.concatenate([values, solid], 2).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    if kind == "png":
        head = b"\0\0\0\x10\0\0\0\x10\x10" + (b"\x02" if alpha == "none" else b"\x06") + bytes(3)
        chunks = {b"IHDR": head, b"IDAT": zlib.compress(rows), b"IEND": b""}
        data = b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*item) for item in chunks.items())
        data = with_significant(data, 10) if bits == 10 else data
    else:
        packed = values.astype("<u2").tobytes()
        size = {"max_sample_value": 1023} if bits == 10 else {}
        how = {"photometric": 2, "samples_per_pixel": values.shape[2], "bits_per_sample": 16}
        if kind == "deflated":
            packed, how["compression"] = zlib.compress(packed), 8
        data = tiff(packed, 16, 16, **how, **size)
    write(tmp_path / f"a.{kind[:3].replace('def', 'tif')}", data)
    made = read(tmp_path)
    assert abs(made - colours * 255).max() <= 1
    notes = check_data(str(tmp_path), config()).notes
    assert any("fewer are used" in note for note in notes) == (bits < 16)


@pytest.mark.parametrize("bits", [8, 12, 16])
def test_white_is_zero(tmp_path: Path, bits: int):
    values = np.round((1 - RAMP) * ((1 << bits) - 1)).astype(np.uint8 if bits == 8 else np.uint16)
    depth = 8 * values.itemsize
    write(tmp_path / "a.tif", tiff(values.tobytes(), 16, 16, bits_per_sample=depth, photometric=0))
    assert abs(read(tmp_path, channels=1)[..., 0] - RAMP * 255).max() <= 1


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_cuts_shrink_as_pillow_shrinks_them(channels: int):
    """Which is how the original does it; torch rounds elsewhere. Colours of RGBA count by their alpha."""
    for height, width in ((70, 40), (25, 90), (16, 33)):
        image = pixels(height, width, channels)
        cut = Image.fromarray(image if channels > 1 else image[..., 0])
        wanted = np.asarray(cut.resize((16, 20), Image.Resampling.BICUBIC)).reshape(20, 16, channels)
        assert abs(shrunk(cut, 20, 16).astype(int) - wanted).max() <= 2
    assert np.array_equal(shrunk(cut, 16, 33), image)


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0", "4:1:1"])
def test_the_fast_decoder_gives_pillows_bits(tmp_path: Path, subsampling: str, progressive: bool):
    """At every scale and for sides that no block divides."""
    pytest.importorskip("simplejpeg")
    smooth = Image.fromarray(pixels(12, 12, 3)).resize((301, 203), Image.Resampling.BICUBIC)
    for image in (smooth, Image.fromarray(pixels(17, 9, 3))):
        data = encoded(image, "JPEG", quality=85, subsampling=subsampling, progressive=progressive)
        file = write(tmp_path / "a.jpg", data)
        for scale in (1, 2, 4, 8):
            both = [opened(str(file)), opened(str(file))]
            for picture in both:
                picture.draft(None, tuple(max(1, side // scale) for side in picture.size))
            made = decoded(both[0])
            assert made is not None and np.array_equal(made, np.asarray(both[1]))


def test_what_is_no_plain_jpeg_is_left_to_pillow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole = encoded(pixels(40, 40, 3), "JPEG")
    grey, inks = (encoded(Image.new(mode, (16, 16)), "JPEG") for mode in ("L", "CMYK"))
    for data in (whole[: len(whole) // 2], grey, inks, encoded(pixels(16, 16, 3))):
        assert decoded(opened(str(write(tmp_path / "a", data)))) is None
    monkeypatch.setattr("d2v.data.images.jpeg.simplejpeg", None)
    assert decoded(opened(str(write(tmp_path / "a", whole)))) is None


def test_no_crop_of_a_reduced_jpeg_is_empty(tmp_path: Path):
    """Slivers, whose sides are a pixel or two when decoded."""
    write(tmp_path / "a.jpg", encoded(pixels(400, 9, 3), "JPEG"))
    write(tmp_path / "b.jpg", encoded(pixels(8, 1000, 3), "JPEG", exif=turned(6)))
    source = source_of(tmp_path, height=4, width=4, crop_scale=(0.001, 0.01))
    for index in (0, 1):
        for epoch in range(40):
            made, height, width, _ = source.read(index, epoch)
            assert made.shape == (4, 4, 3) and 1 <= height <= 4 and 1 <= width <= 4


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_frame_is_read(tmp_path: Path, kind: str):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    write(tmp_path / f"a.{kind.lower()}", data)
    assert (read(tmp_path) == [255, 0, 0]).all()
    assert (source_of(tmp_path).read(0, 0)[0] == [255, 0, 0]).all()


def test_inks_become_the_colours_they_print(tmp_path: Path):
    """Adobe writes them inverted into JPEGs, and says so in a marker of its own."""
    inks = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    data = encoded(inks, "JPEG", quality=95)
    assert b"Adobe" in data
    write(tmp_path / "a.jpg", data)
    red, green, blue = read(tmp_path).reshape(-1, 3).mean(0)
    assert red > 250 and green < 5 and blue < 5


def test_sane_pictures_are_untouched(tmp_path: Path):
    """8 bits, RGB, upright: what Pillow's resize makes of them, bit for bit, and nothing is noted."""
    image = pixels(50, 64, 3)
    write(tmp_path / "a.png", encoded(image))
    pipeline = open_data(str(tmp_path), config(batch=1))
    (_, batch), *_ = pipeline.in_order(1)
    wanted = Image.fromarray(image).resize((16, 16), Image.Resampling.BICUBIC, box=(10, 3, 54, 47))
    made = unnormalised(batch.source, pipeline.meta)[0].permute(1, 2, 0) * 255
    torch.testing.assert_close(made, torch.from_numpy(np.array(wanted)).float(), atol=1e-3, rtol=0)
    assert not pipeline.report.notes

"""Pictures of every awkward kind: the right RGB, or one clear error that names the file."""

import math
import os
import random
import struct
import zlib

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from promptloop_pipeline.rewards.images import MAX_PIXELS, as_rgb, crop_pixels, load_image, pad_pixels

from . import reference

RED, WHITE = (255, 0, 0), (255, 255, 255)


def picture(width=16, height=12, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def refused(path, match, kind=OSError):
    with pytest.raises(kind, match=match) as e:
        load_image(path)
    assert str(path) in str(e.value) and "\n" not in str(e.value)


def test_plain(tmp_path):
    picture().save(tmp_path / "a.png")
    found = load_image(str(tmp_path / "a.png"))
    assert found.mode == "RGB" and found.tobytes() == picture().tobytes()


def test_what_is_no_picture(tmp_path):
    refused(tmp_path / "missing.png", "there is no picture at", FileNotFoundError)
    refused(tmp_path, "is a folder; name the pictures in it", IsADirectoryError)
    for name, data in (("empty.png", b""), ("text.png", b"not a picture"), ("zeros.jpg", bytes(5000))):
        (tmp_path / name).write_bytes(data)
        refused(tmp_path / name, "cannot read the picture .*no picture, or a damaged one")
    picture().save(tmp_path / "a.eps")
    refused(tmp_path / "a.eps", "no picture, or a damaged one")
    os.mkfifo(tmp_path / "pipe.png")
    refused(tmp_path / "pipe.png", "there is no picture at", FileNotFoundError)  # and does not wait for one


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_truncated_and_corrupt(tmp_path, form):
    path = tmp_path / f"a.{form.lower()}"
    picture(64, 48).save(path, form)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])
    refused(path, "damaged one")
    rng = random.Random(form)
    for _ in range(30):  # whatever the damage: a picture, or one line
        broken = bytearray(data)
        for _ in range(8):
            broken[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(broken)
        try:
            assert load_image(path).mode == "RGB"
        except (OSError, ValueError) as e:
            assert str(path) in str(e) and "\n" not in str(e)


def header_only(path, width, height):
    """A PNG that says how large it is and holds nothing."""
    chunk = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    ihdr = struct.pack(">I", 13) + b"IHDR" + chunk + struct.pack(">I", zlib.crc32(b"IHDR" + chunk))
    data = zlib.compress(bytes(100))
    idat = struct.pack(">I", len(data)) + b"IDAT" + data + struct.pack(">I", zlib.crc32(b"IDAT" + data))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + ihdr + idat)


@pytest.mark.parametrize("size", [(10_000, 10_000), (30_000, 30_000), (2**30, 2**30)])
def test_too_large(tmp_path, size):
    header_only(tmp_path / "a.png", *size)
    refused(tmp_path / "a.png", f"more than {MAX_PIXELS // 10**6} megapixels; make it smaller", ValueError)


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (7, 7), (8, 300)])
def test_too_small(tmp_path, size):
    Image.new("RGB", size).save(tmp_path / "a.png")
    refused(tmp_path / "a.png", f"it is {size[0]} x {size[1]}; give at least 8 pixels a side", ValueError)


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "TIFF"])
def test_animated(tmp_path, form):
    path = tmp_path / f"a.{form.lower()}"
    picture().save(path, form, save_all=True, append_images=[picture(seed=1), picture(seed=2)])
    refused(path, r"it is animated \(3 frames\); save one frame as PNG", ValueError)
    picture().save(path, form, save_all=True)
    assert load_image(path).size == (16, 12)


def test_pictures_with_their_thumbnail(tmp_path):
    picture(64, 48).save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[picture(16, 12)])
    assert load_image(tmp_path / "a.jpg").size == (64, 48)


def test_cmyk(tmp_path):
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=100)
    assert np.abs(np.asarray(load_image(tmp_path / "a.jpg"), int) - RED).max() <= 3


def test_sixteen_bits(tmp_path):
    values = np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16)
    for name in ("a.png", "a.tiff"):
        Image.fromarray(values).save(tmp_path / name)
        found = np.asarray(load_image(tmp_path / name))
        assert (found[..., 0] == found[..., 2]).all()
        assert np.abs(found[..., 1] - values / 257).max() <= 0.51
    Image.fromarray(values.astype(np.int32) * 1000).save(tmp_path / "b.tiff")
    refused(tmp_path / "b.tiff", "cannot use the picture .*: its pixels are 32-bit numbers; save it as PNG", ValueError)
    Image.fromarray(values.astype(np.float32)).save(tmp_path / "c.tiff")
    refused(tmp_path / "c.tiff", "floating-point numbers", ValueError)


def test_transparency_is_white(tmp_path):
    rgba = np.zeros((16, 16, 4), np.uint8)
    rgba[:, :8] = (*RED, 255)
    rgba[:, 8:] = (0, 0, 255, 0)  # what hides under full transparency is not to be seen
    Image.fromarray(rgba).save(tmp_path / "rgba.png")
    p = Image.fromarray(np.repeat(np.array([[0, 1]], np.uint8), 16, 0).repeat(8, 1), "P")
    p.putpalette([*RED, 0, 0, 255])
    p.save(tmp_path / "p.png", transparency=1)
    p.save(tmp_path / "p.gif", transparency=1)
    grey = Image.new("LA", (16, 16), (0, 0))
    grey.save(tmp_path / "la.png")
    for name in ("rgba.png", "p.png", "p.gif"):
        found = np.asarray(load_image(tmp_path / name))
        assert (found[:, :8] == RED).all() and (found[:, 8:] == WHITE).all(), name
    assert (np.asarray(load_image(tmp_path / "la.png")) == 255).all()
    half = Image.new("RGBA", (16, 16), (255, 0, 0, 128))
    assert as_rgb(half).getpixel((0, 0)) == pytest.approx((255, 127, 127), abs=1)


def test_turned_as_its_exif_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored on its side
    picture().save(tmp_path / "a.png", exif=exif)
    assert load_image(tmp_path / "a.png").tobytes() == picture().rotate(-90, expand=True).tobytes()


@pytest.mark.parametrize("mode", ["1", "L", "P", "YCbCr", "HSV"])
def test_other_modes(mode):
    assert as_rgb(picture().convert(mode)).mode == "RGB"


def test_arrays_and_tensors():
    plain = picture()
    a = np.asarray(plain)
    t = torch.from_numpy(a.copy())
    for given in (
        a, a / 255.0, (a / 255.0).astype(np.float32), a.transpose(2, 0, 1), t, t.permute(2, 0, 1), t.float() / 255,
        (t.permute(2, 0, 1).float() / 255).requires_grad_(), np.dstack([a, np.full(a.shape[:2], 255, np.uint8)]),
    ):  # fmt: skip
        assert as_rgb(given).tobytes() == plain.tobytes()
    assert as_rgb(a[..., 0]).tobytes() == as_rgb(a[..., :1]).tobytes() == as_rgb(a[None, ..., 0]).tobytes()
    assert as_rgb(t.to(torch.bfloat16) / 255).size == plain.size
    for wrong, kind, match in (
        ("a.png", TypeError, "a picture is str 'a.png'"), (None, TypeError, "NoneType"), (a.astype(int), TypeError, "int64"),
        (a[None], TypeError, r"shape \(1, 12, 16, 3\)"), (a.astype(float), ValueError, "floats from 0 to 255; give 0 to 1"),
        (a / 127.5 - 1, ValueError, "from -1 to 1"), (np.full((8, 8, 3), np.nan), ValueError, "nan"),
        (np.zeros((12, 16, 2), np.uint8), TypeError, "1, 3 or 4 channels"),
    ):  # fmt: skip
        with pytest.raises(kind, match=match):
            as_rgb(wrong)


def test_pixels():
    images = reference.pictures(30, sizes=[(w, h) for w in (57, 90) for h in (58, 63, 101, 77, 99, 111)])
    stock = transformers.CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    wanted = stock(images=images, return_tensors="pt")["pixel_values"]
    assert torch.equal(crop_pixels(images, 56, math.floor), wanted)
    assert torch.allclose(crop_pixels(images, 56), torch.stack([reference.cropped(i, 56) for i in images]), atol=1e-6)
    assert torch.allclose(pad_pixels(images, 56), torch.stack([reference.letterboxed(i, 56) for i in images]), atol=1e-5)
    wide = pad_pixels([Image.new("RGB", (56, 20), "white")], 56)  # nothing to resize, and still square
    assert wide.shape == (1, 3, 56, 56)
    assert (wide[0, 0, 18:38] > 0).all() and (wide[0, 0, :18] < 0).all() and (wide[0, 0, 38:] < 0).all()

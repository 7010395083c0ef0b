"""How files become pixels: kinds of images, rotation, broken files, the centre crop."""

import struct

import numpy as np
import pytest
from conftest import picture
from PIL import Image, ImageOps

from ddt.data.reading import ORIENTATION, center_crop, read_header, read_image
from ddt.errors import UserError


def rotation(orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return exif


def test_every_kind_of_file_is_read_as_rgb_of_eight_bits(tmp_path):
    """Grey, palette, CMYK, transparent, 16-bit, rotated: the pixels that ADM's reader gives."""
    colour = picture(0, 8, 8)
    grey = colour.convert("L")
    deep = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1024
    upper = Image.fromarray((deep >> 8).astype(np.uint8)).convert("RGB")
    palette = colour.convert("P")
    kinds = {
        "grey.png": (grey, {}, grey.convert("RGB")),
        "palette.png": (palette, {}, palette.convert("RGB")),
        "alpha.png": (colour.convert("RGBA"), {}, colour),
        "see_through.png": (palette, {"transparency": bytes(range(200))}, palette.convert("RGB")),
        "deep.png": (Image.fromarray(deep), {}, upper),
        "deep.tif": (Image.fromarray(deep), {}, upper),
        "deep.pgm": (Image.fromarray(deep.astype(np.int32)), {}, upper),
        "rotated.png": (colour, {"exif": rotation(6)}, colour),
    }
    for name, (image, options, expected) in kinds.items():
        image.save(tmp_path / name, **options)
        actual = read_image(tmp_path / name)
        assert actual.mode == "RGB"
        assert np.array_equal(np.asarray(actual), np.asarray(expected)), name
    colour.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100)
    with Image.open(tmp_path / "cmyk.jpg") as stored:
        assert np.array_equal(np.asarray(read_image(tmp_path / "cmyk.jpg")), np.asarray(stored.convert("RGB")))


def test_twelve_bits_are_scaled_to_eight(tmp_path):
    """A TIFF of packed 12-bit samples, as of a microscope; Pillow writes none."""
    values = [(64 * k, 64 * k + 32) for k in range(32)]  # 0..4064, two samples in three bytes
    data = b"".join(bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255]) for a, b in values)
    tags = {256: 8, 257: 8, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: 8, 279: len(data)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    head, end = struct.pack("<2sHI", b"II", 42, 8 + len(data)), bytes(4)
    (tmp_path / "x.tif").write_bytes(head + data + struct.pack("<H", len(tags)) + entries + end)
    pixels = np.asarray(read_image(tmp_path / "x.tif"))[..., 0].ravel()
    assert pixels.tolist() == [sample >> 4 for pair in values for sample in pair]


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
def test_an_exif_rotation_is_applied_on_request_alone(tmp_path, suffix):
    for orientation in range(1, 9):
        path = tmp_path / f"{orientation}{suffix}"
        picture(5, 24, 16).save(path, exif=rotation(orientation))
        assert read_header(path).rotated == (orientation > 1)
        with Image.open(path) as stored:
            plain, turned = stored.convert("RGB"), ImageOps.exif_transpose(stored).convert("RGB")
        assert np.array_equal(np.asarray(read_image(path)), np.asarray(plain))
        applied = read_image(path, exif="apply")
        assert np.array_equal(np.asarray(applied), np.asarray(turned))
        assert applied.size == ((16, 24) if orientation > 4 else (24, 16))


def test_a_damaged_exif_block_costs_no_image(tmp_path):
    picture(5, 24, 16).save(tmp_path / "x.webp", exif=rotation(6), lossless=True)
    content = (tmp_path / "x.webp").read_bytes()
    (tmp_path / "x.webp").write_bytes(content.replace(b"MM\0*", b"\0\0\0\0").replace(b"II*\0", b"\0\0\0\0"))
    assert not read_header(tmp_path / "x.webp").rotated
    assert read_image(tmp_path / "x.webp", exif="apply").size == (24, 16)


@pytest.mark.parametrize("content", ["cut", "text", "nothing"])
def test_a_broken_file_is_named_and_never_half_read(tmp_path, content):
    picture(0, 300, 200).save(tmp_path / "x.jpg")
    data = (tmp_path / "x.jpg").read_bytes()
    (tmp_path / "x.jpg").write_bytes({"cut": data[: len(data) // 2], "text": b"no picture", "nothing": b""}[content])
    with pytest.raises(UserError, match=r"x\.jpg: not a readable image .*; replace or remove it"):
        read_image(tmp_path / "x.jpg")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "AVIF", "BMP", "TIFF", "PPM"])
def test_any_damage_is_an_image_or_a_user_error(tmp_path, kind):
    path, rng, told = tmp_path / "x", np.random.default_rng(0), []
    picture(1).save(path, format=kind)
    data = np.frombuffer(path.read_bytes(), np.uint8)
    for _ in range(60):
        damaged = data[: rng.integers(1, len(data) + 1)].copy()
        damaged[rng.integers(0, min(len(damaged), 200), 4)] = rng.integers(0, 256, 4)
        path.write_bytes(damaged.tobytes())
        try:
            read_header(path)
            assert read_image(path, exif="apply").mode == "RGB"
        except UserError as error:
            told.append(str(error))
    assert told
    assert all(line.startswith(f"{path}: ") and "\n" not in line for line in told)


def test_a_picture_that_cannot_be_used_is_named(tmp_path):
    picture(0, 1, 101).save(tmp_path / "x.png")
    with pytest.raises(UserError, match=r"x\.png: is 1×101, too elongated to crop"):
        read_image(tmp_path / "x.png")
    Image.fromarray(np.ones((8, 8), np.float32)).save(tmp_path / "x.tif")
    with pytest.raises(UserError, match=r"x\.tif: has 32-bit pixels; convert it to 8 bits"):
        read_header(tmp_path / "x.tif")


@pytest.mark.parametrize("size", [(8, 8), (9, 31), (37, 16), (100, 75), (17, 16)])
def test_center_crop_follows_adm(size):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    actual = np.asarray(center_crop(image, 8))
    expected = image
    while min(*expected.size) >= 2 * 8:
        expected = expected.resize(tuple(x // 2 for x in expected.size), resample=Image.Resampling.BOX)
    scale = 8 / min(*expected.size)
    expected = np.asarray(
        expected.resize(tuple(round(x * scale) for x in expected.size), resample=Image.Resampling.BICUBIC)
    )
    top, left = (expected.shape[0] - 8) // 2, (expected.shape[1] - 8) // 2
    assert np.array_equal(actual, expected[top : top + 8, left : left + 8])

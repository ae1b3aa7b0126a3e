"""Pictures: what is decoded, what is refused, and what the refusals say."""

from __future__ import annotations

import io
import struct
import threading
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from perl_vlm.data import images
from perl_vlm.data.images import (
    ImageBytes,
    ImageFile,
    ShuffledImage,
    ZipMember,
    as_image_source,
    content_key,
    to_png_bytes,
)
from perl_vlm.errors import BadRecord
from perl_vlm.types import ImageSource

RED, BLUE = (255, 0, 0), (0, 0, 255)


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def half_red_half_blue() -> Image.Image:
    """Red above blue, 32 wide and 64 high."""
    image = Image.new("RGB", (32, 64), RED)
    image.paste(BLUE, (0, 32, 32, 64))
    return image


def png_header(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header claims any size."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF"])
def test_every_allowed_format_loads_as_rgb(kind: str) -> None:
    loaded = ImageBytes(encode(half_red_half_blue(), kind), "x").load()
    assert (loaded.mode, loaded.size) == ("RGB", (32, 64))
    red, _, blue = loaded.getpixel((16, 4))
    assert red > 240
    assert blue < 15


@pytest.mark.parametrize("kind", ["TIFF", "ICO", "PPM", "PDF"])
def test_other_formats_are_refused(kind: str) -> None:
    with pytest.raises(BadRecord, match="not a picture in a format read here") as caught:
        ImageBytes(encode(half_red_half_blue(), kind), "row 7").load()
    assert caught.value.origin == "row 7"
    assert "PNG" in caught.value.remedy


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF"])
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_truncated_pictures_are_refused(kind: str, share: float) -> None:
    noise = Image.effect_noise((96, 96), 90).convert("RGB")
    data = encode(noise, kind)
    with pytest.raises(BadRecord):
        ImageBytes(data[: int(len(data) * share)], "cut").load()


def test_arbitrary_bytes_behind_a_valid_start_raise_nothing_else() -> None:
    for kind in ("PNG", "JPEG", "WEBP", "BMP", "GIF"):
        data = encode(half_red_half_blue(), kind)
        for position in range(0, len(data), max(1, len(data) // 60)):
            broken = bytearray(data)
            broken[position] ^= 0xFF
            try:
                loaded = ImageBytes(bytes(broken), "broken").load()
            except BadRecord:
                continue
            assert loaded.mode == "RGB"


@pytest.mark.parametrize(("width", "height"), [(60_000, 60_000), (10_000, 9_500), (8_000, 7_000)])
def test_a_header_of_too_many_pixels_is_refused_before_decoding(width: int, height: int) -> None:
    # Beyond Pillow's error, between its warning and its error, and below its warning: all are above our own limit.
    with pytest.raises(BadRecord, match=r"50,000,000"):
        ImageBytes(png_header(width, height), "bomb").load()


def test_the_pixel_limit_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(Image.new("RGB", (100, 10)))
    monkeypatch.setattr(images, "MAX_PIXELS", 1000)
    assert ImageBytes(data, "x").load().size == (100, 10)
    monkeypatch.setattr(images, "MAX_PIXELS", 999)
    with pytest.raises(BadRecord, match="100 x 10 = 1,000 pixels"):
        ImageBytes(data, "x").load()


def test_zero_sized_pictures_are_refused() -> None:
    with pytest.raises(BadRecord):
        ImageBytes(png_header(0, 5), "x").load()
    with pytest.raises(BadRecord, match="0 x 5"):
        as_image_source(Image.new("RGB", (0, 5)), root=None, origin="row 1")


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_animated_pictures_are_refused(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in (RED, BLUE)]
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:])
    with pytest.raises(BadRecord, match=r"animated \(2 frames\)"):
        ImageBytes(data, "film").load()


def test_a_phone_photo_with_a_second_picture_loads_its_first() -> None:
    data = encode(Image.new("RGB", (8, 8), RED), "MPO", save_all=True, append_images=[Image.new("RGB", (8, 8), BLUE)])
    red, _, blue = ImageBytes(data, "photo").load().getpixel((4, 4))
    assert red > 240 > blue


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.new("RGB", (32, 16), "white")
    stored.putpixel((0, 0), RED)
    stored.putpixel((31, 0), BLUE)
    # Where EXIF 2.32 puts the stored top left and top right corners in the picture that is meant.
    width, height = (32, 16) if orientation <= 4 else (16, 32)
    corners = {"tl": (0, 0), "tr": (width - 1, 0), "bl": (0, height - 1), "br": (width - 1, height - 1)}
    where = {1: "tl tr", 2: "tr tl", 3: "br bl", 4: "bl br", 5: "tl bl", 6: "tr br", 7: "br tr", 8: "bl tl"}
    red, blue = where[orientation].split()
    shown = ImageBytes(encode(stored, exif=exif), "x").load()
    assert shown.size == (width, height)
    assert shown.getpixel(corners[red]) == RED
    assert shown.getpixel(corners[blue]) == BLUE
    assert not shown.getexif()


def test_a_broken_exif_block_leaves_the_picture_as_stored() -> None:
    data = encode(half_red_half_blue(), "JPEG", exif=b"Exif\0\0nonsense of no meaning")
    assert ImageBytes(data, "x").load().size == (32, 64)


def test_transparency_is_laid_on_white() -> None:
    layer = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    layer.putpixel((1, 0), (0, 0, 0, 255))
    shown = ImageBytes(encode(layer), "x").load()
    assert [shown.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (0, 0, 0)]
    palette = Image.new("P", (1, 1), 0)
    palette.putpalette([0, 0, 0])
    assert ImageBytes(encode(palette, transparency=0), "x").load().getpixel((0, 0)) == (255, 255, 255)
    assert to_png_bytes(layer) == encode(shown)


def test_sixteen_bit_grey_keeps_its_shades() -> None:
    deep = Image.new("I;16", (2, 1))
    deep.putpixel((0, 0), 0x4000)
    deep.putpixel((1, 0), 0xFFFF)
    shown = ImageBytes(encode(deep), "x").load()
    assert [shown.getpixel((x, 0)) for x in (0, 1)] == [(64, 64, 64), (255, 255, 255)]


def test_a_file_under_its_root_loads(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    half_red_half_blue().save(tmp_path / "in" / "a.png")
    source = as_image_source("in/a.png", root=tmp_path, origin="row 1")
    assert source == ImageFile("in/a.png", tmp_path)
    assert isinstance(source, ImageSource)
    assert source.load().size == (32, 64)
    assert ImageFile(tmp_path / "in" / "a.png").load().size == (32, 64)


def test_nothing_outside_the_root_is_opened(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    half_red_half_blue().save(tmp_path / "secret.png")
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    for path in ("../secret.png", str(tmp_path / "secret.png"), "link.png", "x/../../secret.png"):
        with pytest.raises(BadRecord, match="outside the image folder"):
            as_image_source(path, root=root, origin="row 3")
        with pytest.raises(BadRecord, match="outside the image folder"):
            ImageFile(path, root).load()


def test_a_sibling_folder_with_the_same_beginning_is_outside(tmp_path: Path) -> None:
    for name in ("root", "root2"):
        (tmp_path / name).mkdir()
        half_red_half_blue().save(tmp_path / name / "a.png")
    with pytest.raises(BadRecord, match="outside"):
        as_image_source("../root2/a.png", root=tmp_path / "root", origin="row 3")


@pytest.mark.parametrize(
    "url", ["http://host/a.png", "https://host/a.png", "file:///a.png", "s3://b/a.png", "data:image/png;base64,aaaa"]
)
def test_urls_are_refused(url: str, tmp_path: Path) -> None:
    for root in (tmp_path, None):
        with pytest.raises(BadRecord, match=r"URL.*nothing is fetched"):
            as_image_source(url, root=root, origin="row 3")
    with pytest.raises(BadRecord, match="URL"):
        ImageFile(url, tmp_path).load()


@pytest.mark.parametrize("path", ["missing.png", ".", "a\0b.png", "x" * 5000, "  "])
def test_unusable_paths_name_the_row(path: str, tmp_path: Path) -> None:
    with pytest.raises(BadRecord) as caught:
        as_image_source(path, root=tmp_path, origin="train.jsonl row 4")
    assert caught.value.origin == "train.jsonl row 4"


def test_a_path_needs_a_root() -> None:
    with pytest.raises(BadRecord, match=r"--task.image_root"):
        as_image_source("a.png", root=None, origin="row 1")


def test_what_rows_hold_becomes_a_source(tmp_path: Path) -> None:
    picture = half_red_half_blue()
    picture.save(tmp_path / "a.png")
    data = encode(picture)
    held = [
        data,
        bytearray(data),
        picture,
        picture.convert("RGBA"),
        Image.open(io.BytesIO(data)),
        {"bytes": data, "path": "whatever.png"},
        {"bytes": None, "path": "a.png"},
        "a.png",
        tmp_path / "a.png",
        ImageBytes(data, "x"),
    ]
    for value in held:
        source = as_image_source(value, root=tmp_path, origin="row 1")
        assert source.load().tobytes() == picture.tobytes(), value
        hash(source)


@pytest.mark.parametrize("value", [None, 3, ["a.png"], {}, {"bytes": None, "path": None}, {"bytes": 3}, object()])
def test_what_is_no_picture_is_refused(value: object, tmp_path: Path) -> None:
    with pytest.raises(BadRecord, match="row 9"):
        as_image_source(value, root=tmp_path, origin="row 9")


def test_zip_members_are_read_in_memory(tmp_path: Path) -> None:
    archive = tmp_path / "a.zip"
    with zipfile.ZipFile(archive, "w") as writer:
        writer.writestr("../evil.png", encode(half_red_half_blue()))
        writer.writestr("bad.png", b"no picture")
    before = sorted(tmp_path.rglob("*"))
    assert ZipMember(archive, "../evil.png").load().size == (32, 64)
    assert sorted(tmp_path.rglob("*")) == before
    assert not (tmp_path.parent / "evil.png").exists()
    with pytest.raises(BadRecord, match=r"a\.zip:none\.png: the archive has no such member"):
        ZipMember(archive, "none.png").load()
    with pytest.raises(BadRecord, match=r"a\.zip:bad\.png: not a picture"):
        ZipMember(archive, "bad.png").load()


def test_a_rewritten_or_broken_archive_is_noticed(tmp_path: Path) -> None:
    archive = tmp_path / "a.zip"
    for color in (RED, BLUE):
        with zipfile.ZipFile(archive, "w") as writer:
            writer.writestr("a.png", encode(Image.new("RGB", (8 if color == RED else 64, 8), color)))
        assert ZipMember(archive, "a.png").load().getpixel((0, 0)) == color
    archive.write_bytes(archive.read_bytes()[:30])
    with pytest.raises(BadRecord, match="archive cannot be read"):
        ZipMember(archive, "a.png").load()
    with pytest.raises(BadRecord, match="archive cannot be read"):
        ZipMember(tmp_path / "none.zip", "a.png").load()


def test_a_member_that_unpacks_to_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as writer:
        writer.writestr("a.png", b"\0" * 5000)
    monkeypatch.setattr(images, "MAX_BYTES", 4999)
    with pytest.raises(BadRecord, match="unpacks to 5000 bytes"):
        ZipMember(tmp_path / "a.zip", "a.png").load()


def test_one_picture_has_one_key_wherever_it_stands(tmp_path: Path) -> None:
    red, blue = (encode(Image.new("RGB", (4, 4), color)) for color in (RED, BLUE))
    assert content_key(ImageBytes(red, "train row 1")) == content_key(ImageBytes(red, "test row 9"))
    assert content_key(ImageBytes(red, "row 1")) != content_key(ImageBytes(blue, "row 1"))
    named = {content_key(ImageFile(path, tmp_path)) for path in ("a.png", "./a.png", "b/../a.png")}
    named.add(content_key(ImageFile(tmp_path / "a.png", origin="row 3")))
    assert len(named) == 1, "a file is known by its place, and is not read"
    assert content_key(ImageFile("b.png", tmp_path)) not in named
    members = {content_key(ZipMember(tmp_path / "x.zip", name, origin)) for name in "ab" for origin in ("", "row 1")}
    assert len(members) == 2


def test_a_source_of_somebody_elses_has_a_key_too() -> None:
    @dataclass(frozen=True)
    class Drawn:
        shade: int

        def load(self) -> Image.Image:
            raise AssertionError("nothing is to be drawn")

    @dataclass
    class Listed:
        shades: list[int]

        def load(self) -> Image.Image:
            return Image.new("RGB", (2, 2), tuple(self.shades))

    assert content_key(Drawn(1)) == content_key(Drawn(1)) != content_key(Drawn(2))
    assert content_key(Listed([1, 2, 3])) == content_key(Listed([1, 2, 3])) != content_key(Listed([3, 2, 1]))


def test_threads_read_one_archive(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as writer:
        for number in range(20):
            writer.writestr(f"{number}.png", encode(Image.new("RGB", (4, 4), (number, 0, 0))))
    seen: dict[int, int] = {}

    def read(number: int) -> None:
        seen[number] = ZipMember(tmp_path / "a.zip", f"{number}.png").load().getpixel((0, 0))[0]

    threads = [threading.Thread(target=read, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {number: number for number in range(20)}


def test_what_a_file_holds_is_not_told(tmp_path: Path) -> None:
    """A path in somebody's data set may name a login token; an error message may end up in a public issue."""
    (tmp_path / "token").write_text("hf_canary")
    for source in (ImageFile("token", tmp_path), ImageBytes(b"hf_canary", "x")):
        with pytest.raises(BadRecord, match="not a picture in a format read here") as caught:
            source.load()
        assert "hf_" not in str(caught.value)


def test_a_shuffled_picture_keeps_its_pixels_and_loses_their_arrangement() -> None:
    @dataclass(frozen=True)
    class Ramp:
        def load(self) -> Image.Image:
            return Image.fromarray(np.arange(43 * 41 * 3, dtype=np.uint32).astype(np.uint8).reshape(41, 43, 3))

    before, after = (np.asarray(source.load()) for source in (Ramp(), ShuffledImage(Ramp())))
    assert after.shape == before.shape
    assert (after != before).any()
    assert np.array_equal(np.sort(after.reshape(-1, 3), axis=0), np.sort(before.reshape(-1, 3), axis=0))
    assert np.array_equal(after, np.asarray(ShuffledImage(Ramp()).load()))

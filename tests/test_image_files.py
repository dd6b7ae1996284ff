"""Every kind of image file, and files that mean harm."""
import io
import os
import runpy
import struct
import subprocess
import sys
import zlib

import numpy as np
import PIL
import pytest
from conftest import ROOT
from picture_files import COLOURED, INDICES, PALETTE, bmp, chunk, gif, jpeg, picture, png
from PIL import Image, ImageFile, ImageOps

from sources import image_files

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")  # pytest undoes ours
# The pixels that a file holds, given the upright ones, under each orientation of EXIF 2.32, 4.6.4 A.
STORED = {1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
          5: lambda a: a.transpose(1, 0, 2), 6: lambda a: np.rot90(a), 7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
          8: lambda a: np.rot90(a, -1)}


def saved(image, kind, **options):
    """The content of a file that Pillow writes of an array or an image of its own."""
    file = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(np.ascontiguousarray(image))
    image.save(file, kind, **options)
    return file.getvalue()


def difference(a, b):
    return np.abs(np.asarray(a, int) - b).max()


def test_lossless_formats():
    image = picture(6, 9)
    np.testing.assert_array_equal(image_files.decode(png(list(image.reshape(6, -1)))), image)
    np.testing.assert_array_equal(image_files.decode(bmp(image)), image)
    four_channels = np.dstack([image, np.zeros((6, 9), np.uint8)])
    np.testing.assert_array_equal(image_files.decode(bmp(four_channels)), image)
    np.testing.assert_array_equal(image_files.decode(bmp(INDICES, PALETTE)), COLOURED)
    np.testing.assert_array_equal(image_files.decode(gif([INDICES], PALETTE)), COLOURED)
    np.testing.assert_array_equal(image_files.decode(gif([INDICES], PALETTE, local=True)), COLOURED)
    table = chunk(b"PLTE", bytes(np.array(PALETTE, np.uint8)))
    np.testing.assert_array_equal(image_files.decode(png(list(INDICES), 8, 3, before=table)), COLOURED)
    for kind, options in (("PNG", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}), ("WEBP", {"lossless": True})):
        if kind in image_files.FORMATS:
            np.testing.assert_array_equal(image_files.decode(saved(image, kind, **options)), image)


def test_of_16_bits_the_upper_8():
    deep = np.random.RandomState(0).randint(0, 1 << 16, (6, 9, 3)).astype(">u2")
    rows = [row.tobytes() for row in deep]
    np.testing.assert_array_equal(image_files.decode(png(rows, 16, size=(9, 6))), deep >> 8)
    grey = np.repeat(deep[..., :1] >> 8, 3, 2)
    rows = [row.tobytes() for row in deep[..., 0]]
    np.testing.assert_array_equal(image_files.decode(png(rows, 16, 0, size=(9, 6))), grey)
    np.testing.assert_array_equal(image_files.decode(saved(deep[..., 0].astype(np.uint16), "TIFF")), grey)
    alpha = [row.tobytes() for row in np.dstack([deep, np.full((6, 9), 65535)]).astype(">u2")]
    np.testing.assert_array_equal(image_files.decode(png(alpha, 16, 6, size=(9, 6))), deep >> 8)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP", "AVIF"])
def test_photographs_stand_upright(kind):
    if kind not in image_files.FORMATS:
        pytest.skip("this Pillow is not to read it")
    upright = picture(40, 64)
    upright[:12, :20] = 255
    for orientation, stored in STORED.items():
        exif = Image.Exif()
        exif[image_files.ORIENTATION] = orientation
        got = image_files.decode(saved(stored(upright), kind, quality=98, exif=exif))
        assert got.shape == upright.shape and np.abs(got.astype(int) - upright).mean() < 3, orientation


def test_a_turn_is_read_from_an_odd_note_and_not_from_a_damaged_one():
    image = picture(40, 64)
    exif = Image.Exif()
    exif[image_files.ORIENTATION], exif[0x011a] = 3, 72.0
    note = exif.tobytes()
    odd = note.replace(b"\x01\x1a\x00\x05", b"\x01\x1a\x00\x02")  # a resolution that is text
    assert odd != note
    with pytest.raises(TypeError):
        ImageOps.exif_transpose(Image.open(io.BytesIO(saved(image, "JPEG", exif=odd))))
    for content, expected in ((note, image[::-1, ::-1]), (odd, image[::-1, ::-1]), (note[:20], image), (b"Exif\0\0?", image)):
        assert difference(image_files.decode(saved(image, "JPEG", quality=98, exif=content)), expected) <= 6


def test_kinds_of_jpeg():
    image = picture(48, 64)
    assert difference(image_files.decode(saved(image, "JPEG", quality=98, progressive=True)), image) <= 6
    cmyk = Image.merge("CMYK", [Image.fromarray(255 - image[..., i]) for i in range(3)] + [Image.new("L", (64, 48))])
    assert difference(image_files.decode(saved(cmyk, "JPEG", quality=98)), image) <= 6


def test_grey_becomes_rgb():
    grey = picture(6, 9)[..., 0]
    expected = np.repeat(grey[..., None], 3, 2)
    np.testing.assert_array_equal(image_files.decode(png(list(grey), 8, 0)), expected)
    np.testing.assert_array_equal(image_files.decode(bmp(grey, [(i, i, i) for i in range(256)])), expected)
    bits = image_files.decode(png([b"\xa0", b"\x50"], 1, 0, size=(4, 2)))
    np.testing.assert_array_equal(bits[..., 0], [[255, 0, 255, 0], [0, 255, 0, 255]])
    assert np.abs(image_files.decode(jpeg(grey[..., None])).astype(int) - expected).max() <= 2


def test_what_is_transparent_is_white():
    image, alpha = picture(2, 4), np.array([[0, 64, 128, 255]] * 2, np.uint8)
    expected = (image * (alpha / 255.0)[..., None] + 255 - alpha[..., None]).round()
    rgba = np.dstack([image, alpha])
    assert np.abs(image_files.decode(png(list(rgba.reshape(2, -1)), 8, 6)) - expected).max() <= 1
    grey = np.dstack([image[..., 0], alpha])
    assert np.abs(image_files.decode(png(list(grey.reshape(2, -1)), 8, 4)) - expected[..., :1]).max() <= 1
    chunks = chunk(b"PLTE", bytes(np.array(PALETTE, np.uint8))) + chunk(b"tRNS", b"\xff\0")
    expected = COLOURED.copy()
    expected[INDICES == 1] = 255
    np.testing.assert_array_equal(image_files.decode(png(list(INDICES), 8, 3, before=chunks)), expected)
    for local in (False, True):
        np.testing.assert_array_equal(image_files.decode(gif([INDICES], PALETTE, 1, local)), expected)
    rgba = np.dstack([COLOURED, np.where(INDICES == 1, 0, 255).astype(np.uint8)])
    for kind, options in (("TIFF", {}), ("WEBP", {"lossless": True})):
        if kind in image_files.FORMATS:
            np.testing.assert_array_equal(image_files.decode(saved(rgba, kind, **options)), expected)


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_a_transparent_colour_is_white_at_any_depth(bits):
    values = np.arange(16) % 2 ** bits * (1 if bits < 16 else 4000)
    packed = {1: lambda v: np.packbits(v.astype(np.uint8)), 2: lambda v: v[::4] << 6 | v[1::4] << 4 | v[2::4] << 2 | v[3::4],
              4: lambda v: v[::2] << 4 | v[1::2], 8: lambda v: v, 16: lambda v: v.astype(">u2").view(np.uint8)}[bits]
    row = packed(values).astype(np.uint8).tobytes()
    for key in set(values.tolist()):
        expected = np.where(values == key, 255, values >> 8 if bits == 16 else values * 255 // (2 ** bits - 1))
        got = image_files.decode(png([row], bits, 0, size=(16, 1), before=chunk(b"tRNS", struct.pack(">H", key))))
        np.testing.assert_array_equal(got, np.repeat(expected[None, :, None], 3, 2))
    if bits >= 8:
        colours = np.array([[1, 2, 3], [200, 100, 50]]) * (1 if bits == 8 else 257)
        row = colours.astype(">u%d" % (bits // 8)).tobytes()
        key = chunk(b"tRNS", colours[1].astype(">u2").tobytes())
        np.testing.assert_array_equal(image_files.decode(png([row], bits, 2, size=(2, 1), before=key)), [[[1, 2, 3], [255] * 3]])


def test_of_a_moving_gif_the_first_frame():
    frames = [INDICES, (INDICES + 1) % 4, (INDICES + 2) % 4]
    np.testing.assert_array_equal(image_files.decode(gif(frames, PALETTE)), COLOURED)
    for screen in ((100, 100), (1, 1)):  # what the screen claims does not matter
        np.testing.assert_array_equal(image_files.decode(gif(frames, PALETTE, screen=screen)), COLOURED)
    cut = gif(frames, PALETTE)[:len(gif(frames[:1], PALETTE)) + 9]
    np.testing.assert_array_equal(image_files.decode(cut), COLOURED)  # later frames are not looked at
    for kind in {"PNG", "WEBP", "TIFF"} & set(image_files.FORMATS):
        options = {} if kind == "TIFF" else {"lossless": True}
        moving = saved(COLOURED, kind, save_all=True, append_images=[Image.fromarray(255 - COLOURED)], **options)
        np.testing.assert_array_equal(image_files.decode(moving), COLOURED)


def test_large_photographs_are_averaged_and_small_ones_enlarged():
    fine = np.zeros((320, 320, 3), np.uint8)
    fine[::2, ::2] = fine[1::2, 1::2] = 255
    assert np.abs(image_files.square(fine, 32).astype(int) - 128).max() <= 1
    assert np.abs(image_files.square(fine, 31).astype(int) - 128).max() <= 14  # areas that cut through pixels
    wide = np.zeros((40, 100, 3), np.uint8)
    wide[:, :30], wide[:, 30:70], wide[:, 70:] = 50, 100, 150  # only the middle is kept
    assert (image_files.square(wide, 32) == 100).all()
    assert (image_files.square(wide.transpose(1, 0, 2), 8) == 100).all()
    small = image_files.square(picture(8, 8), 32)
    assert small.shape == (32, 32, 3)
    assert np.abs(np.diff(small[:, :, 0].astype(int), axis=1)).max() <= 9  # no steps
    np.testing.assert_array_equal(image_files.square(picture(32, 32), 32), picture(32, 32))


def test_a_jpeg_shrunk_while_decoding_looks_the_same():
    image = picture(1100, 1300)
    data = jpeg(image)
    fast, slow = image_files.decode(data, 32), image_files.decode(data)
    assert slow.shape == (1100, 1300, 3) and fast.shape == (138, 163, 3)
    expected = image_files.square(image, 32).astype(int)
    assert np.abs(image_files.square(slow, 32) - expected).max() <= 2
    assert np.abs(image_files.square(fast, 32) - expected).max() <= 3


def tiff(size, tile, pixels):
    """Grey, in one tile, compressed by deflate."""
    packed = zlib.compress(pixels, 9)
    tags = [(256, size), (257, size), (258, 8), (259, 8), (262, 1), (277, 1), (322, tile), (323, tile), (324, 134), (325, len(packed))]
    return (b"II*\0" + struct.pack("<IH", 8, len(tags)) + b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
            + bytes(4) + packed)


def bombs():
    """Small files that claim to be enormous, with what is said of them besides their pixels."""
    row = [bytes(30)] * 10
    screen = bytearray(gif([INDICES], PALETTE))
    frame = screen.index(b"\x2c" + bytes(4))
    screen[frame + 5:frame + 9] = struct.pack("<HH", 65535, 65535)
    big = bytearray(jpeg(picture(16, 16)))
    start = big.index(b"\xff\xc0")
    big[start + 5:start + 9] = struct.pack(">HH", 8000, 8000)
    return [("PNG", png(row, size=(60000, 60000)), ""), ("PNG, less", png(row, size=(10000, 10000)), ": 10000 x 10000"),
            ("GIF", bytes(screen), ""), ("GIF's screen", gif([INDICES], PALETTE, screen=(65535, 65535)), ""),
            ("JPEG", bytes(big), ": 8000 x 8000"), ("BMP", bmp(picture(4, 4), size=(2 ** 30, 4)), ""),
            ("upside down", bmp(picture(4, 4), size=(8000, -8000)), ": 8000 x 8000"),
            ("PNG, one line", png(row, size=(2 ** 31 - 1, 1)), ""), ("TIFF", tiff(8000, 16, b""), ": 8000 x 8000"),
            ("TIFF's tile", tiff(16, 8000, b""), ": 8000 x 8000")]


@pytest.mark.parametrize("name, data, said", bombs())
def test_a_decompression_bomb_never_reaches_the_decoder(monkeypatch, name, data, said):
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda *_: pytest.fail("decoded"))
    with pytest.raises(image_files.Unusable) as caught:
        image_files.decode(data)
    assert str(caught.value) == "more than 50 million pixels" + said


def test_the_bombs_are_duds_only_by_their_size():
    np.testing.assert_array_equal(image_files.decode(tiff(16, 16, bytes(range(256))))[..., 1].reshape(-1), np.arange(256))


def test_only_formats_that_are_named_are_read(monkeypatch):
    for kind in ("PPM", "ICO", "PCX", "TGA"):
        with pytest.raises(image_files.Unusable, match="not a readable JPEG, PNG, GIF, BMP"):
            image_files.decode(saved(picture(16, 16), kind))
    for version, webp, avif in (("9.5.0", False, False), ("10.0.0", False, False), ("10.1.0", True, False), ("11.3.0", True, True)):
        monkeypatch.setattr(PIL, "__version__", version)
        formats = runpy.run_path(image_files.__file__)["FORMATS"]
        assert ("WEBP" in formats, "AVIF" in formats) == (webp, avif)


def test_numbers_that_are_no_shades_are_not_guessed_at():
    for kind in (np.float32, np.int32):
        with pytest.raises(image_files.Unusable, match="no known range"):
            image_files.decode(saved(np.ones((8, 8), kind), "TIFF"))


def test_pillow_and_libjpeg_say_nothing(capfd):
    whole = jpeg(picture(200, 300))
    for content in (whole[:len(whole) // 2], whole[:-2000] + bytes(1000), png([b""] * 0, size=(10000, 9000)),
                    b"II*\0" + bytes(9)):
        try:
            image_files.decode(content)
        except image_files.Unusable:
            pass
    out, error = capfd.readouterr()
    assert (out, error) == ("", "")


def test_many_threads_may_begin_at_once(tmp_path):
    for i, kind in enumerate(image_files.FORMATS * 2):
        (tmp_path / str(i)).write_bytes(saved(picture(64, 64), kind))
    code = """if True:
        import sys, threading
        from concurrent.futures import ThreadPoolExecutor
        from sources import image_files
        begin = threading.Barrier(int(sys.argv[2]))

        def load(number):
            begin.wait()
            return image_files.load("%s/%d" % (sys.argv[1], number), 32).shape

        with ThreadPoolExecutor(int(sys.argv[2])) as pool:
            print(list(pool.map(load, range(int(sys.argv[2])))))
    """
    number = 2 * len(image_files.FORMATS)
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path), str(number)], cwd=ROOT, stdout=subprocess.PIPE, check=True)
    assert done.stdout.decode().strip() == str([(32, 32, 3)] * number)


def test_files_that_are_cut_or_changed_are_damaged_and_nothing_else():
    image = picture(8, 8)
    random = np.random.RandomState(0)
    files = [png(list(image.reshape(8, -1))), jpeg(image), gif([INDICES], PALETTE), bmp(image),
             bmp(INDICES, PALETTE)] + [saved(image, kind) for kind in image_files.FORMATS[4:]]
    refusals = 0
    for data in files:
        changed = [data[:n] for n in range(0, len(data), 1 + len(data) // 40)]
        for place in random.randint(0, len(data), 40):
            changed.append(data[:place] + bytes([random.randint(256)]) + data[place + 1:])
        for content in changed:
            try:
                assert image_files.square(image_files.decode(content), 8).shape == (8, 8, 3)
            except image_files.Unusable as error:
                refusals += 1
                assert any(reason in str(error) for reason in ("damaged", "not a readable", "million pixels"))
    assert refusals > 120
    for content in (b"", b"text", b"BM", b"GIF89a", b"\xff\xd8", b"\xff\xd8" + b"\xff" * 4,
                    b"\x89PNG\r\n\x1a\n", png([b""] * 0, size=(0, 0)), bmp(image, size=(0, 8)),
                    gif([np.zeros((8, 0))], PALETTE, screen=(8, 8))):
        with pytest.raises(image_files.Unusable):
            image_files.decode(content)


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    path = tmp_path / "large.png"
    with open(str(path), "wb") as file:
        file.truncate(image_files.FILE_LIMIT + 1)  # takes no room on the disk
    with pytest.raises(image_files.Unusable, match="larger than 64 MB"):
        image_files.load(str(path), 32)


def test_what_is_no_file_is_not_read(tmp_path):
    os.mkfifo(str(tmp_path / "pipe"))
    (tmp_path / "loop").symlink_to("loop")
    for name, reason in (("pipe", "no regular file"), (".", "no regular file"), ("loop", "cannot be read: Too many levels"),
                         ("gone", "cannot be read: No such file")):
        with pytest.raises(image_files.Unusable, match=reason):
            image_files.load(str(tmp_path / name), 32)

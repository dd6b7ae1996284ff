"""Every kind of image file, and files that mean harm."""
import struct

import numpy as np
import pytest
import tensorflow as tf
from picture_files import COLOURED, INDICES, PALETTE, bmp, chunk, gif, jpeg, picture, png

from sources import image_files


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
    deep = [row.astype(">u2").tobytes() for row in image.reshape(6, -1).astype(np.uint16) * 257]
    np.testing.assert_array_equal(image_files.decode(png(deep, 16, size=(9, 6))), image)


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


def test_of_a_moving_gif_the_first_frame():
    frames = [INDICES, (INDICES + 1) % 4, (INDICES + 2) % 4]
    np.testing.assert_array_equal(image_files.decode(gif(frames, PALETTE)), COLOURED)
    for screen in ((100, 100), (1, 1), (65535, 65535)):  # what the screen claims does not matter
        np.testing.assert_array_equal(image_files.decode(gif(frames, PALETTE, screen=screen)), COLOURED)
    cut = gif(frames, PALETTE)[:len(gif(frames[:1], PALETTE)) + 9]
    np.testing.assert_array_equal(image_files.decode(cut), COLOURED)  # later frames are not looked at


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


def bombs():
    """Small files that claim to be enormous, with what is said of them."""
    row = [bytes(30)] * 10
    screen = bytearray(gif([INDICES], PALETTE))
    frame = screen.index(b"\x2c" + bytes(4))
    screen[frame + 5:frame + 9] = struct.pack("<HH", 65535, 65535)
    big = bytearray(jpeg(picture(16, 16)))
    start = big.index(b"\xff\xc0")
    big[start + 5:start + 9] = struct.pack(">HH", 65500, 65500)
    return [("PNG", png(row, size=(60000, 60000)), "60000 x 60000"), ("GIF", bytes(screen), "65535 x 65535"),
            ("JPEG", bytes(big), "65500 x 65500"),
            ("BMP", bmp(picture(4, 4), size=(2 ** 30, 4)), "1073741824 x 4"),
            ("upside down", bmp(picture(4, 4), size=(60000, -60000)), "60000 x 60000"),
            ("PNG, one line", png(row, size=(2 ** 31 - 1, 1)), "2147483647 x 1")]


@pytest.mark.parametrize("name, data, said", bombs())
def test_a_decompression_bomb_never_reaches_the_decoder(monkeypatch, name, data, said):
    for decoder in ("decode_png", "decode_jpeg", "decode_gif", "decode_bmp", "decode_image"):
        monkeypatch.setattr(tf.io, decoder, lambda *_, **__: pytest.fail("decoded"))
    with pytest.raises(image_files.Unusable, match=said + " pixels, more than 50 million"):
        image_files.decode(data)


def test_of_a_gif_no_more_than_one_frame_reaches_the_decoder(monkeypatch):
    sizes, decode = [], tf.io.decode_gif
    monkeypatch.setattr(tf.io, "decode_gif", lambda data: sizes.append(len(data)) or decode(data))
    for frames in (1, 200):
        image_files.decode(gif([INDICES] * frames, PALETTE))
    assert sizes[0] == sizes[1]


def test_files_that_are_cut_or_changed_are_damaged_and_nothing_else():
    image = picture(8, 8)
    random = np.random.RandomState(0)
    files = [png(list(image.reshape(8, -1))), jpeg(image), gif([INDICES], PALETTE), bmp(image),
             bmp(INDICES, PALETTE)]
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
                assert any(reason in str(error) for reason in ("damaged", "not a PNG", "pixels, more than"))
    assert refusals > 120
    for content in (b"", b"text", b"BM", b"GIF89a", b"\xff\xd8", b"\xff\xd8" + b"\xff" * 4,
                    b"\x89PNG\r\n\x1a\n", png([b""] * 0, size=(0, 0)), bmp(image, size=(0, 8))):
        with pytest.raises(image_files.Unusable):
            image_files.decode(content)


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    path = tmp_path / "large.png"
    with open(str(path), "wb") as file:
        file.truncate(image_files.FILE_LIMIT + 1)  # takes no room on the disk
    with pytest.raises(image_files.Unusable, match="larger than 64 MB"):
        image_files.load(str(path), 32)

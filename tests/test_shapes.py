"""The embedded data set: the outline tells the class, and nothing simpler does."""
import numpy as np
import pytest

from commands import UserError
from sources import shapes


@pytest.fixture(scope="module")
def drawn():
    return shapes.make(3000, (0, 0))


def test_form_and_balance(drawn):
    images, labels = drawn
    assert images.shape == (3000, 32, 32, 3) and images.dtype == np.uint8 and labels.dtype == np.int64
    assert np.bincount(labels).tolist() == [300] * 10 and len(shapes.CLASS_NAMES) == 10
    assert len(set(labels[:100])) == 10  # shuffled
    assert sorted(np.bincount(shapes.make(23, (0, 0))[1], minlength=10)) == [2] * 7 + [3] * 3


def test_the_seed_decides(drawn):
    images, labels = shapes.make(50, (3, 1))
    again, labels_again = shapes.make(50, (3, 1))
    np.testing.assert_array_equal(images, again)
    np.testing.assert_array_equal(labels, labels_again)
    for other in ((3, 0), (4, 1)):
        assert np.abs(shapes.make(50, other)[0].astype(int) - images).mean() > 30


def test_colour_and_contrast_tell_nothing_of_the_class(drawn):
    images, labels = drawn
    pixels = images.reshape(3000, -1, 3) / 255.0
    low, high = np.quantile(pixels, [0.1, 0.9], axis=1)
    features = np.concatenate([pixels.mean(1), pixels.std(1), low, high, np.ones((3000, 1))], 1)
    weights = np.linalg.lstsq(features[:2000], np.eye(10)[labels[:2000]], rcond=None)[0]
    accuracy = np.mean((features[2000:] @ weights).argmax(1) == labels[2000:])
    assert accuracy < 0.15  # chance is 0.1, its standard deviation 0.0095


def test_area_and_place_are_alike_in_all_classes(monkeypatch):
    def black(n, random, size):
        return np.zeros((n, size, size, 3)), np.zeros((n, 3))

    monkeypatch.setattr(shapes, "_background", black)
    images, labels = shapes.make(1000, (0, 0), 64)
    covered = images.max(-1) > 60  # the noise has a standard deviation of 8
    area = np.array([covered[labels == c].mean() for c in range(10)])
    low, high = shapes.SMALLEST_AREA, shapes.LARGEST_AREA
    expected = (high - low) / np.log(high / low)  # the mean of what is uniform in the logarithm
    assert np.abs(area / expected - 1).max() < 0.12  # a colour that is nearly black is not seen here
    edge = np.concatenate([covered[:, 0], covered[:, -1], covered[:, :, 0], covered[:, :, -1]], 1)
    assert edge.mean() < 0.002  # no shape is cut off
    across = np.array([np.mean(np.nonzero(covered[labels == c])[2]) for c in range(10)])
    assert np.abs(across - 31.5).max() < 2.5


@pytest.mark.parametrize("kind, area, radius", [
    ("circle", np.pi, 1), ("ring", 0.64 * np.pi, 1), ("square", 4, 2 ** 0.5), ("bar", 1, 1.0625 ** 0.5),
    ("cross", 2 * 2 * 0.6 - 0.36, 1.09 ** 0.5), ("triangle", 0.866 * 1.5, 1),
    ("corner", 1.6 * 0.55 * 2 - 0.55 ** 2, 0.8 * 2 ** 0.5), ("star", 10 * 0.5 * 0.4 * np.sin(np.pi / 5), 1)])
def test_areas_against_those_worked_out_by_hand(kind, area, radius):
    measured_area, measured_radius = shapes._area_and_radius(kind)
    assert measured_area == pytest.approx(area, rel=0.02)
    assert measured_radius == pytest.approx(radius, abs=0.03)


def test_distances_to_a_square():
    x, y = np.array([0.0, 0.5, 1.0, 3.0, 2.0]), np.array([0.0, 0.0, 0.3, 0.0, 2.0])
    np.testing.assert_allclose(shapes.signed_distance("square", x, y), [-1, -0.5, 0, 2, 2 ** 0.5], atol=1e-12)


def test_other_sizes_and_what_is_refused():
    assert shapes.make(3, (0, 0), 64)[0].shape == (3, 64, 64, 3)
    for number, size in ((0, 32), (-1, 32), (5, 8)):
        with pytest.raises(UserError, match="%d images of %d x" % (number, size)):
            shapes.make(number, (0, 0), size)

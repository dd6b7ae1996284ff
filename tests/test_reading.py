"""How curves are read: of synthetic runs of each kind, and of a real one."""
import numpy as np
import pytest

import reading

EVEN = reading.even_spread(128)
STEPS = np.arange(10, 20001, 10)
# Of a real run: a quarter of the width on CIFAR-10, batch 256, 195 steps an epoch.
REAL = np.array([  # step, loss, spread
    (10, 1.232, 0.0726), (30, 0.890, 0.0721), (50, 0.836, 0.0700), (90, 0.527, 0.0576), (130, 0.335, 0.0481), (190, 0.268, 0.0402),
    (235, 0.192, 0.0390), (295, 0.203, 0.0397), (315, 0.224, 0.0417), (520, 0.274, 0.0475), (725, 0.306, 0.0533), (930, 0.399, 0.0594),
    (1340, 0.414, 0.0624), (1960, 0.453, 0.0641), (2985, 0.384, 0.0647), (4010, 0.432, 0.0672), (5035, 0.433, 0.0682),
    (5860, 0.452, 0.0695)])
REAL_KNN = (0, 1950, 3900, 5850, 7800), (0.3443, 0.3704, 0.4605, 0.5279, 0.5587)


def losses(*points, number=20000):
    """A curve of losses through points (step, loss), with noise."""
    return np.interp(np.arange(1, number + 1), *zip(*points)) * np.random.RandomState(0).uniform(0.95, 1.05, number)


def spreads(*points):
    """The same of the spread at STEPS, in parts of an even one."""
    return np.interp(STEPS, *zip(*points)) * EVEN


def test_even_spread():
    assert reading.even_spread(128) == pytest.approx(0.0884, abs=1e-4) and reading.even_spread(256) == 1 / 16


def test_smoothing():
    assert reading.smooth([1, 2, 4]).tolist() == [1, 2, 4]
    curve = reading.smooth(np.arange(1000.0))
    assert len(curve) == 996 and curve[0] == pytest.approx(2) and curve[-1] == pytest.approx(997)


@pytest.mark.parametrize("values, kind, words", [
    (losses((1, 2), (300, 0.2), (2000, 0.45), (20000, 0.4)), "healthy", "has risen to 0.4"),
    (losses((1, 2), (20000, 0.3)), "healthy", "near its lowest"),
    (losses((1, 2), (20000, 1.9)), "not learning", "should have fallen"),
    (losses((1, 2), (300, 0.2), (999, 0.4), number=999), "too early to tell", "999 steps"),
    (losses((1, 2), (300, 0.2), (1000, 0.4), number=1000), "healthy", "has risen"),
    ([2.0], "too early to tell", "1 steps"),
    ([2.0, 1.0, float("nan")], "overflow", "step 3"),
    (np.append(losses((1, 2), (20000, 0.3)), [np.inf, 0.3]), "overflow", "step 20001"),
])
def test_the_loss(values, kind, words):
    told = reading.loss(values)
    assert told.kind == kind and words in told.text


def test_the_loss_of_a_collapsed_run_is_not_praised():
    told = reading.loss(losses((1, 2), (300, 0.001)), collapsed=True)
    assert told.kind == "collapsed" and "same point" in told.text


@pytest.mark.parametrize("values, kind, words", [
    (spreads((10, 0.8), (240, 0.44), (2000, 0.7), (20000, 0.8)), "healthy", "0.80 of an even one (dotted)"),
    (spreads((10, 0.8), (240, 0.44), (2000, 0.7), (20000, 0.8)), "healthy", "it was lowest, 0.44, at step 240"),
    (spreads((10, 0.8), (20000, 0.42)), "healthy", "0.42"),
    (spreads((10, 0.8), (20000, 0.38)), "contracted", "--target_momentum"),
    (spreads((10, 0.8), (500, 0.06), (20000, 0.2)), "contracted", "has risen since"),
    (spreads((10, 0.8), (500, 0.04), (20000, 0.04)), "collapsed", "same point"),
    (spreads((10, 0.8), (500, 0)), "collapsed", "0.00"),
    (np.append(spreads((10, 0.8), (20000, 0.7))[:-1], np.nan), "overflow", "step 20000"),
])
def test_the_spread(values, kind, words):
    told = reading.spread(STEPS, values, EVEN)
    assert told.kind == kind and words in told.text


def test_a_young_run_is_not_called_contracted_but_may_be_collapsed():
    assert reading.spread([10, 500], [0.07, 0.2 * EVEN], EVEN).kind == "too early to tell"
    assert reading.spread([10, 990], [0.01, 0.2 * EVEN], EVEN).kind == "too early to tell"
    assert reading.spread([10, 990, 1000], [0.2 * EVEN] * 3, EVEN).kind == "contracted"
    assert reading.spread([10], [0.04 * EVEN], EVEN).kind == "collapsed"


@pytest.mark.parametrize("steps, values, taken, kind, words", [
    ([0, 5000], [0.34, 0.41], 5000, "healthy", "41.00 % at step 5000 and was 34.00 %"),
    ([0, 5000, 9000], [0.34, 0.50, 0.41], 9000, "healthy", "the best was 50.00 %"),
    ([0, 400], [0.34, 0.30], 400, "too early to tell", "thousands of steps"),
    ([0, 4000], [0.34, 0.345], 4999, "too early to tell", "thousands of steps"),
    ([0, 4000], [0.34, 0.345], 5000, "not risen", "should have risen"),
    ([0, 90000], [0.34, 0.10], 90000, "not risen", "10.00 %"),
    ([0], [0.34], 9000, "too early to tell", "not measured again"),
    ([500], [0.34], 500, "", "was not measured"),
])
def test_the_knn_accuracy(steps, values, taken, kind, words):
    told = reading.knn(steps, values, taken)
    assert told.kind == kind and words in told.text


def test_the_knn_accuracy_of_a_run_that_began_with_other_than_random_weights():
    for steps in ([0, 5000], [0], [500]):
        told = reading.knn(steps, [0.34, 0.41][:len(steps)], 5000, "cifar10-narrow").text
        assert "cifar10-narrow" in told and "random" not in told


def test_a_real_run_is_too_young_at_first_and_healthy_later():
    """The whole page may say nothing worse of it at any time."""
    for number in range(1, len(REAL) + 1):
        steps, _, values = REAL[:number].T
        taken = int(steps[-1])
        curve = np.interp(np.arange(1, taken + 1), *REAL.T[:2])
        evaluated = [(step, value) for step, value in zip(*REAL_KNN) if step <= taken]
        told = [reading.loss(curve), reading.spread(steps, values, EVEN), reading.knn(*zip(*evaluated), taken)]
        kinds = {"too early to tell"} if taken < reading.EARLY else {"healthy"}
        assert {each.kind for each in told[:2]} == kinds, taken
        assert told[2].kind == ("healthy" if taken > 1950 else "too early to tell"), taken
    assert "lowest, 0.44, at step 235" in told[1].text


def test_the_first_batches_are_compared_with_the_published_losses_only_where_they_can_be():
    curve = np.linspace(1.2, 0.9, 25)
    assert "1.007 at batch 10, here 1.087, 0.892 at batch 20, here 0.963." in reading.first_batches(curve, True).text
    assert "batch 30" not in reading.first_batches(curve, True).text
    assert "begin at batch 10" in reading.first_batches(curve[:5], True).text
    assert reading.first_batches(curve, False).text.startswith("No published losses")


def test_speed_and_learning_rate():
    assert reading.speed([100] * 99 + [20]) == ("", "The median is 100 images/s.")
    told = reading.speed([100] * 80 + [20] * 20)
    assert told.kind == "uneven" and "20 % of the log lines" in told.text
    assert "0.0005 to 1e-07" in reading.learning_rate([5e-4, 3e-4, 1e-7]).text


def test_the_worst_is_told_first():
    told = [reading.Reading(kind, "") for kind in ("", "healthy", "too early to tell", "contracted", "overflow")]
    for number in range(2, 6):
        assert reading.worst(told[:number]) == told[number - 1]
    assert reading.worst([reading.Reading("healthy", "first"), reading.Reading("healthy", "second")]).text == "first"


@pytest.mark.parametrize("n", [1, 2, 399, 400, 401, 1000, 4001, 9999])
def test_smoothing_takes_means_of_neighbours(n):
    values = np.random.RandomState(n).randn(n)
    width = max(1, n // 200)
    np.testing.assert_allclose(reading.smooth(values), [values[i:i + width].mean() for i in range(n - width + 1)], atol=1e-12)


def test_smoothing_is_spoilt_by_what_is_not_finite_only_where_it_stands():
    values = np.ones(1000)
    values[[500, 700]] = np.nan, 1e30
    smooth = reading.smooth(values)
    assert np.flatnonzero(np.isnan(smooth)).tolist() == [496, 497, 498, 499, 500]
    assert (smooth[501:690] == 1).all() and (smooth[701:] == 1).all()


def test_a_day_of_steps_is_smoothed_at_once():
    """By a product for each pair of a value and a mean, five million would take minutes."""
    smooth = reading.smooth(np.arange(5000000))
    np.testing.assert_allclose(smooth, np.arange(len(smooth)) + 12499.5, rtol=1e-12)

"""Nearest neighbours among features, on the host, in memory that does not grow with their number."""
from typing import Tuple

import numpy as np
import tensorflow as tf

# k is that of InstDisc (Wu et al., 2018, arXiv:1805.01978), T that of Lightly's benchmarks (InstDisc: 0.07).
NEIGHBOURS = 200
TEMPERATURE = 0.1
TEST_BLOCK, TRAIN_BLOCK = 1024, 1 << 15  # features that are compared at a time: 128 MiB of similarities
VOTES = 1 << 24  # of test images for classes, in memory at a time: 128 MiB


def knn_accuracy(train_features: np.ndarray, train_labels: np.ndarray, test_features: np.ndarray,
                 test_labels: np.ndarray, num_classes: int, k: int = NEIGHBOURS,
                 temperature: float = TEMPERATURE) -> float:
    """The part of the test images whose class their k nearest training images tell.

    The weighted vote of InstDisc (arXiv:1805.01978, section 3.4): each neighbour votes for its class with exp(cosine / temperature).
    Of classes with equal votes the first wins. Features are float (n, d), labels integers (n,) in 0..num_classes-1. k is at most the
    number of training images.
    """
    block = max(1, min(TEST_BLOCK, VOTES // num_classes))
    correct = 0
    for first in range(0, len(test_features), block):
        values, nearest = nearest_to(test_features[first:first + block], train_features, min(k, len(train_features)))
        cosine = values.astype(np.float64)
        weights = np.exp((cosine - cosine.max(axis=1, keepdims=True)) / temperature)
        rows = np.arange(len(nearest))[:, None]
        votes = np.bincount((rows * num_classes + train_labels[nearest]).ravel(), weights.ravel(), len(nearest) * num_classes)
        predicted = votes.reshape(-1, num_classes).argmax(axis=1)
        correct += int((predicted == test_labels[first:first + block]).sum())
    return correct / len(test_features)


def nearest_to(queries: np.ndarray, features: np.ndarray, k: int) -> Tuple[np.ndarray, np.ndarray]:
    """The k features (n, d) nearest to each query (m, d): their cosines, float32 (m, k), largest first, and indices, int64 (m, k).

    Of equal ones the first. Goes through the features in blocks and keeps the best so far.
    """
    queries = normalised(queries)
    best, indices = np.zeros((len(queries), 0), np.float32), np.zeros((len(queries), 0), np.int64)
    for first in range(0, len(features), TRAIN_BLOCK):
        cosines = queries @ normalised(features[first:first + TRAIN_BLOCK]).T
        with tf.device("CPU:0"):  # several times faster than np.argpartition
            values, places = (part.numpy() for part in tf.math.top_k(cosines, min(k, cosines.shape[1])))
            best, indices = np.concatenate([best, values], axis=1), np.concatenate([indices, first + places], axis=1)
            kept = tf.math.top_k(best, min(k, best.shape[1]))
        best, indices = kept.values.numpy(), np.take_along_axis(indices, kept.indices.numpy(), axis=1)
    return best, indices


def normalised(vectors: np.ndarray) -> np.ndarray:
    """Rows of length 1, float32; a row of zeros stays one."""
    vectors = np.asarray(vectors, np.float32)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)

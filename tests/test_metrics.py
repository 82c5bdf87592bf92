import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics
from sklearn.datasets import make_blobs
from sklearn.neighbors import KNeighborsClassifier

from simmim.metrics.classification import (
    balanced_accuracy,
    class_rows,
    confusion_matrix,
    intersection_over_union,
    knn_predict,
    top1,
)


@pytest.fixture
def answers() -> tuple[np.ndarray, np.ndarray]:
    """Labels and half-right predictions of 300 images of 7 unequal classes, one of which (5) has no image."""
    rng = np.random.default_rng(0)
    labels = rng.choice([0, 1, 2, 3, 4, 6], 300, p=[0.5, 0.2, 0.1, 0.1, 0.05, 0.05])
    return labels, np.where(rng.random(300) < 0.5, labels, rng.integers(0, 7, 300))


def test_top1_equals_scikit_learn(answers: tuple[np.ndarray, np.ndarray]) -> None:
    assert top1(*answers) == pytest.approx(sklearn_metrics.accuracy_score(*answers))


def test_confusion_matrix_equals_scikit_learn(answers: tuple[np.ndarray, np.ndarray]) -> None:
    expected = sklearn_metrics.confusion_matrix(*answers, labels=np.arange(7))
    assert confusion_matrix(*answers, num_classes=7).tolist() == expected.tolist()


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
def test_balanced_accuracy_equals_scikit_learn(answers: tuple[np.ndarray, np.ndarray]) -> None:
    expected = sklearn_metrics.balanced_accuracy_score(*answers)
    assert balanced_accuracy(*answers, num_classes=7) == pytest.approx(expected)


def test_figures_of_each_class_equal_scikit_learn(answers: tuple[np.ndarray, np.ndarray]) -> None:
    labels, predictions = answers
    rows = class_rows(confusion_matrix(labels, predictions, 7), "images")
    precision, recall, f1, images = sklearn_metrics.precision_recall_fscore_support(
        labels, predictions, labels=range(7), zero_division=np.nan
    )
    found = [[np.nan if value is None else value for value in row.values()] for row in rows]
    np.testing.assert_allclose(found, np.stack([images, recall, precision, f1], axis=1))
    assert rows[5]["recall"] is None


@pytest.mark.parametrize("k", [1, 20])
def test_knn_predicts_what_scikit_learn_predicts(k: int) -> None:
    # Clusters wide enough that the classes overlap; 1300 queries take two chunks.
    features, labels = make_blobs(1700, n_features=16, centers=6, cluster_std=9.0, random_state=0)[:2]

    def votes(distance: np.ndarray) -> np.ndarray:
        return np.exp((1 - distance) / 0.07)

    reference = KNeighborsClassifier(k, metric="cosine", algorithm="brute", weights=votes)  # pyright: ignore[reportArgumentType]
    reference.fit(features[:400], labels[:400])
    ours = knn_predict(features[:400], labels[:400], features[400:], num_classes=6, k=k, temperature=0.07)
    assert ours.tolist() == reference.predict(features[400:]).tolist()


def test_knn_votes_weigh_by_nearness() -> None:
    # One neighbour at cosine 1 outvotes two at cosine 0.8: e^(1/0.07) > 2·e^(0.8/0.07).
    train = np.array([[1.0, 0.0], [0.8, 0.6], [0.8, -0.6]])
    assert knn_predict(train, [1, 0, 0], [[2.0, 0.0]], num_classes=2, k=3).tolist() == [1]


def test_knn_with_fewer_training_images_than_neighbours_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^20 neighbours are more than the 3 training images; use k of 3 or less$"):
        knn_predict(np.eye(3), [0, 1, 2], np.eye(3), num_classes=3)


def test_intersection_over_union_equals_scikit_learn_where_pixels_are_ignored() -> None:
    rng = np.random.default_rng(0)
    masks = rng.choice(np.array([0, 1, 2, 3, 5, 255]), (4, 20, 30), p=[0.5, 0.2, 0.1, 0.05, 0.05, 0.1])
    predicted = np.where(rng.random(masks.shape) < 0.6, masks % 255, rng.integers(0, 5, masks.shape))
    judged = masks != 255
    found = intersection_over_union(confusion_matrix(masks[judged], predicted[judged], num_classes=7))
    classes = [0, 1, 2, 3, 4, 5]  # 4 is predicted only
    expected = sklearn_metrics.jaccard_score(masks[judged], predicted[judged], average=None, labels=classes)
    assert found[:6].tolist() == pytest.approx(expected.tolist())
    assert found[4] == 0
    assert np.isnan(found[6])  # of this class nothing is known

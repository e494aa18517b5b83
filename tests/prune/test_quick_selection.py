"""QuickSelection: links counted, SET against its rule, the selector's manners, digits."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from eckart.errors import InputError, NotFiniteError
from eckart.prune.quick_selection import QuickSelection, _Links


def table(n: int = 80, features: int = 12, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, features))


def small(**options: object) -> QuickSelection:
    return QuickSelection(**{"n_hidden": 20, "epochs": 3, "random_state": 0, **options})


# ---- training


@pytest.mark.parametrize("zeta", [0.0, 0.2, 0.5])
def test_an_exchange_cuts_the_weakest_of_each_sign_and_keeps_the_number(zeta: float) -> None:
    generator = torch.Generator().manual_seed(0)
    layer = _Links((30, 20), 150, generator)
    layer.speed = torch.ones(30, 20) * layer.mask
    before, mask = layer.weight.clone(), layer.mask.clone()
    layer.evolve(zeta, generator)
    assert int(layer.mask.sum()) == int(mask.sum()) == 150
    gone = mask & ~layer.mask
    for sign in (1, -1):
        own = mask & (sign * before > 0)
        assert int((gone & own).sum()) == int(zeta * int(own.sum()))
        if (gone & own).any():
            assert before[gone & own].abs().max() < before[own & ~gone].abs().min()
    new = layer.mask & ~mask
    assert (layer.weight[new] != 0).all()
    assert (layer.weight[~layer.mask] == 0).all()
    assert (layer.speed[~layer.mask] == 0).all()
    assert (layer.speed[new] == 0).all()
    assert torch.equal(layer.weight[mask & layer.mask], before[mask & layer.mask])


def test_a_full_layer_has_no_free_place() -> None:
    generator = torch.Generator().manual_seed(0)
    layer = _Links((5, 4), 20, generator)
    before = layer.weight.clone()
    layer.evolve(0.5, generator)
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize(("epsilon", "expected"), [(1, 32), (2.5, 80), (100, 240)])
def test_the_number_of_links_stays(epsilon: float, expected: int) -> None:
    assert small(epsilon=epsilon, epochs=4).fit(table()).links_ == expected


def test_one_step_is_that_of_autograd() -> None:
    """One batch, no noise, no momentum yet: the new strengths from gradients of the loss."""
    X = table(10, 4)
    options = {"n_hidden": 6, "epsilon": 100, "noise": 0.0, "epochs": 1, "weight_decay": 0.0, "learning_rate": 0.1}
    fitted = QuickSelection(**options, random_state=3).fit(X)
    generator = torch.Generator().manual_seed(3)
    first, second = _Links((6, 4), 24, generator), _Links((4, 6), 24, generator)
    x = torch.from_numpy((X - X.mean(0)) / X.std(0)).float()
    W1, W2 = first.weight.clone().requires_grad_(), second.weight.clone()
    loss = 0.5 * (torch.sigmoid(x @ W1.T) @ W2.T - x).square().sum(1).mean()
    (gradient,) = torch.autograd.grad(loss, W1)
    expected = (W1 - 0.1 * gradient).detach().abs().sum(0)
    np.testing.assert_allclose(fitted.feature_importances_, expected.numpy(), rtol=1e-5)


def test_the_error_falls() -> None:
    curve = small(n_hidden=50, epochs=30).fit(table(300)).loss_curve_
    assert len(curve) == 30
    assert curve[-1] < 0.8 * curve[0]


def test_a_random_state_decides_and_leaves_the_global_generator_alone() -> None:
    X = table()
    state = torch.get_rng_state()
    a, b, c = (small(random_state=seed).fit(X).feature_importances_ for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    np.testing.assert_array_equal(a, b)
    assert not np.array_equal(a, c)
    assert small(random_state=None).fit(X).support_.sum() == 6


def test_scale_does_not_matter_once_standardised() -> None:
    X = table()
    a = small().fit(X).feature_importances_
    b = small().fit(X * np.logspace(-3, 3, 12) + 5).feature_importances_
    np.testing.assert_allclose(a, b, rtol=1e-4)


def test_digits_chosen_without_labels_tell_the_labels() -> None:
    """A nearest neighbour on 16 chosen pixels is better than on 16 drawn at random, mean of 10 draws."""
    datasets = pytest.importorskip("sklearn.datasets")
    X, y = datasets.load_digits(return_X_y=True)
    X, y = X[:900], y[:900]

    def accuracy(columns: np.ndarray) -> float:
        A, B = X[:600][:, columns], X[600:][:, columns]
        nearest = ((B[:, None] - A[None]) ** 2).sum(2).argmin(1)
        return float((y[:600][nearest] == y[600:]).mean())

    chosen = QuickSelection(16, n_hidden=100, epochs=10, standardize=False, learning_rate=1e-3, random_state=0)
    chosen.fit(X[:600] / 4)
    rng = np.random.default_rng(0)
    drawn = np.mean([accuracy(rng.choice(64, 16, replace=False)) for _ in range(10)])
    assert accuracy(chosen.get_support(indices=True)) > drawn


# ---- manners of a selector


@pytest.mark.parametrize(("wanted", "expected"), [(None, 6), (4, 4), (0.25, 3), (12, 12), (0.01, 1), (np.int64(2), 2)])
def test_how_many_features(wanted: object, expected: int) -> None:
    X = table()
    selector = small(n_features_to_select=wanted)
    chosen = selector.fit_transform(X)
    assert chosen.shape == (80, expected)
    support = selector.get_support()
    assert support.dtype == bool
    assert support.sum() == expected
    np.testing.assert_array_equal(chosen, X[:, support])
    np.testing.assert_array_equal(selector.get_support(indices=True), np.flatnonzero(support))
    if expected < 12:
        assert selector.feature_importances_[support].min() >= selector.feature_importances_[~support].max()
    back = selector.inverse_transform(chosen)
    np.testing.assert_array_equal(back, np.where(support, X, 0))


def test_names() -> None:
    frame = pd.DataFrame(table(), columns=[f"c{i}" for i in range(12)])
    selector = small(n_features_to_select=3).fit(frame)
    names = [f"c{i}" for i in selector.get_support(indices=True)]
    assert list(selector.get_feature_names_out()) == names
    assert list(selector.transform(frame).columns) == names
    assert list(selector.feature_names_in_) == list(frame.columns)
    with pytest.raises(InputError, match="feature_names_in_"):
        selector.get_feature_names_out([f"d{i}" for i in range(12)])
    with pytest.raises(InputError, match="names"):
        selector.transform(frame[frame.columns[::-1]])
    plain = selector.fit(frame.to_numpy())
    assert not hasattr(plain, "feature_names_in_")
    assert list(plain.get_feature_names_out()) == [f"x{i}" for i in plain.get_support(indices=True)]
    letters = np.array(list("abcdefghijkl"))
    assert list(plain.get_feature_names_out(letters)) == list(letters[plain.support_])
    with pytest.raises(InputError, match="12 names"):
        plain.get_feature_names_out(["a"])


def test_parameters_are_kept_as_given() -> None:
    selector = QuickSelection(n_features_to_select=-3, zeta="much")  # checked in fit, not here
    assert selector.get_params()["zeta"] == "much"
    assert selector.set_params(zeta=0.1, n_features_to_select=2) is selector
    assert repr(selector) == "QuickSelection(n_features_to_select=2, zeta=0.1)"
    with pytest.raises(InputError, match=r"zetta.*zeta"):
        selector.set_params(zetta=1)


def test_works_in_scikit_learn() -> None:
    base = pytest.importorskip("sklearn.base")
    pipeline = pytest.importorskip("sklearn.pipeline")
    linear = pytest.importorskip("sklearn.linear_model")
    X = table()
    y = X.sum(1) > 0  # every feature counts
    steps = pipeline.make_pipeline(base.clone(small(n_features_to_select=12)), linear.LogisticRegression())
    assert steps.fit(X, y).score(X, y) > 0.9
    search = pytest.importorskip("sklearn.model_selection").GridSearchCV(
        steps, {"quickselection__n_features_to_select": [1, 12]}, cv=2
    )
    assert search.fit(X, y).best_params_ == {"quickselection__n_features_to_select": 12}


def test_passes_the_checks_of_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both errors are ours and Python's; the rest is scikit-learn's own list."""
    checks = pytest.importorskip("sklearn.utils.estimator_checks")
    if not hasattr(checks, "estimator_checks_generator"):
        pytest.skip("needs scikit-learn 1.6 or later")
    results = checks.check_estimator(small(epochs=1, n_hidden=10), on_fail=None, on_skip=None)
    assert [r["check_name"] for r in results if r["status"] == "failed"] == []
    assert sum(r["status"] == "passed" for r in results) > 30


def test_fit_changes_neither_data_nor_parameters() -> None:
    X = table()
    before = X.copy()
    selector = small()
    params = selector.get_params()
    selector.fit(X, np.zeros(80))
    selector.transform(X)
    np.testing.assert_array_equal(X, before)
    assert selector.get_params() == params


# ---- bad input


def test_all_bad_options_are_named_at_once() -> None:
    bad = {"n_hidden": 0, "epochs": 1.5, "zeta": 1.0, "noise": -1, "momentum": 1.0, "epsilon": 0, "random_state": -1}
    with pytest.raises(InputError) as caught:
        QuickSelection(**bad).fit(table())
    for name in bad:
        assert name in str(caught.value)


@pytest.mark.parametrize("wanted", [0, 13, 0.0, 1.0, True, "many", -1])
def test_bad_counts(wanted: object) -> None:
    with pytest.raises(InputError, match="n_features_to_select"):
        small(n_features_to_select=wanted).fit(table())


@pytest.mark.parametrize(
    ("X", "words"),
    [
        (np.zeros(5), "2D array"),
        (np.zeros((0, 3)), r"0 sample\(s\)"),
        (np.zeros((3, 0)), r"0 feature\(s\)"),
        (np.zeros((1, 3)), "at least 2"),
        ([["a", "b"], ["c", "d"]], "no table of numbers"),
        (np.ones((3, 3)) * 1j, "Complex"),
    ],
)
def test_bad_tables(X: object, words: str) -> None:
    with pytest.raises(InputError, match=words):
        small().fit(X)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_not_finite(value: float) -> None:
    X = table()
    X[3, 7] = value
    with pytest.raises(NotFiniteError, match=r"\[7\]"):
        small().fit(X)


def test_constant_features_and_divergence() -> None:
    X = table()
    X[:, 2] = 4.0
    assert np.isfinite(small().fit(X).feature_importances_).all()
    with pytest.raises(NotFiniteError, match="learning_rate"):
        small(learning_rate=1e30, epochs=20).fit(X)


def test_not_fitted_and_other_features() -> None:
    for call in ("get_support", "get_feature_names_out"):
        with pytest.raises(InputError, match="not fitted"):
            getattr(small(), call)()
    with pytest.raises(InputError, match="not fitted"):
        small().transform(table())
    with pytest.raises(InputError, match="X has 5 features, but QuickSelection is expecting 12 features"):
        small().fit(table()).transform(table(features=5))

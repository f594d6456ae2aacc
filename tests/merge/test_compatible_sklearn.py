"""The estimator: scikit-learn's conventions, files, bad input."""

import copy
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError

from stiefel.merge import CompatibleAdapter


def data(n=120, d=6, width=8, seed=0):
    rng = np.random.default_rng(seed)
    y = np.arange(n) % 4
    new = rng.normal(size=(4, width))[y] + 0.3 * rng.normal(size=(n, width))
    return new[:, :d] + 0.1 * rng.normal(size=(n, d)), new, np.array(["a", "b", "c", "d"])[y]


@pytest.fixture(scope="module")
def fitted():
    old, new, y = data()
    return CompatibleAdapter(epochs=5, random_state=0).fit(old, new, y)


def test_maps_go_where_they_say(fitted):
    old, new, _ = data()
    assert fitted.backward(new).shape == fitted.forward(old).shape == (120, 8)
    assert fitted.place_old(old).shape == old.shape
    np.testing.assert_array_equal(fitted.transform(new), fitted.backward(new))
    assert (fitted.n_features_in_, fitted.n_features_old_) == (8, 6)
    assert fitted.orthogonality_ < 1e-5


def test_arrays_and_tensors_of_any_precision_are_alike(fitted):
    _, new, _ = data()
    plain = fitted.backward(new)
    np.testing.assert_array_equal(fitted.backward(torch.tensor(new)), plain)
    np.testing.assert_allclose(fitted.backward(new.astype(np.float16)), plain, atol=1e-2)
    np.testing.assert_array_equal(fitted.backward(new.tolist()), plain)


def test_parameters_are_kept_and_cloned():
    adapter = CompatibleAdapter("lambda", lam=2.0, w=(1, 1, 0.5))
    twin = clone(adapter)
    assert twin.get_params() == adapter.get_params()
    assert twin.set_params(lam="auto").lam == "auto"
    with pytest.raises(NotFittedError):
        adapter.backward(np.ones((2, 3)))


def test_forward_is_a_parameter_and_a_method():
    old, new, y = data()
    adapter = CompatibleAdapter(forward="mlp", epochs=1, random_state=0)
    assert clone(adapter).get_params()["forward"] == "mlp"
    assert "forward='mlp'" in repr(adapter)
    wide = len(list(adapter.fit(old, new, y).maps_.forward_map.parameters()))
    assert adapter.forward(old).shape == new.shape
    adapter.set_params(forward="linear").fit(old, new, y)
    assert len(list(adapter.maps_.forward_map.parameters())) < wide
    assert adapter.get_params()["forward"] == "linear"
    assert copy.deepcopy(adapter).forward(old).shape == new.shape


def test_a_seed_decides():
    old, new, y = data()
    runs = [CompatibleAdapter(epochs=2, random_state=s).fit(old, new, y) for s in (1, 1, 2)]
    outs = [run.forward(old) for run in runs]
    np.testing.assert_array_equal(outs[0], outs[1])
    assert not np.allclose(outs[0], outs[2])


def test_lambda_auto_is_part_of_the_side():
    old, new, y = data()
    adapter = CompatibleAdapter("lambda", epochs=1, random_state=0).fit(old, new, y)
    assert adapter.maps_.backward_map.lam == pytest.approx(0.37 * math.sqrt(8))


@pytest.mark.parametrize("mode", ["strict", "lambda"])
def test_goes_through_a_file(tmp_path, mode):
    old, new, y = data()
    adapter = CompatibleAdapter(
        mode, lam=1.5, forward="mlp", epochs=2, random_state=0, w=(1, 2, 0.1)
    ).fit(old, new, y)
    file = tmp_path / "deep" / "adapter.safetensors"
    adapter.save(file)
    loaded = CompatibleAdapter.load(file)
    np.testing.assert_array_equal(loaded.backward(new), adapter.backward(new))
    np.testing.assert_array_equal(loaded.forward(old), adapter.forward(old))
    assert loaded.get_params() == {**adapter.get_params(), "random_state": None}
    assert loaded.orthogonality_ == pytest.approx(adapter.orthogonality_)


def test_other_files_are_refused(tmp_path):
    from safetensors.torch import save_file

    (tmp_path / "a").write_bytes(b"not tensors at all")
    with pytest.raises(ValueError, match="not a safetensors file"):
        CompatibleAdapter.load(tmp_path / "a")
    save_file({"x": torch.ones(2)}, tmp_path / "b")
    with pytest.raises(ValueError, match="not a saved CompatibleAdapter"):
        CompatibleAdapter.load(tmp_path / "b")
    with pytest.raises(NotFittedError):
        CompatibleAdapter().save(tmp_path / "c")


def test_without_labels_it_warns_and_works():
    old, new, _ = data()
    with pytest.warns(UserWarning, match="class of its own"):
        CompatibleAdapter(epochs=1).fit(old, new)
    CompatibleAdapter(epochs=1, w=(1, 1, 0)).fit(old, new)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"mode": "loose"}, "mode must be one of"),
        ({"lam": "big"}, "lam must be 'auto'"),
        ({"lam": -1}, "lam must be at least 0"),
        ({"epochs": 1.5}, "epochs must be an integer"),
        ({"alpha": -1.0}, "alpha must be positive"),
    ],
)
def test_bad_parameters_are_found_in_fit(parameters, message):
    adapter = CompatibleAdapter(**parameters)
    with pytest.raises(ValueError, match=message):
        adapter.fit(*data())


def test_bad_vectors(fitted):
    old, new, y = data()
    with pytest.raises(ValueError, match="as many items"):
        CompatibleAdapter().fit(old[:-1], new, y)
    with pytest.raises(ValueError, match="NaN"):
        CompatibleAdapter().fit(old * np.nan, new, y)
    with pytest.raises(ValueError, match="one class per item"):
        CompatibleAdapter().fit(old, new, np.ones((120, 2)))
    with pytest.raises(ValueError, match="H_new must have 8 columns"):
        fitted.backward(old)


def test_missing_scikit_learn_is_named():
    code = (
        "import sys; sys.modules['sklearn'] = None\n"
        "import stiefel.merge\n"
        "try:\n    stiefel.merge.CompatibleAdapter\n"
        "except ImportError as error:\n    print(error)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "needs scikit-learn" in run.stdout
    assert "stiefel[atlas]" in run.stdout

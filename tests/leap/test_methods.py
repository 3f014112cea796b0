"""The registry of layer-wise methods: what it says without importing a method is what the method says."""

from __future__ import annotations

import pytest

from leap.methods import METHODS, Home, Methods
from leap.settings import LearnSettings


@pytest.mark.parametrize("name", list(METHODS))
def test_an_entry_says_what_its_method_says(name: str) -> None:
    light = METHODS.changes_weights(name)
    method = METHODS[name]
    assert (method.name, method.changes_weights) == (name, light)
    assert METHODS[name] is method
    assert (method.steps > 0) == (method.needs == "gram"), "an estimate of its time needs the steps of its solver"


def test_a_registry_lists_what_was_put_in_after_its_own_and_forgets_it_again() -> None:
    methods = Methods({"wanda": Home("leap.layerwise.wanda", changes_weights=False, native="row")})
    methods["toy"] = METHODS["admm"]
    assert list(methods) == ["wanda", "toy"]
    assert methods.changes_weights("toy")
    del methods["toy"]
    assert (list(methods), len(methods), methods.get("toy")) == (["wanda"], 1, None)
    with pytest.raises(KeyError):
        del methods["toy"]


def test_a_mask_over_the_priors_weights_wants_a_prior_that_has_some(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="weights prior wants a prior that changes weights"):
        LearnSettings(prior="wanda", weights="prior")
    monkeypatch.setitem(METHODS, "toy", METHODS["wanda"])
    with pytest.raises(ValueError, match="weights prior wants a prior that changes weights"):
        LearnSettings(prior="toy", weights="prior")
    monkeypatch.setitem(METHODS, "toy", METHODS["admm"])
    assert LearnSettings(prior="toy", weights="prior").prior == "toy"

"""Outcomes and evaluations as JSON: what is written comes back, what is wrong is refused."""

from __future__ import annotations

import copy
import json

import pytest
import sample_runs

from eckart.errors import InputError
from eckart.report import evaluation_from_json, evaluation_to_json, outcome_from_json, outcome_to_json

OUTCOME = sample_runs.llama()[0]


def test_an_outcome_comes_back() -> None:
    assert outcome_from_json(json.dumps(outcome_to_json(OUTCOME))) == OUTCOME
    assert outcome_from_json(outcome_to_json(OUTCOME)) == OUTCOME


def test_an_evaluation_comes_back() -> None:
    evaluation = sample_runs.language_evaluation(OUTCOME)
    assert evaluation_from_json(json.dumps(evaluation_to_json(evaluation))) == evaluation


def test_missing_optional_entries_take_their_defaults() -> None:
    tree = outcome_to_json(OUTCOME)
    del tree["notes"], tree["layers"][0]["held_out"]
    found = outcome_from_json(tree)
    assert found.notes == ()
    assert found.layers[0].held_out is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("method"), "outcome: the entry 'method' is missing"),
        (lambda t: t.update(metod="x"), "unknown entry 'metod'. Did you mean 'method'"),
        (
            lambda t: t["layers"][3].update(form="lowrnk"),
            r"layers\[3\].form: unknown value 'lowrnk'. Did you mean",
        ),
        (lambda t: t["layers"][3].update(rank="7"), r"layers\[3\].rank: expected int; got str '7'"),
        (lambda t: t["layers"][3].update(rank=True), r"layers\[3\].rank: expected int; got bool"),
        (lambda t: t.update(seconds=None), "outcome.seconds: expected float; got NoneType"),
        (lambda t: t.update(layers={}), "outcome.layers: expected a list"),
        (lambda t: t.update(sites_before=[]), "outcome.sites_before: expected an object"),
    ],
)
def test_wrong_trees_are_refused(change, message: str) -> None:
    tree = copy.deepcopy(outcome_to_json(OUTCOME))
    change(tree)
    with pytest.raises(InputError, match=message):
        outcome_from_json(tree)


def test_broken_text_is_refused_with_its_place() -> None:
    with pytest.raises(InputError, match="line 1, column 2"):
        outcome_from_json("{")


def test_a_protocol_with_things_that_are_not_data_is_refused() -> None:
    evaluation = sample_runs.language_evaluation(OUTCOME)
    evaluation.protocol["model"] = object()
    with pytest.raises(InputError, match="expected plain data"):
        evaluation_to_json(evaluation)

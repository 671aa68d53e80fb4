"""One small model of every family of timm and torchvision, the committed tables, the docs page.

The whole zoo is one command: ``python -m tests.zoo``.
"""

from __future__ import annotations

import doctest
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

from inmerge_wrap import export_weights
from tests import zoo
from tests.zoo import Entry

DOCS = Path(__file__).parents[1] / "docs" / "what-is-merged.md"
TABLES = {
    name: {(row["source"], row["model"]): row for row in zoo.read(zoo.RESULTS / f"{name}.csv")}
    for name in ("zoo", "zoo_recommended")
}
TABLE = TABLES["zoo"]


def sample() -> list[Entry]:
    """The smallest model of each family, one with something to merge if there is one."""
    best: dict[tuple[str, str], Entry] = {}

    def rank(entry: Entry) -> tuple[bool, float]:
        row = TABLE.get((entry.source, entry.model))
        return (True, 0.0) if row is None else (row["merged"] == "0", float(row["parameters"]))

    for entry in zoo.entries():
        key = entry.source, entry.family
        best[key] = min(best.get(key, entry), entry, key=rank)
    return list(best.values())


@pytest.mark.parametrize("entry", sample(), ids=lambda entry: f"{entry.family}-{entry.model}")
def test_one_model_of_every_family(entry: Entry) -> None:
    outcome = zoo.plan_one(entry)
    assert outcome.broken == ""
    assert outcome.merged or outcome.refusal
    row = TABLE.get((entry.source, entry.model))
    # Another version of timm may have changed the model itself.
    if row is not None and outcome.convolutions == int(row["convolutions"]):
        measured = outcome.merged, outcome.skipped, outcome.found_by, outcome.refusal
        assert measured == (
            int(row["merged"]),
            *(row[c] for c in ("skipped", "found_by", "refusal")),
        )


ROUND_TRIP_SAMPLE = [
    *("test_resnet", "test_efficientnet", "test_convnext", "test_byobnet", "test_nfnet"),
    *("test_mambaout", "mobilenetv3_small_050", "squeezenet1_1", "shufflenet_v2_x0_5"),
]


@pytest.mark.parametrize("recommended", [False, True])
@pytest.mark.parametrize("name", ROUND_TRIP_SAMPLE)
def test_training_and_export_come_back_in_a_stock_model(name: str, recommended: bool) -> None:
    (entry,) = [entry for entry in zoo.entries() if entry.model == name]
    outcome = zoo.go_round(entry, recommended)
    assert outcome.broken == ""
    assert outcome.merges > 0 and outcome.layers > 0
    assert outcome.files == ("weights, timm folder" if entry.source == "timm" else "weights")


# -- the sweep itself can fail --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        (ValueError("no"), "refused with 19 mergeable convolutions"),
        (TypeError("oh"), "unexpected TypeError: oh"),
        (UserWarning("not on meta tensors"), "unexpected UserWarning: not on meta tensors"),
    ],
)
def test_the_sweep_tells_a_broken_promise(
    behaviour: Exception, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def plan_merging(model: nn.Module, **_: Any) -> Any:
        raise behaviour

    monkeypatch.setattr(zoo, "plan_merging", plan_merging)
    assert zoo.plan_one(Entry("timm", "resnet", "resnet18")).broken == message


def test_the_sweep_tells_a_merged_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = zoo.plan_merging

    def with_gates(model: nn.Module, **arguments: Any) -> Any:
        return plan(model, also_merge=["vector"], **arguments)

    monkeypatch.setattr(zoo, "plan_merging", with_gates)
    broken = zoo.plan_one(Entry("timm", "resnet", "seresnet18")).broken
    assert broken.startswith("merged without being mergeable: ['layer")


def test_the_round_trip_tells_other_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def spoiled(model: nn.Module, path: Path) -> Path:
        with torch.no_grad():
            next(model.parameters()).add_(1e-3)
        return export_weights(model, path)

    monkeypatch.setattr(zoo, "export_weights", spoiled)
    outcome = zoo.go_round(Entry("timm", "byobnet", "test_byobnet"))
    assert outcome.broken == "AssertionError: the reloaded logits differ"


# -- the committed tables -------------------------------------------------------------------------


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_the_table_holds_the_whole_zoo_and_keeps_its_promises(
    table: dict[tuple[str, str], dict[str, str]],
) -> None:
    if timm.__version__ == zoo.TIMM_OF_THE_TABLE:
        assert {name for source, name in table if source == "timm"} == set(timm.list_models())
    assert len(table) > 1400
    for row in table.values():
        assert row["broken"] == ""
        assert bool(int(row["merged"])) is not bool(row["refusal"])
        assert not (row["refusal"] and int(row["mergeable"]))
    # Of the processor: what else ran on the machine is no property of the library.
    seconds = sorted(float(row["cpu_seconds"]) for row in table.values() if int(row["merged"]))
    assert seconds[int(0.95 * (len(seconds) - 1))] < 2.0


@pytest.mark.parametrize("table", TABLES)
def test_every_family_went_round(table: str) -> None:
    rows = zoo.read(zoo.RESULTS / f"{table}_round_trip.csv")
    assert {(row["source"], row["family"]) for row in rows} == {
        (entry.source, entry.family) for entry in zoo.smallest_of_families()
    }
    for row in rows:
        assert row["broken"] == ""
        assert int(row["merges"]) > 0


# -- the docs page --------------------------------------------------------------------------------


def test_the_examples_of_the_docs_page_give_what_it_says() -> None:
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    failures, examples = doctest.testfile(str(DOCS), module_relative=False, optionflags=flags)
    assert examples > 10 and failures == 0


def test_the_numbers_of_the_docs_page_are_those_of_the_tables() -> None:
    text = DOCS.read_text()
    recommended = zoo.summaries([*TABLES["zoo_recommended"].values()])[:2]
    for table in (*zoo.summaries(), *recommended, zoo.other_networks()):
        assert table in text

"""A trained network at another site: what changes, what stays, and what is said of it."""

from __future__ import annotations

import csv
import errno
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from inmerge_wrap.app.adapted_folder import write_adapted
from inmerge_wrap.app.adapting import adapt, read_site
from inmerge_wrap.app.model import TrainedModel
from inmerge_wrap.app.operating import operating_point
from inmerge_wrap.app.predicting import find_files, predict
from inmerge_wrap.images.preparation import Recipe
from tests.app.trained import code_of, pictures, trained
from tests.cli.common import complaint, run, run_json


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network that was trained on 12-bit images, and darker images of another site."""
    root = tmp_path_factory.mktemp("site")
    pictures(root / "images", "png16", count=12)
    pictures(root / "other", "png16", count=40, seed=1, high=1500)
    trained(root / "model", "png16", root / "images")
    return root


def test_only_the_statistics_change_and_by_the_formula(site: Path) -> None:
    model = TrainedModel.read(site / "model")
    before = {name: value.clone() for name, value in model.network.state_dict().items()}
    read = read_site(model, find_files([site / "other"]))
    found = adapt(model, read, prior=16)
    after = found.model.network.state_dict()
    for name, value in model.network.state_dict().items():
        assert torch.equal(value, before[name])
        statistic = name.endswith(("running_mean", "running_var", "num_batches_tracked"))
        assert torch.equal(after[name], value) is not statistic
    pixels = read.pixels
    with torch.no_grad():
        first = model.network.conv1[0](model.normalised(pixels))
    expected = (16 * before["conv1.1.running_mean"] + 40 * first.mean((0, 2, 3))) / 56
    torch.testing.assert_close(after["conv1.1.running_mean"], expected)
    expected = (16 * before["conv1.1.running_var"] + 40 * first.var((0, 2, 3))) / 56
    torch.testing.assert_close(after["conv1.1.running_var"], expected)
    named = model.recipe.probabilities(model.scores(pixels)).argmax(1)
    assert [first for first, _ in found.shares.values()] == [
        pytest.approx((named == index).double().mean().item()) for index in range(3)
    ]


def test_adapt_writes_a_folder_that_plain_timm_loads(site: Path, tmp_path: Path) -> None:
    out = tmp_path / "adapted"
    options = ("--site", "St Elsewhere", "--out", out)
    content = run_json("adapt", site / "model", site / "other", *options)
    assert content["images"] == 40 and content["output"] == str(out)
    network = eval(content["load"], {"timm": timm}).eval()
    model = TrainedModel.read(out)
    pixels = torch.stack([model.recipe.preparation(path) for path in (site / "other").iterdir()])
    with torch.no_grad():
        assert torch.equal(network(model.normalised(pixels)), model.scores(pixels))
    assert model.recipe.seen is not None and model.recipe.seen.high < 1500
    assert replace(model.recipe, seen=None) == replace(Recipe.read(site / "model"), seen=None)
    card = (out / "README.md").read_text()
    assert "Adapted to 40 images of St Elsewhere" in card and "prior of 16 images" in card
    assert "measured before the adaptation" in card and "\nlicense: mit\n" in card
    metadata = card.split("---\n")[1]
    assert "0.987" in card and "0.987" not in metadata and "model-index" not in metadata
    assert "4095" in card, "the lines that read these images"
    assert "exists: give another folder" in complaint(
        "adapt", site / "model", site / "other", "--out", out
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapted"]


def test_what_can_go_wrong_is_said(site: Path, tmp_path: Path) -> None:
    """Few images, a broken one, and predictions that are all of one class."""
    images = tmp_path / "few"
    pictures(images, "png16", count=3, seed=2)
    (images / "broken.png").write_bytes(b"nothing")
    result = run("adapt", site / "model", images, "--prior", 0, "--out", tmp_path / "out")
    assert "20.0%" in result.stdout, "the share of a class in training"
    said = " ".join(result.stderr.split())
    assert "3 images to estimate statistics on" in said
    assert "1 file left out as unreadable, for example broken.png" in said
    model = TrainedModel.read(site / "model")
    with torch.no_grad():
        model.network.get_classifier().bias[1] += 1000
    found = adapt(model, read_site(model, find_files([site / "other"])))
    assert found.shares["b"] == (1.0, 1.0)
    assert any("100% of the images are now taken for b" in said for said in found.warnings)


def test_what_is_said_in_the_card_is_text_whatever_files_are_called(
    site: Path, tmp_path: Path
) -> None:
    images = tmp_path / "few"
    pictures(images, "png16", count=3, seed=2)
    (images / "![x](http:__evil).png").write_bytes(b"nothing")
    model = TrainedModel.read(site / "model")
    found = adapt(model, read_site(model, find_files([images])))
    write_adapted(found, site / "model", tmp_path / "out", site="here")
    card = (tmp_path / "out" / "README.md").read_text()
    assert r"left out as unreadable, for example !\[x\](http:" in card and "![x]" not in card


@pytest.mark.parametrize("card", [None, "---\nlicense: mit\n---\n# Ours\n\nIt is 97% right."])
def test_a_card_names_the_site_whatever_became_of_the_card_before(
    card: str | None, site: Path, tmp_path: Path
) -> None:
    shutil.copytree(site / "model", tmp_path / "model")
    readme = tmp_path / "model" / "README.md"
    readme.unlink() if card is None else readme.write_text(card)
    options = ("--site", "Ward 3", "--out", tmp_path / "out")
    run("adapt", tmp_path / "model", site / "other", *options)
    shown = (tmp_path / "out" / "README.md").read_text()
    assert "\n## Adaptation\n\nAdapted to 40 images of Ward 3:" in shown
    assert shown.startswith("---\nli") and (card is None or "It is 97% right." in shown)
    assert "measured before the adaptation do not hold any more" in shown
    assert card is not None or "create_model" in code_of(tmp_path / "out")


def test_a_network_that_is_adapted_twice_says_once_that_its_figures_are_older(
    site: Path, tmp_path: Path
) -> None:
    for model, out in ((site / "model", "one"), (tmp_path / "one", "two")):
        run("adapt", model, site / "other", "--site", f"Ward {out}", "--out", tmp_path / out)
    card = (tmp_path / "two" / "README.md").read_text()
    assert card.count("measured before the adaptation") == 1
    assert card.index("images of Ward one:") < card.index("images of Ward two:")


def test_a_class_that_was_common_in_training_may_be_common_here(site: Path, tmp_path: Path) -> None:
    model = TrainedModel.read(site / "model")
    with torch.no_grad():
        model.network.get_classifier().bias[1] += 1000
    read = read_site(model, find_files([site / "other"]))
    for share, warned in ((0.6, True), (0.95, False)):
        known = replace(model.recipe, class_shares=(0.0, share, 1 - share))
        found = adapt(replace(model, recipe=known), read)
        said = [text for text in found.warnings if "now taken for b" in text]
        assert bool(said) is warned
        assert all("60% of the training images" in text for text in said)
    write_adapted(found, site / "model", tmp_path / "out", site="Ward 3")
    assert "| b | 95.0% | 100.0% | 100.0% |" in (tmp_path / "out" / "README.md").read_text()
    assert Recipe.read(tmp_path / "out").class_shares == known.class_shares


def test_weights_never_stand_without_their_preparation(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there, replace_file = [], os.replace

    def noted(draft: Path, target: Path) -> None:
        replace_file(draft, target)
        there.append({path.name for path in (tmp_path / "out").iterdir() if path.is_file()})

    monkeypatch.setattr(os, "replace", noted)
    TrainedModel.read(site / "model").write(tmp_path / "out", "# A card")
    assert there[-1] == {"README.md", "config.json", "model.safetensors", "preparation.json"}
    assert all("preparation.json" in names for names in there if "model.safetensors" in names)


def test_a_full_disk_is_told_once(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = TrainedModel.read(site / "model")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left") as told:
        model.write(tmp_path / "out", "# A card")
    assert str(told.value).count("was not written") == 1 and ".draft" not in str(told.value)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="a folder that root cannot write")
def test_where_nothing_can_be_written_is_said_before_the_work(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TrainedModel, "read", lambda *_: pytest.fail("the work began"))
    (tmp_path / "file").write_text("")
    for out in (Path("/proc/x"), tmp_path / "file" / "x"):
        for command in ("adapt", "predict"):
            told = complaint(command, site / "model", site / "other", "--out", out)
            assert f"{out} cannot be written (" in told and "name another place" in told
            assert ".draft" not in told


def test_a_network_without_batch_norm_is_refused_with_what_to_do(tmp_path: Path) -> None:
    pictures(tmp_path / "images", "png8", count=3)
    trained(tmp_path / "model", "png8", tmp_path / "images", arch="test_convnext")
    out = tmp_path / "out"
    told = complaint("adapt", tmp_path / "model", tmp_path / "images", "--out", out)
    assert "has no BatchNorm" in told and "fine-tune it on labelled images" in told
    assert not out.exists()


def test_one_image_is_too_few_and_a_site_has_the_whole_name_of_its_folder(
    site: Path, tmp_path: Path
) -> None:
    place = tmp_path / "St. Mary"
    place.mkdir()
    shutil.copy(site / "other" / "00.png", place)
    options = ("adapt", site / "model", place, "--out", tmp_path / "out")
    assert "1 image is too few" in complaint(*options)
    shutil.copy(site / "other" / "01.png", place)
    run(*options)
    assert "2 images of St. Mary:" in (tmp_path / "out" / "README.md").read_text()


def test_labels_give_temperature_and_accuracy(site: Path, tmp_path: Path) -> None:
    model = TrainedModel.read(site / "model")
    names = [name for name, _ in find_files([site / "other"])]
    with open(tmp_path / "labels.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label"])
        writer.writerows([name, "abc"[index % 3]] for index, name in enumerate(names[:30]))
        writer.writerow([names[30], ""])
    out = tmp_path / "out"
    options = ("--labels", tmp_path / "labels.csv", "--out", out)
    content = run_json("adapt", site / "model", site / "other", *options)
    adapted = TrainedModel.read(out)
    labels = torch.arange(30) % 3
    pixels = torch.stack([model.recipe.preparation(site / "other" / name) for name in names[:30]])
    assert content["labelled"] == 30
    for number, network in enumerate((model, adapted)):
        right = network.scores(pixels).argmax(1) == labels
        recalls = [right[labels == index].double().mean() for index in range(3)]
        assert content["balanced_accuracy"][number] == pytest.approx(float(sum(recalls) / 3))
    losses = {
        scale: torch.nn.functional.cross_entropy(adapted.scores(pixels) / scale, labels)
        for scale in (0.9 * adapted.recipe.temperature, adapted.recipe.temperature)
    }
    assert losses[adapted.recipe.temperature] == min(losses.values())
    assert len(adapted.recipe.trained_on) == 30
    there = ("adapt", site / "model", site / "other", "--out", tmp_path / "other")
    assert "no such file" in complaint(*there, "--labels", site / "no.csv")
    (tmp_path / "labels.csv").write_text("path,label\n00.png,d\n")
    told = complaint(*there, *options[:2])
    assert "row 2: label 'd' is no class of the network; its classes are a, b, c" in told


def test_labels_of_one_class_give_no_balanced_accuracy(site: Path, tmp_path: Path) -> None:
    names = [name for name, _ in find_files([site / "other"])]
    (tmp_path / "labels.csv").write_text("\n".join(["path,label", *(f"{n},a" for n in names)]))
    options = ("--labels", tmp_path / "labels.csv", "--out", tmp_path / "out")
    content = run_json("adapt", site / "model", site / "other", *options)
    assert content["balanced_accuracy"] is None and content["labelled"] == 40
    assert "the labelled images hold one class" in " ".join(content["warnings"])


def test_an_image_in_several_rows_of_a_table_counts_once(site: Path, tmp_path: Path) -> None:
    rows = ["path,finding", *(f"{n:02}.png,{m}" for n in range(5) for m in "xyz")]
    (site / "other" / "table.csv").write_text("\n".join(rows))
    options = ("--out", tmp_path / "out")
    try:
        content = run_json("adapt", site / "model", site / "other" / "table.csv", *options)
    finally:
        (site / "other" / "table.csv").unlink()
    assert content["images"] == 5


def test_labels_without_a_path_are_said(site: Path, tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("path,label\n00.png,a\n,b\n,c\n")
    options = ("--labels", tmp_path / "labels.csv", "--out", tmp_path / "out")
    told = complaint("adapt", site / "model", site / "other", *options)
    assert "labels.csv, row 3 without a path: fill it in, or remove the row" in told


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [("license: ours: all of it", "mapping values"), ("- mit", "repo card metadata block should")],
)
def test_an_edited_card_that_cannot_be_read_is_named_before_the_work(
    metadata: str, reason: str, site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TrainedModel, "read", lambda *_: pytest.fail("the work began"))
    shutil.copytree(site / "model", tmp_path / "model")
    (tmp_path / "model" / "README.md").write_text(f"---\n{metadata}\n---\n# Ours\n")
    told = complaint("adapt", tmp_path / "model", site / "other", "--out", tmp_path / "out")
    assert f"README.md cannot be read ({reason}" in told and "mend the lines" in told
    assert not (tmp_path / "out").exists()


def test_labels_that_name_no_image_are_said(site: Path, tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("path,label\nelsewhere.png,a\n")
    options = ("--labels", tmp_path / "labels.csv", "--out", tmp_path / "out")
    told = complaint("adapt", site / "model", site / "other", *options)
    assert "no labelled image is among those of the site" in told
    (tmp_path / "labels.csv").write_text("path,label\n00.png,a\nelsewhere.png,a\n01.png,b\n")
    content = run_json("adapt", site / "model", site / "other", *options)
    assert content["labelled"] == 2
    said = "1 of 3 labelled images not used, as not among those of the site: elsewhere.png"
    assert said in content["warnings"]


def test_labelled_images_beyond_the_limit_are_said(site: Path, tmp_path: Path) -> None:
    names = [name for name, _ in find_files([site / "other"])]
    (tmp_path / "labels.csv").write_text("\n".join(["path,label", *(f"{n},a" for n in names)]))
    options = ("--labels", tmp_path / "labels.csv", "--limit", 10, "--out", tmp_path / "out")
    content = run_json("adapt", site / "model", site / "other", *options)
    assert content["images"] == content["labelled"] == 10
    (said,) = [text for text in content["warnings"] if "not used" in text]
    assert said.startswith("30 of 40 labelled images not used, as not among those of the site, or ")
    assert "or among the 30 images that --limit left out: " in said


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts the open descriptors")
def test_files_that_other_processes_read_stay_within_the_descriptors(
    site: Path, tmp_path: Path
) -> None:
    resource = pytest.importorskip("resource")
    for n in range(150):
        shutil.copy(site / "other" / "00.png", tmp_path / f"{n}.png")
    model = TrainedModel.read(site / "model")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 100, hard))
    try:
        read = read_site(model, find_files([tmp_path]), workers=1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert read.pixels.shape == (150, 1, 32, 32) and len(read.looks) == 150


def test_an_image_has_one_label_however_its_path_is_written(site: Path, tmp_path: Path) -> None:
    labels = tmp_path / "labels.csv"
    options = ("--labels", labels, "--out", tmp_path / "out")
    for other in ("00.png", "./00.png", ".\\00.png"):
        labels.write_text(f"path,label\n00.png,a\n01.png,b\n,\n{other},c\n")
        told = complaint("adapt", site / "model", site / "other", *options)
        assert "row 5: 00.png has another label in row 2: keep one of the rows" in told
    labels.write_text("path,label\n.\\00.png,a\n./01.png,b\n00.png,\n00.png,a\n")
    assert run_json("adapt", site / "model", site / "other", *options)["labelled"] == 2


def test_labels_find_images_of_a_table_however_both_write_the_path(
    site: Path, tmp_path: Path
) -> None:
    shutil.copytree(site / "other", tmp_path / "other")
    (tmp_path / "images.csv").write_text("path\n.\\other\\00.png\n./other/01.png\n")
    (tmp_path / "labels.csv").write_text("path,label\nother/00.png,a\nother//01.png,b\n")
    options = ("--labels", tmp_path / "labels.csv", "--out", tmp_path / "out")
    content = run_json("adapt", site / "model", tmp_path / "images.csv", *options)
    assert content["labelled"] == 2


def test_thresholds_are_chosen_where_both_answers_are_known() -> None:
    recipe = Recipe.from_dict(
        {
            "size": 32, "channels": 1, "mean": [0.5], "std": [0.5], "task": "multilabel",
            "classes": ["a", "b"], "thresholds": [0.5, 0.3],
        }
    )  # fmt: skip
    torch.manual_seed(0)
    labels = torch.stack([torch.arange(40) % 2, torch.ones(40)], 1).float()
    labels[0, 0] = float("nan")
    scores = 4 * labels.nan_to_num(0) - 5 + torch.rand(40, 2)
    found, notes = operating_point(recipe, scores, labels)
    assert found.thresholds is not None and found.thresholds[1] == 0.3
    named = found.named(found.probabilities(scores))
    assert torch.equal(named[1:, 0], labels[1:, 0] == 1)
    assert notes == ["b keeps its threshold of 0.300: the labelled images do not hold both answers"]


def test_a_threshold_that_rests_on_few_positives_or_negatives_is_told() -> None:
    recipe = Recipe.from_dict(
        {
            "size": 32, "channels": 1, "mean": [0.5], "std": [0.5], "task": "multilabel",
            "classes": ["a", "b", "c", "d"], "thresholds": [0.5] * 4,
        }
    )  # fmt: skip
    counts = torch.tensor([10, 1, 31, 0])
    labels = (torch.arange(40)[:, None] < counts).float()
    labels[39, 2] = float("nan")
    torch.manual_seed(0)
    _, notes = operating_point(recipe, torch.randn(40, 4), labels)
    (note,) = [text for text in notes if "are uncertain" in text]
    assert "fewer than 10 labelled images" in note
    assert "are uncertain: b (1 with it, 39 without), c (31 with it, 8 without). Check" in note


def test_the_card_of_several_labels_shows_the_new_thresholds(tmp_path: Path) -> None:
    pictures(tmp_path / "images", "multilabel", count=12)
    pictures(tmp_path / "other", "multilabel", count=40, seed=1)
    trained(tmp_path / "model", "multilabel", tmp_path / "images")
    names = [name for name, _ in find_files([tmp_path / "other"])]
    rows = [f"{name},{index % 2},{index // 20},0" for index, name in enumerate(names)]
    (tmp_path / "labels.csv").write_text("\n".join(["path,a,b,c", *rows]))
    out = tmp_path / "out"
    options = ("--labels", tmp_path / "labels.csv", "--out", out)
    told = run_json("adapt", tmp_path / "model", tmp_path / "other", *options)
    recipe = Recipe.read(out)
    assert recipe.thresholds is not None and recipe.thresholds[2] == 0.55
    answers = predict(TrainedModel.read(out), find_files([tmp_path / "other"]))
    for name, (_, share) in told["shares"].items():
        assert share == np.mean([name in answer.predicted for answer in answers])
    assert recipe.thresholds[:2] != (0.45, 0.5)
    card = (out / "README.md").read_text()
    for place, (name, threshold) in enumerate(zip("abc", recipe.thresholds, strict=True)):
        assert f"| {place} | {name} | {threshold:.4g} |" in card
    model = TrainedModel.read(out)
    small = replace(model.recipe, thresholds=(3.2e-05, 0.5, 0.55))
    found = adapt(model, read_site(model, find_files([tmp_path / "other"])))
    found = replace(found, model=replace(found.model, recipe=small))
    write_adapted(found, out, tmp_path / "small", site="there")
    assert "| 0 | a | 3.2e-05 |" in (tmp_path / "small" / "README.md").read_text()
    write_adapted(replace(found, model=model), tmp_path / "small", tmp_path / "back", site="there")
    shown = (tmp_path / "back" / "README.md").read_text()
    assert f"| 0 | a | {recipe.thresholds[0]:.4g} |" in shown
    code = code_of(out)
    assert repr(list(recipe.thresholds)) in code and repr(recipe.temperature) in code

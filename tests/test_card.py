"""Model cards: metadata that the hub accepts, code that runs, numbers that were measured."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from huggingface_hub import HfApi, metadata_load
from huggingface_hub import ModelCard as HubCard
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from torch import nn

from inmerge_wrap import InMergeWrapper, NoEffectWarning, Quantile, ZScore, export_timm
from inmerge_wrap.card import (
    PLACE,
    CardResult,
    ModelCard,
    merging_settings,
    push_to_hub,
    results_of,
)
from inmerge_wrap.markdown import plain_text
from inmerge_wrap.plots import plot_pairs
from inmerge_wrap.robustness import evaluate_robustness
from inmerge_wrap.similarity import measure_similarity

ARCH = "resnet10t"
DATA = {"input_size": (3, 32, 32), "mean": [0.5] * 3, "std": [0.25] * 3}


def small_card(**fields: Any) -> ModelCard:
    given = {"title": "Skin", "license": "cc-by-nc-4.0", "training_data": "HAM10000, 7,007 images."}
    return ModelCard(**{**given, **fields})


@pytest.fixture(scope="module")
def model() -> InMergeWrapper:
    torch.manual_seed(0)
    net = timm.create_model(ARCH, num_classes=3)
    model = steps_of(InMergeWrapper(net, similarity_threshold=-1.0, merge_probability=0.7, seed=5))
    model.recalibrate([torch.randn(8, 3, 32, 32)])
    return model.eval()


def write(model: nn.Module, folder: Path, card: Any, **options: Any) -> str:
    export_timm(model, folder, card=card, **DATA, **options)
    return (folder / "README.md").read_text(encoding="utf-8")


# -- metadata ------------------------------------------------------------------------------------


def test_metadata_is_what_the_hub_reads(model: nn.Module, tmp_path: Path) -> None:
    results = [
        CardResult("accuracy", 0.7654321, "DermaMNIST", dataset_id="medmnist/dermamnist"),
        CardResult("auroc", 0.9, "DermaMNIST", dataset_id="medmnist/dermamnist"),
        CardResult("accuracy", 0.6, "DermaMNIST", config="corrupted"),
        CardResult("kappa", 0.5, 'Ward 7: "B|C"', split="val", interval=(0.4, 0.6)),
    ]
    card = small_card(
        results=results,
        datasets=["medmnist"],
        base_model="timm/resnet10t.c3_in1k",
        tags=["dermatology", "timm"],
    )
    write(model, tmp_path, card)
    metadata = metadata_load(tmp_path / "README.md")
    assert metadata["library_name"] == "timm"
    assert metadata["pipeline_tag"] == "image-classification"
    assert metadata["license"] == "cc-by-nc-4.0"
    assert metadata["datasets"] == ["medmnist"]
    assert metadata["base_model"] == "timm/resnet10t.c3_in1k"
    assert metadata["tags"].count("timm") == 1 and "dermatology" in metadata["tags"]
    parsed = HubCard.load(tmp_path / "README.md").data
    assert parsed.model_name == "Skin"
    found = [
        (r.dataset_name, r.dataset_config, r.dataset_split, r.metric_type, r.metric_value)
        for r in parsed.eval_results
    ]
    assert sorted(found, key=str) == sorted(
        [(r.dataset, r.config, r.split, r.metric, round(r.value, 6)) for r in results], key=str
    )


def test_a_card_without_results_claims_none(model: nn.Module, tmp_path: Path) -> None:
    text = write(model, tmp_path, small_card())
    assert "model-index" not in metadata_load(tmp_path / "README.md")
    assert "No results were measured for this card." in text


def test_titles_and_cells_can_not_break_the_card(model: nn.Module, tmp_path: Path) -> None:
    title = "A: 'strange' # title\n---\nlicense: mit"
    results = [CardResult("accuracy", 0.5, "a|b", note="two\nlines")]
    text = write(model, tmp_path, small_card(title=title, results=results))
    metadata = metadata_load(tmp_path / "README.md")
    assert metadata["license"] == "cc-by-nc-4.0"
    assert metadata["model-index"][0]["name"] == "A: 'strange' # title --- license: mit"
    assert "| a\\|b | test | Accuracy | 0.5000 |  | two lines |" in text


def html_of(card: ModelCard, labels: list[str] | None = None) -> str:
    """The card as a renderer of GitHub's Markdown shows it, without its metadata."""
    text = card.render(architecture=ARCH, data_config=DATA, label_names=labels)
    return MarkdownIt("commonmark").enable("table").render(text.split("\n---\n", 1)[1])


def shown(html: str) -> str:
    """What a reader sees of a page."""
    return " ".join(unescape(re.sub(r"<[^>]*>", "", html)).split())


HOSTILE = [
    "<script>alert(1)</script>",
    "![x](https://example.org/pixel.png)",
    "<img src=https://example.org/pixel.png>",
    "two\n\n# lines\r- x",
    "[x][y]\n\n[y]: https://example.org",
    "a | b `c` *d* _e_ __f__ ~~g~~ &lt;h&gt; \\< i_j",
    "\x1b[31mred",
    "\u2028sep\u0085arated",
]


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
@pytest.mark.parametrize("name", HOSTILE)
def test_names_from_folders_of_strangers_are_shown_and_not_run(name: str, task: str) -> None:
    card = small_card(
        title=name,
        task=task,
        merging={"in words": name, name: name},
        results=[CardResult("accuracy", 0.5, name, split=name, note=name)],
    )
    html = html_of(card, ["first", name])
    plain = html_of(
        small_card(
            title="x",
            task=task,
            merging={"in words": "x", "x": "x"},
            results=[CardResult("accuracy", 0.5, "x", split="x", note="x")],
        ),
        ["first", "x"],
    )
    tags = re.compile(r"<[^>]*>")
    assert tags.findall(html) == tags.findall(plain)
    wanted = " ".join("".join(c if c >= " " else " " for c in name).split())
    assert shown(html).count(wanted) == 8


@settings(max_examples=50, deadline=None)
@given(st.text(st.characters(codec=None), max_size=40))
def test_any_class_name_is_shown_as_it_is(name: str) -> None:
    html = html_of(small_card(task="multilabel"), ["before", name, "after"])
    cells = re.findall(r"<td>(.*?)</td>", html, re.DOTALL)
    readable = name.encode("utf-8", "replace").decode()
    wanted = " ".join(re.sub(r"[\x00-\x1f\x7f]", " ", readable).split())
    assert [unescape(cell) for cell in cells[:9]] == [
        *("0", "before", "0.5"), "1", wanted, "0.5", *("2", "after", "0.5"),
    ]  # fmt: skip


def test_a_name_inside_of_prose_is_shown_as_it_is() -> None:
    for name in HOSTILE:
        html = html_of(small_card(description=f"Tells apart {plain_text(name)}."))
        wanted = " ".join("".join(c if c >= " " else " " for c in name).split())
        assert f"Tells apart {wanted}." in shown(html)


def test_prose_keeps_its_markdown_but_neither_html_nor_pictures() -> None:
    text = "**Bold**, [a page](https://example.org), 3 < 4 & 5.\n\n<b>N</b> ![p](https://e.org/p)"
    html = html_of(small_card(training_data=text, description=text))
    assert html.count("<strong>Bold</strong>") == 2
    assert html.count('<a href="https://example.org">a page</a>, 3 &lt; 4 &amp; 5.</p>') == 2
    assert "<img" not in html and "<b>" not in html


@pytest.mark.parametrize("link", ["javascript:alert(1)", "https://e.org/a) <script>", "x y"])
def test_a_link_that_is_none_is_refused(link: str) -> None:
    with pytest.raises(ValueError, match="neither a web address nor a file name"):
        small_card(license_link=link)


def test_the_licence_other_carries_its_name(model: nn.Module, tmp_path: Path) -> None:
    card = small_card(license="other", license_name="ward-7", license_link="https://example.org/l")
    text = write(model, tmp_path, card)
    metadata = metadata_load(tmp_path / "README.md")
    assert (metadata["license"], metadata["license_name"]) == ("other", "ward-7")
    assert "[ward-7](https://example.org/l)" in text


# -- tasks ---------------------------------------------------------------------------------------


def test_a_card_of_several_labels_names_sigmoid_and_thresholds(tmp_path: Path) -> None:
    net = timm.create_model("test_resnet", num_classes=3)
    card = small_card(task="multilabel", thresholds=[0.145, 0.388, 0.5])
    text = write(net, tmp_path, card, label_names=["edema", "mass", "nodule"])
    assert "for multi-label image classification" in text and "torch.sigmoid(scores)" in text
    assert "| 0 | edema | 0.145 |\n| 1 | mass | 0.388 |\n| 2 | nodule | 0.5 |" in text
    assert "softmax" not in text and "multi-label" in metadata_load_text(text)["tags"]
    with pytest.raises(ValueError, match="3 thresholds for 2 classes"):
        card.render(architecture=ARCH, data_config=DATA, label_names=["edema", "mass"])


def test_a_card_says_what_its_scores_mean() -> None:
    one = small_card(task="binary").render(architecture=ARCH, data_config=DATA)
    assert "torch.sigmoid(scores)" in one and "counts as found above 0.5" in one
    several = small_card().render(architecture=ARCH, data_config=DATA)
    assert "scores.softmax(-1)" in several and "sigmoid" not in several


@pytest.mark.parametrize(
    ("outputs", "channels", "fields", "message"),
    [
        (1, 3, {}, "'multiclass' of the card does not fit 1 outputs: a single output is 'binary'"),
        (3, 3, {"task": "binary"}, "'binary' of the card does not fit 3 outputs"),
        (3, 12, {}, "not 12 channels: pass the code"),
    ],
)
def test_a_card_that_would_misuse_the_network_is_refused(
    tmp_path: Path, outputs: int, channels: int, fields: dict[str, Any], message: str
) -> None:
    net = timm.create_model("test_resnet", num_classes=outputs, in_chans=channels)
    pixels = {"input_size": (channels, 32, 32), "mean": [0.5] * channels, "std": [0.5] * channels}
    with pytest.raises(ValueError, match=message):
        export_timm(net, tmp_path, card=small_card(**fields), **pixels)


def test_figures_say_at_which_thresholds_they_were_measured() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    labels = torch.tensor([[n % 2, n // 2 % 2] for n in range(16)])
    data = [(torch.rand(16, 3, 2, 2), labels)]
    notes = {}
    for threshold in (0.25, [0.25, 0.75]):
        result = evaluate_robustness(
            net,
            data,
            preset="quick",
            task="multilabel",
            severities=[1],
            bootstrap=0,
            threshold=threshold,
        )
        for entry in results_of(result, dataset="D"):
            notes.setdefault(entry.metric, []).append(entry.note)
    each, several = "at each class's threshold", "mean of 5 corruptions at severity 1"
    assert notes["accuracy"] == [
        "at threshold 0.25", f"{several}; at threshold 0.25", each, f"{several}; {each}",
    ]  # fmt: skip
    assert set(notes["auroc"]) == {"", several}


def test_code_of_ones_own_replaces_that_of_timm(tmp_path: Path) -> None:
    code = f'import timm\nmodel = timm.create_model("{PLACE}", pretrained=True)  # ```'
    text = write(timm.create_model("test_resnet", num_classes=3), tmp_path, small_card(code=code))
    (block,) = re.findall(r"^(`{4,})python\n(.*?)\n\1$", text, re.DOTALL | re.MULTILINE)
    assert block[1] == code and "images of 8 bits" not in text
    with pytest.raises(ValueError, match="must load the model from"):
        small_card(code="model = None")


# -- text ----------------------------------------------------------------------------------------


def test_the_code_of_the_card_loads_the_model_and_its_preprocessing(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = write(model, tmp_path / "export", small_card(), label_names=["nevus", "melanoma", "x"])
    assert "Outputs: 0 nevus, 1 melanoma, 2 x." in text
    from PIL import Image

    pixels = torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(tmp_path / "image.png")
    monkeypatch.chdir(tmp_path)
    code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0]
    assert "local-dir:path/to/this/folder" in code
    names: dict[str, Any] = {}
    exec(code.replace("path/to/this/folder", str(tmp_path / "export")), names)
    with torch.no_grad():
        expected = model((pixels.permute(2, 0, 1)[None].float() / 255 - 0.5) / 0.25)
    # Image and tensor are normalised by other code, in another order.
    assert torch.allclose(names["scores"], expected, rtol=1e-4, atol=1e-5)


def test_grey_models_open_grey_images(tmp_path: Path) -> None:
    net = timm.create_model(ARCH, num_classes=2, in_chans=1)
    export_timm(net, tmp_path, input_size=(1, 32, 32), mean=[0.5], std=[0.5], card=small_card())
    text = (tmp_path / "README.md").read_text()
    assert 'convert("L")' in text and "Images are 1 x 32 x 32" in text


def test_medical_limits_are_said_unless_replaced(model: nn.Module, tmp_path: Path) -> None:
    text = write(model, tmp_path / "a", small_card())
    assert "not a medical device" in " ".join(text.split())
    assert "another scanner" in text and "HAM10000, 7,007 images." in text
    own = write(model, tmp_path / "b", small_card(limits=["Fails on hair."], intended_use="Demo."))
    assert "- Fails on hair." in own and "Demo." in own and "another scanner" not in own


def test_merging_settings_are_those_of_the_wrapper(model: InMergeWrapper, tmp_path: Path) -> None:
    settings = merging_settings(nn.Sequential(model))
    text = write(model, tmp_path / "a", small_card())
    for name, value in settings.items():
        assert (f"| {name} | {value} |" in text) == (name != "in words")
    assert settings["in words"] in text
    report = model.report()
    assert settings["merge_probability (p)"] == 0.7
    assert settings["optimizer steps"] == 2 and settings["seed"] == 5
    assert (
        settings["merged pairs"] == f"{report.merged:,} of {report.drawn:,} drawn pairs (100.00%)"
    )
    assert all(site.name in settings["merged layers"] for site in model.plan.merged)
    assert merging_settings(model.module) == {}
    assert "In-model merging** (" not in write(model.module, tmp_path / "b", small_card())
    given = small_card(merging={"tau": 0.25})
    assert "| tau | 0.25 |" in write(model, tmp_path / "c", given)


def steps_of(model: InMergeWrapper, count: int = 2) -> InMergeWrapper:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model.attach(optimizer)
    for _ in range(count):
        model(torch.randn(2, 3, 32, 32)).sum().backward()
        optimizer.step()
    return model.eval()


def claims(text: str) -> list[str]:
    """Every place of a card that says or implies that merging took part in the training."""
    found = ["tag"] if "in-model-merging" in metadata_load_text(text)["tags"] else []
    body = text.split("---", 2)[2]
    return found + re.findall(r"trained with in-model|merging happened|2502\.20516|wang2025", body)


def metadata_load_text(text: str) -> dict[str, Any]:
    return yaml.safe_load(text.split("---")[1])


def test_the_card_of_a_network_that_merged_says_so(model: nn.Module, tmp_path: Path) -> None:
    text = write(model, tmp_path, small_card())
    assert {"tag", "trained with in-model", "merging happened", "2502.20516", "wang2025"} <= set(
        claims(text)
    )


def test_the_card_of_a_network_that_never_merged_claims_nothing(tmp_path: Path) -> None:
    net = timm.create_model(ARCH, num_classes=3)
    text = write(net, tmp_path / "bare", small_card())
    assert claims(text) == [] and "erging" not in text and "## Citation" not in text
    own = write(net, tmp_path / "own", small_card(citation="@misc{ours}"))
    assert "## Citation" in own and "@misc{ours}" in own and claims(own) == []


@pytest.mark.parametrize("case", ["never fired", "never attached"])
def test_the_card_of_merging_without_effect_says_that(tmp_path: Path, case: str) -> None:
    model = InMergeWrapper(timm.create_model(ARCH, num_classes=3), similarity_threshold=1.0)
    if case == "never fired":
        steps_of(model)
        text = write(model, tmp_path, small_card())
    else:
        model(torch.randn(2, 3, 32, 32))
        with pytest.warns(NoEffectWarning, match="never merged"):
            text = write(model.eval(), tmp_path, small_card())
    assert set(claims(text)) <= {"2502.20516"}  # the name of the method may be explained
    assert "set up but had no effect: this is a plain training run" in text
    assert "a plain training run" in merging_settings(model)["merged pairs"]
    (tmp_path / "sure").mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NoEffectWarning)
        told = write(model, tmp_path / "sure", small_card(merging={"tau": 0.25}))
    assert "tag" not in claims(told), "the report knows better than the card"


def test_the_card_of_an_average_leaves_open_what_its_copy_cannot_know(tmp_path: Path) -> None:
    average = torch.optim.swa_utils.AveragedModel(
        InMergeWrapper(timm.create_model(ARCH, num_classes=3))
    )
    text = write(average, tmp_path, small_card())
    assert claims(text) == [] and "no effect" not in text


def test_the_card_tells_what_kind_of_merging_it_was() -> None:
    net = timm.create_model("test_resnet", num_classes=3)
    model = InMergeWrapper(net, mode="weights", direction="gaussian", radius=0.2)
    settings = merging_settings(model)
    assert (settings["mode"], settings["direction"], settings["radius"]) == (
        "weights", "gaussian", 0.2,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (
            {},
            "After each optimizer step, pairs of kernels of a layer were drawn; in pairs with a "
            "cosine above 0.3, a kernel moved toward its partner. The moved kernels stayed in",
        ),
        (
            {"similarity_threshold": -1.0, "mode": "outputs", "direction": "signed", "radius": 0.3},
            "In each forward pass of the training and for each image, on the outputs, pairs of "
            "kernels of a layer were drawn; in pairs however similar, a kernel moved toward its "
            "partner or away from it, as the draw said. No weight was written.",
        ),
        (
            {"similarity_threshold": -1.0, "mode": "weights"},
            "In each forward pass of the training, pairs of kernels of a layer were drawn; in "
            "pairs however similar, a kernel moved toward its partner. No weight was written.",
        ),
        ({"similarity_threshold": ZScore(2.0)}, "2 standard deviations more similar than chance"),
        ({"similarity_threshold": Quantile(0.1)}, "pairs the most similar 10% of those drawn"),
        ({"merge_weight": 1.2}, "moved away from its partner"),
        ({"direction": "gaussian", "radius": 0.3}, "moved in a random direction"),
        ({"direction": "multiplicative", "radius": 0.3}, "multiplied by random factors"),
    ],
)
def test_the_sentence_on_merging_follows_from_the_settings(
    given: dict[str, Any], told: str, tmp_path: Path
) -> None:
    model = steps_of(
        InMergeWrapper(timm.create_model("test_resnet", num_classes=3), **given), count=1
    )
    stored = json.loads(json.dumps({k: str(v) for k, v in merging_settings(model).items()}))
    card = small_card(merging=stored, merged=True)
    assert told in card.render(architecture=ARCH, data_config=DATA)
    assert "in words" not in card.render(architecture=ARCH, data_config=DATA)


def test_robustness_results_and_picture(model: nn.Module, tmp_path: Path) -> None:
    images, labels = torch.rand(12, 3, 32, 32), torch.arange(12) % 3
    result = evaluate_robustness(
        model, [(images, labels)], preset="quick", severities=[2], bootstrap=20
    )
    results = results_of(result, dataset="Noise", metrics=["accuracy", "ece"])
    clean, corrupted = result.row("clean"), result.row("all")
    assert [(r.config, r.metric, r.value) for r in results] == [
        (None, "accuracy", clean["accuracy"]),
        (None, "ece", clean["ece"]),
        ("corrupted", "accuracy", corrupted["accuracy"]),
        ("corrupted", "ece", corrupted["ece"]),
    ]
    assert results[0].interval == (clean["accuracy_low"], clean["accuracy_high"])
    assert results_of(result, dataset="Noise", metrics="ece") == results[1::2]
    assert results[2].note == "mean of 5 corruptions at severity 2"
    figure = plot_pairs(measure_similarity(model, include="layer4.*"))
    text = write(model, tmp_path / "a", small_card(results=results, robustness_picture=figure))
    assert "![Robustness](robustness.png)" in text
    picture = tmp_path / "a" / "robustness.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    shutil.copy(picture, tmp_path / "mine.PNG")
    card = small_card(robustness_picture=tmp_path / "mine.PNG")
    assert "![Robustness](robustness.png)" in write(model, tmp_path / "b", card)
    assert (tmp_path / "b" / "robustness.png").read_bytes() == picture.read_bytes()


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"title": " "}, "title of the card is empty"),
        ({"training_data": ""}, "training_data of the card is empty"),
        ({"license": "Apache 2.0"}, "not an identifier of the Hub"),
        ({"license": "other"}, "license=other needs license_name"),
        ({"datasets": "ham10000"}, "must be a list"),
        ({"colour": "red"}, "its fields are title"),
        ({"results": [{"metric": "accuracy"}]}, "does not fit"),
        ({"title": 3}, "does not fit"),
        (
            {"results": [{"metric": "auroc", "value": "0.8", "dataset": "D"}]},
            "value of a result must be a number, got '0.8'",
        ),
    ],
)
def test_malformed_cards(fields: dict[str, Any], told: str) -> None:
    good = {"title": "Skin", "license": "mit", "training_data": "Ten images."}
    assert ModelCard.from_dict(good).title == "Skin"
    with pytest.raises(ValueError, match=told):
        ModelCard.from_dict(good | fields)


def test_a_bad_card_leaves_an_earlier_export_alone(model: nn.Module, tmp_path: Path) -> None:
    write(model, tmp_path, small_card())
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for card in ({"title": "x"}, small_card(robustness_picture="no.png")):
        with pytest.raises(ValueError, match=r"does not fit|not a PNG"):
            export_timm(model, tmp_path, card=card, **DATA)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


# -- the hub -------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Stands in for the two calls that reach the network, and keeps what they were given."""
    seen: dict[str, Any] = {}

    def create_repo(self: HfApi, repo_id: str, **options: Any) -> None:
        seen["created"] = (repo_id, options)

    def create_commit(self: HfApi, repo_id: str, operations: list[Any], **options: Any) -> None:
        files = {}
        for added in operations:
            with added.as_file() as file:
                files[added.path_in_repo] = file.read()
        seen.update(token=self.token, uploaded=repo_id, files=files, options=options)

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    return seen


def test_push_uploads_the_export_and_nothing_else(
    model: nn.Module, tmp_path: Path, hub: dict[str, Any]
) -> None:
    figure = plot_pairs(measure_similarity(model, include="layer4.*"))
    write(model, tmp_path, small_card(robustness_picture=figure))
    for name in ("optimizer.bin", "robustness.json"):
        (tmp_path / name).write_text("not for everybody")
    line = push_to_hub(tmp_path, "ward/skin", private=True, token="hf_x", message="First")
    assert line == 'timm.create_model("hf-hub:ward/skin", pretrained=True)'
    assert hub["created"] == ("ward/skin", {"private": True, "exist_ok": True})
    assert (hub["uploaded"], hub["token"]) == ("ward/skin", "hf_x")
    assert hub["options"] == {"commit_message": "First"}
    assert set(hub["files"]) == {
        "README.md", "config.json", "model.safetensors", "robustness.png",
    }  # fmt: skip
    for name in set(hub["files"]) - {"README.md"}:
        assert hub["files"][name] == (tmp_path / name).read_bytes()
    card = hub["files"]["README.md"].decode()
    assert line.replace("timm.create_model(", "") in card and "local-dir:" not in card
    assert "local-dir:" in (tmp_path / "README.md").read_text(), "the folder itself stays"
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "timm"


def test_push_refuses_what_is_no_export(
    model: nn.Module, tmp_path: Path, hub: dict[str, Any]
) -> None:
    export_timm(model, tmp_path, **DATA)
    with pytest.raises(ValueError, match=r"has no README\.md: write the folder with"):
        push_to_hub(tmp_path, "ward/skin")
    write(model, tmp_path, small_card())
    with pytest.raises(ValueError, match="user/name"):
        push_to_hub(tmp_path, "skin")
    assert hub == {}


def test_the_card_of_a_command_line_is_plain_data(model: nn.Module, tmp_path: Path) -> None:
    content = {
        "title": "Skin",
        "license": "mit",
        "training_data": "Ten images.",
        "results": [{"metric": "auroc", "value": 0.8, "dataset": "D", "interval": [0.7, 0.9]}],
    }
    text = write(model, tmp_path, json.loads(json.dumps(content)))
    assert "| D | test | AUROC | 0.8000 | 0.7000 to 0.9000 |  |" in text

"""Exported weights load as a stranger loads them: in a process that never saw this library."""

from __future__ import annotations

import json
import math
import re
import resource
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torchvision
from ema_pytorch import EMA
from huggingface_hub import HfApi, RepoUrl
from PIL import Image
from timm.models._hub import push_to_hf_hub, save_for_hf
from torch import nn
from torch.nn.utils import parametrizations, prune

from inmerge_wrap import InMergeWrapper, NoEffectWarning, export_timm, export_weights
from inmerge_wrap.export import plain_state_dict
from tests.stranger import Stranger

LOADING = """
import timm, torch, torchvision
from safetensors.torch import load_file
model = {load}
image = torch.load("image.pt")
with torch.no_grad():
    torch.save(model.eval()(image), "logits.pt")
"""


def merged(net: nn.Module, image: torch.Tensor, *, recalibrate: bool = True) -> InMergeWrapper:
    """A wrapper after two real training steps in which every drawn pair merged."""
    model = InMergeWrapper(net, similarity_threshold=-1.0, merge_probability=1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model.attach(optimizer)
    for _ in range(2):
        model(image).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert model.report().merged > 0
    if recalibrate:
        model.recalibrate([image])
    return model.eval()


def strangers_logits(
    stranger: Stranger, folder: Path, image: torch.Tensor, load: str
) -> torch.Tensor:
    torch.save(image, folder / "image.pt")
    stranger.run(LOADING.format(load=load), folder)
    return torch.load(folder / "logits.pt")


def ours(model: nn.Module, image: torch.Tensor) -> torch.Tensor:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the number of threads changes the order of sums
    with torch.no_grad():
        logits = model(image)
    torch.set_num_threads(threads)
    return logits


PREPARED: dict[str, Any] = {"input_size": (3, 32, 32), "mean": [0.5] * 3, "std": [0.5] * 3}


@pytest.fixture
def image() -> torch.Tensor:
    return torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))


def test_timm_loads_the_weights_file(
    tmp_path: Path, image: torch.Tensor, stranger: Stranger
) -> None:
    model = merged(timm.create_model("resnet10t", num_classes=3, in_chans=1), image)
    export_weights(model, tmp_path / "w.safetensors")
    call = (
        "timm.create_model('resnet10t', num_classes=3, in_chans=1, checkpoint_path='w.safetensors')"
    )
    assert torch.equal(strangers_logits(stranger, tmp_path, image, call), ours(model, image))


def test_timm_loads_the_folder(tmp_path: Path, image: torch.Tensor, stranger: Stranger) -> None:
    model = merged(timm.create_model("resnet10t", num_classes=3, in_chans=1), image)
    call = export_timm(
        model,
        tmp_path / "net",
        input_size=(1, 32, 32),
        mean=[0.4],
        std=[0.3],
        label_names=["a", "b", "c"],
    )
    assert torch.equal(strangers_logits(stranger, tmp_path, image, call), ours(model, image))
    assert sorted(path.name for path in (tmp_path / "net").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    loaded = timm.create_model(f"local-dir:{tmp_path / 'net'}", pretrained=True)
    used = timm.data.resolve_model_data_config(loaded)
    assert tuple(used["input_size"]) == (1, 32, 32)
    assert [*used["mean"], *used["std"]] == [0.4, 0.3]
    assert used["crop_pct"] == 1.0
    config = json.loads((tmp_path / "net" / "config.json").read_text())
    assert config["label_names"] == ["a", "b", "c"]
    assert "inmerge" not in json.dumps(config).lower()


def test_torchvision_loads_the_weights_file(tmp_path: Path, stranger: Stranger) -> None:
    image = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    model = merged(torchvision.models.resnet18(num_classes=4), image)
    export_weights(model, tmp_path / "w.safetensors")
    load = "torchvision.models.resnet18(num_classes=4)\n"
    load += "model.load_state_dict(load_file('w.safetensors'))"
    assert torch.equal(strangers_logits(stranger, tmp_path, image, load), ours(model, image))


def test_the_file_is_plain_and_reproducible(tmp_path: Path, image: torch.Tensor) -> None:
    net = timm.create_model("resnet10t", num_classes=3, in_chans=1)
    model = InMergeWrapper(net.to(memory_format=torch.channels_last))
    first, second = (export_weights(model, tmp_path / f"{i}.safetensors") for i in range(2))
    assert first.read_bytes() == second.read_bytes()
    with safetensors.safe_open(first, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(net.state_dict())
    assert list(tmp_path.iterdir()) and not list(tmp_path.glob(".*"))


def test_the_folder_of_a_channels_last_network_loads(tmp_path: Path) -> None:
    net = timm.create_model("resnet10t", num_classes=3).to(memory_format=torch.channels_last)
    export_timm(net, tmp_path / "net", **PREPARED)
    loaded = timm.create_model(f"local-dir:{tmp_path / 'net'}", pretrained=True).eval()
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, net.state_dict()[name]), name
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "net").iterdir()}
    assert len(set(modes.values())) == 1 and set(modes) == {"config.json", "model.safetensors"}


def test_the_export_leaves_the_generators_alone_and_compiles_nothing(tmp_path: Path) -> None:
    net = timm.create_model("test_resnet", num_classes=3)
    compiled: list[int] = []
    net.layer1 = torch.compile(net.layer1, backend=lambda graph, _: compiled.append(1) or graph)
    before = torch.get_rng_state()
    torch.set_default_device("meta")
    try:
        export_timm(net, tmp_path / "net", **PREPARED)
    finally:
        torch.set_default_device(None)
    assert torch.equal(torch.get_rng_state(), before)
    assert compiled == []


def test_another_default_dtype_does_not_matter(
    tmp_path: Path, image: torch.Tensor, stranger: Stranger
) -> None:
    network = merged(timm.create_model("test_resnet", num_classes=3, in_chans=1), image)
    data = {"input_size": (1, 32, 32), "mean": [0.5], "std": [0.2]}
    torch.set_default_dtype(torch.float64)
    try:
        load = export_timm(network, tmp_path / "out", **data)
    finally:
        torch.set_default_dtype(torch.float32)
    found = strangers_logits(stranger, tmp_path, image, load)
    assert torch.equal(found, ours(network, image))


def test_means_and_names_in_arrays_are_stored(tmp_path: Path) -> None:
    pixels = torch.rand(8, 3, 32, 32)
    measured = {"mean": pixels.mean((0, 2, 3)), "std": pixels.numpy().std((0, 2, 3))}
    net, names = timm.create_model("test_resnet", num_classes=2), np.array(["no", "yes"])
    export_timm(net, tmp_path, input_size=pixels[0].shape, label_names=names, **measured)
    assert json.loads((tmp_path / "config.json").read_text())["label_names"] == ["no", "yes"]
    used = timm.data.resolve_model_data_config(timm.create_model(f"local-dir:{tmp_path}"))
    for name, values in measured.items():
        assert list(used[name]) == values.tolist()


def test_a_diverged_network_is_reported_as_such(tmp_path: Path) -> None:
    net = timm.create_model("test_resnet", num_classes=3)
    nn.init.constant_(net.fc.weight, math.nan)
    with pytest.raises(RuntimeError, match="returns NaN or Inf, its training has diverged"):
        export_timm(net, tmp_path / "net", **PREPARED)
    assert not list((tmp_path / "net").iterdir())
    export_weights(net, tmp_path / "net.safetensors")


def test_a_card_of_other_weights_is_reported(tmp_path: Path) -> None:
    net = timm.create_model("test_resnet", num_classes=3)
    card = {"title": "First", "license": "mit", "training_data": "Noise."}
    export_timm(net, tmp_path / "net", card=card, **PREPARED)
    with pytest.warns(UserWarning, match="README.md was written for other weights"):
        export_timm(net, tmp_path / "net", **PREPARED)
    assert "First" in (tmp_path / "net" / "README.md").read_text()


def test_a_wrapper_inside_of_another_module_is_refused(tmp_path: Path) -> None:
    detector = nn.Sequential(InMergeWrapper(timm.create_model("test_resnet")), nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"holds an InMergeWrapper at '0'.*alone, model\.0$"):
        export_weights(detector, tmp_path / "net.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "settings,message",
    [
        ({"crop_pct": 0.0}, r"crop_pct must lie in \(0, 1\], got 0.0"),
        ({"crop_pct": 1.5}, "got 1.5"),
        ({"interpolation": "cubic"}, "must be 'bicubic' or .* got 'cubic'"),
        ({"crop_mode": "pad"}, "must be 'center' or 'squash' or 'border', got 'pad'"),
    ],
)
def test_a_preparation_that_timm_can_not_make_is_refused(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    net = timm.create_model("test_resnet")
    with pytest.raises(ValueError, match=message):
        export_timm(net, tmp_path, **PREPARED, **settings)


@pytest.mark.parametrize("crop_mode,shape", [("center", (32, 64)), ("squash", (32, 32))])
def test_images_that_are_not_square_are_fitted_as_in_training(
    tmp_path: Path, crop_mode: str, shape: tuple[int, int]
) -> None:
    net = timm.create_model("test_resnet")
    export_timm(net, tmp_path, **PREPARED, crop_mode=crop_mode)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    used = timm.data.resolve_model_data_config(loaded)
    assert used["crop_mode"] == crop_mode
    resize = timm.data.create_transform(**used).transforms[0]
    size = PREPARED["input_size"][-1]
    resized = resize(torch.zeros(3, size, 2 * size))
    assert tuple(resized.shape[1:]) == tuple(size * side // 32 for side in shape)


@pytest.mark.parametrize("way", ["wrapper", "bare", "compiled", "compiled inside", "average"])
def test_every_wrapping_gives_the_same_file(way: str) -> None:
    net = timm.create_model("test_resnet", num_classes=3)
    expected = net.state_dict()
    models = {
        "wrapper": lambda: InMergeWrapper(net),
        "bare": lambda: net,
        "compiled": lambda: torch.compile(InMergeWrapper(net)),
        "compiled inside": lambda: InMergeWrapper(torch.compile(net)),
        "average": lambda: torch.optim.swa_utils.AveragedModel(InMergeWrapper(net)),
    }
    state = plain_state_dict(models[way]())
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in state)


def test_half_precision_is_widened_and_tied_weights_are_written_apart(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)).bfloat16()
    net[1].weight = net[0].weight
    path = export_weights(net, tmp_path / "w.safetensors")
    state = safetensors.torch.load_file(path)
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    assert torch.equal(state["0.weight"], net[0].weight.float())
    assert torch.equal(state["0.weight"], state["1.weight"])


@pytest.mark.parametrize(
    "compute",
    [
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        pytest.param(
            nn.utils.weight_norm,
            marks=pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning"),
        ),
        lambda conv: prune.l1_unstructured(conv, "weight", amount=0.4),
    ],
)
def test_computed_weights_are_written_as_their_result(compute: Any) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.LazyLinear(2))
    net(torch.randn(2, 3, 8, 8))
    plain = {name: value.shape for name, value in net.state_dict().items()}
    compute(net[1])
    net.eval()
    image = torch.randn(2, 3, 8, 8)
    expected = net(image)
    state = plain_state_dict(net)
    assert {name: value.shape for name, value in state.items()} == plain
    stock = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 2))
    stock.load_state_dict(state)
    torch.testing.assert_close(stock(image), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(net(image), expected)  # the network itself is as it was


def test_arguments_that_change_the_network_are_asked_for(tmp_path: Path) -> None:
    net = timm.create_model("test_resnet", num_classes=3)
    net.layer4 = nn.Identity()
    net.fc = nn.Linear(net.layer3[-1].conv3.out_channels, 3)
    with pytest.raises(RuntimeError, match="pass them as model_args"):
        export_timm(net, tmp_path / "net", input_size=(3, 64, 64), mean=[0.5] * 3, std=[0.5] * 3)
    assert not any((tmp_path / "net").iterdir())


@pytest.mark.parametrize(
    "change,error,message",
    [
        ({"mean": [0.5]}, ValueError, "mean has 1 values for an image of 3 channels"),
        ({"label_names": ["a"]}, ValueError, "label_names has 1 names for 3 classes"),
        ({"mean": [127.5] * 3}, ValueError, "mean is 127.5, .* up to 255, pass 0.5"),
        ({"std": [0.0] * 3}, ValueError, r"std is 0, but pixels in \[0, 1\] need \(0, 1\]"),
    ],
)
def test_a_data_configuration_that_does_not_fit_is_refused(
    tmp_path: Path, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    net = timm.create_model("test_resnet", num_classes=3)
    settings = {"input_size": (3, 64, 64), "mean": [0.5] * 3, "std": [0.5] * 3, **change}
    with pytest.raises(error, match=message):
        export_timm(net, tmp_path, **settings)


def test_wrong_targets_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must end in \.safetensors"):
        export_weights(nn.Conv2d(1, 1, 1), tmp_path / "weights.bin")
    with pytest.raises(TypeError, match=r"Module is required, got OrderedDict.*the network itself"):
        export_weights(nn.Conv2d(1, 1, 1).state_dict(), tmp_path / "w.safetensors")
    features = timm.create_model("test_resnet", features_only=True)
    for net in (torchvision.models.resnet18(), features):
        with pytest.raises(TypeError, match="Net is not a timm model; use export_weights"):
            export_timm(net, tmp_path, **PREPARED)


def test_lagging_statistics_are_reported_unless_recalibrated(
    tmp_path: Path, image: torch.Tensor
) -> None:
    net = timm.create_model("resnet10t", num_classes=3, in_chans=1)
    model = merged(net, image, recalibrate=False)
    with pytest.warns(UserWarning, match=r"BatchNorm.*model\.recalibrate"):
        export_weights(model, tmp_path / "w.safetensors")
    model.recalibrate([image])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        export_weights(model, tmp_path / "w.safetensors")


@pytest.mark.parametrize("export", ["weights", "folder", "weights of the bare network"])
def test_a_forgotten_attach_is_reported_before_the_weights_are_used(
    tmp_path: Path, export: str
) -> None:
    net = timm.create_model("test_resnet", num_classes=3)
    model = InMergeWrapper(net, similarity_threshold=1.0)  # BatchNorm fits, whatever is drawn
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    trained = net if "bare" in export else model
    for _ in range(3):
        trained(torch.randn(2, 3, 32, 32)).sum().backward()
        optimizer.step()

    def write() -> None:
        if "weights" in export:
            export_weights(torch.compile(model), tmp_path / "w.safetensors")
        else:
            export_timm(model, tmp_path / "net", **PREPARED)

    with pytest.warns(NoEffectWarning, match="never merged: no optimizer is attached") as caught:
        write()
    assert Path(caught[0].filename) == Path(__file__)
    model.attach(optimizer)
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    write()  # a warning would be an error here


def test_the_wrappers_state_dict_meets_stock_timm_as_the_page_says(tmp_path: Path) -> None:
    network = timm.create_model("test_resnet", num_classes=3)
    model = InMergeWrapper(network)
    model.merge_()
    torch.save(model.state_dict(), tmp_path / "last.pt")
    stock = {"model_name": "test_resnet", "num_classes": 3}
    page = Path(__file__).parents[1] / "docs" / "troubleshooting.md"
    with pytest.raises(RuntimeError) as told:
        timm.create_model(**stock, checkpoint_path=str(tmp_path / "last.pt"))
    assert str(told.value).splitlines()[1:] == [
        '\tUnexpected key(s) in state_dict: "_extra_state". '
    ]
    assert '`Unexpected key(s) in state_dict: "_extra_state"`' in page.read_text()
    # What the page advises: the network's own state dict, or to pass over the counter.
    torch.save(model.module.state_dict(), tmp_path / "network.pt")
    saved = timm.create_model(**stock, checkpoint_path=str(tmp_path / "network.pt"))
    rescued = timm.create_model(**stock)
    skipped = timm.models.load_checkpoint(rescued, str(tmp_path / "last.pt"), strict=False)
    assert skipped == ([], ["_extra_state"])
    for loaded in (saved, rescued):
        for name, value in network.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], value), name


# -- where it is written -------------------------------------------------------------------------


def test_a_full_disk_is_named_and_leaves_what_was_there(tmp_path: Path) -> None:
    """The limit on the size of files is real; the system answers as it does on a full disk."""
    net = timm.create_model("test_resnet", num_classes=3)

    def write_all() -> Iterator[str]:
        for write in (
            lambda: export_weights(net, tmp_path / "w.safetensors"),
            lambda: export_timm(net, tmp_path / "net", **PREPARED),
        ):
            try:
                write()
            except OSError as error:
                yield str(error)

    assert not list(write_all())
    answers = []
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        for size in (100, 20_000):  # Python ignores the signal that comes with it
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
            answers += write_all()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert len(answers) == 4, answers
    for number, answer in enumerate(answers):
        place = tmp_path / ("net" if number % 2 else "w.safetensors")
        assert f"{place} was not written, what was there is unchanged: " in answer
        assert "File too large" in answer
    names = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
    assert names == ["net", "net/config.json", "net/model.safetensors", "w.safetensors"]
    safetensors.torch.load_file(tmp_path / "w.safetensors")
    timm.create_model(f"local-dir:{tmp_path / 'net'}", pretrained=True)


def test_a_link_to_a_folder_is_followed_and_one_to_a_file_of_it_is_named(tmp_path: Path) -> None:
    net = timm.create_model("test_resnet", num_classes=3)
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    for _ in range(2):  # a folder that is yet to be made, and one that is there
        export_timm(net, tmp_path / "link", **PREPARED)
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "disk" / "model.safetensors").is_file()
    config = tmp_path / "disk" / "config.json"
    config.rename(tmp_path / "shared.json")
    config.symlink_to(tmp_path / "shared.json")
    before = (tmp_path / "disk" / "model.safetensors").stat().st_mtime_ns
    with pytest.raises(ValueError, match=r"config\.json is a symbolic link to .*shared\.json"):
        export_timm(net, tmp_path / "link", **PREPARED)
    assert (tmp_path / "disk" / "model.safetensors").stat().st_mtime_ns == before
    assert len(list((tmp_path / "disk").iterdir())) == 2


def test_a_link_to_a_weights_file_stays_a_link(tmp_path: Path) -> None:
    net = timm.create_model("test_resnet", num_classes=3)
    link, real = tmp_path / "best.safetensors", tmp_path / "disk" / "epoch_9.safetensors"
    link.symlink_to(real)
    assert export_weights(net, link) == link
    assert link.is_symlink() and safetensors.torch.load_file(real).keys() == net.state_dict().keys()


# -- networks with several outputs ---------------------------------------------------------------


def test_a_network_that_returns_auxiliary_scores_is_exported_with_code_that_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = timm.create_model("inception_v3", aux_logits=True, num_classes=3).eval()
    card = {"title": "Two heads", "license": "mit", "training_data": "Noise."}
    facts: dict[str, Any] = {"input_size": (3, 299, 299), "mean": [0.5] * 3, "std": [0.5] * 3}
    export_timm(net, tmp_path / "net", card=card, **facts)
    monkeypatch.chdir(tmp_path)
    pixels = torch.randint(0, 256, (3, 299, 299), dtype=torch.uint8)
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save("image.png")
    text = (tmp_path / "net" / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {}
    exec(code.replace("path/to/this/folder", "net"), names)
    with torch.no_grad():
        expected, _ = net((pixels[None].float() / 255 - 0.5) / 0.5)
    torch.testing.assert_close(names["scores"], expected, rtol=1e-4, atol=1e-5)


# -- timm's own export ---------------------------------------------------------------------------


@pytest.mark.parametrize("safe", [True, False, "both"])
def test_timms_own_export_of_a_wrapper_loads_in_stock_timm(tmp_path: Path, safe: Any) -> None:
    net = timm.create_model("test_resnet", num_classes=3).eval()
    model = InMergeWrapper(net)
    save_for_hf(model, str(tmp_path), safe_serialization=safe)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    for name, value in net.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert "_extra_state" in model.state_dict(), "any other caller gets the state for resuming"


def test_timms_own_upload_of_a_wrapper_is_plain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files: dict[str, bytes] = {}

    def upload(self: HfApi, *, folder_path: str, **_: Any) -> None:
        files.update({path.name: path.read_bytes() for path in Path(folder_path).iterdir()})

    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo, **_: RepoUrl(f"ward/{repo}"))
    monkeypatch.setattr(HfApi, "file_exists", lambda self, **_: True)
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    net = timm.create_model("test_resnet", num_classes=3).eval()
    push_to_hf_hub(InMergeWrapper(net), "skin")
    state = safetensors.torch.load(files["model.safetensors"])
    assert state.keys() == net.state_dict().keys()


# -- networks that changed after they were wrapped -----------------------------------------------


def test_a_property_that_fails_inside_is_not_looked_up_on_the_network() -> None:
    class Broken(InMergeWrapper):
        @property
        def size(self) -> int:
            return self.plan.no_such_field  # type: ignore[attr-defined]

    model = Broken(timm.create_model("test_resnet", num_classes=3))
    with pytest.raises(AttributeError, match="no attribute 'no_such_field'"):
        _ = model.size
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        _ = model.no_such_name


def test_a_fused_network_is_reported_and_exported() -> None:
    image = torch.randn(4, 3, 32, 32)
    model = merged(timm.create_model("repvgg_a0", num_classes=3), image)
    before = model.report()
    expected = model.module(image)
    model.module = timm.utils.reparameterize_model(model.module, inplace=True)
    assert model.report() == before
    state = plain_state_dict(model)
    stock = timm.utils.reparameterize_model(timm.create_model("repvgg_a0", num_classes=3).eval())
    stock.load_state_dict(state)
    torch.testing.assert_close(stock(image), expected, rtol=1e-3, atol=1e-3)


def test_a_moving_average_of_a_run_that_merged_is_exported_without_a_warning(
    tmp_path: Path,
) -> None:
    """ema_pytorch averages a copy, and scores it in train mode."""
    model = InMergeWrapper(
        timm.create_model("test_resnet", num_classes=3), similarity_threshold=-1.0
    )
    ema_at_once, ema_late = EMA(model, update_every=1, update_after_step=0), None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model.attach(optimizer)
    for _ in range(3):
        loss = model(torch.randn(2, 3, 32, 32)).square().mean()
        ema_late = ema_late or EMA(model, update_every=1, update_after_step=0)
        loss.backward()
        optimizer.step()
        for ema in (ema_at_once, ema_late):
            ema.update()
            ema(torch.randn(2, 3, 32, 32))
    assert model.report().merged > 0
    model.recalibrate([torch.randn(2, 3, 32, 32)])
    for ema in (ema_at_once, ema_late):
        export_weights(ema.ema_model, tmp_path / "ema.safetensors")  # a warning is an error here
        state = safetensors.torch.load_file(tmp_path / "ema.safetensors")
        assert state.keys() == model.module.state_dict().keys()

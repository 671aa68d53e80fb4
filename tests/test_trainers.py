"""The blocks of docs/training-loops.md run, with the three lines and without them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning
import pytest
import timm
import torch
import torch.distributed as dist
from opacus import GradSampleModule, PrivacyEngine
from opacus.optimizers import DPOptimizer
from safetensors.torch import load_file
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask, load_task_ema_checkpoint, resume_task_checkpoint
from timm.utils import CheckpointSaver
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn import functional as F
from torch.optim import SGD
from torch.optim.swa_utils import SWALR, AveragedModel, update_bn
from torch.utils.data import DataLoader, TensorDataset
from transformers import (
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainingArguments,
)

from inmerge_wrap import InMergeWrapper, NoEffectWarning
from tests.scripts.common import (
    SETTINGS,
    TinyNet,
    attached,
    batch,
    digest,
    equal,
    loss_of,
    sgd,
    tiny_net,
    train,
    weights_of,
    wrapped,
)

PAGE = Path(__file__).parents[1] / "docs" / "training-loops.md"
MARK = "# InMerge"


def blocks() -> dict[str, str]:
    """The Python blocks of the page under the heading they stand below."""
    found: dict[str, str] = {}
    for section in re.split(r"^#+ ", PAGE.read_text(), flags=re.MULTILINE):
        title = section.partition("\n")[0]
        run = re.sub(r"<!-- not executed: .*? -->\n```python\n.*?```", "", section, flags=re.DOTALL)
        for number, block in enumerate(re.findall(r"```python\n(.*?)```", run, re.DOTALL)):
            found[f"{title} {number}" if number else title] = block
    return found


BLOCKS = blocks()
LOOPS = {
    # section -> merges: batches, or fewer with accumulation, or more with epochs
    "Plain PyTorch": 3,
    "Accelerate": 2,
    "Lightning": 3,
    "Hugging Face Trainer": 3,
    "Hugging Face Trainer 1": 3,
    "timm": 6,
    "FSDP2": 3,
    "Half precision": 3,
    "Weight averages and torch.compile": 3,
}


@pytest.fixture(autouse=True)
def _own_surroundings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_accelerator_state: None
) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    yield
    torch._dynamo.reset()


@pytest.fixture
def one_process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def surroundings(title: str, *, without_mark: bool = False) -> dict[str, Any]:
    """The names that a fresh file has where a block stands below those that it builds on."""
    before = ["Training loops"]
    if title == "Hugging Face Trainer 1":
        before.append("Hugging Face Trainer")
    space: dict[str, Any] = {"__name__": "page"}
    torch.manual_seed(0)
    for name in before:
        run_block(name, space, without_mark=without_mark)
    return space


def run_block(title: str, space: dict[str, Any], *, without_mark: bool = False) -> None:
    lines = [line for line in BLOCKS[title].splitlines() if not (without_mark and MARK in line)]
    exec(compile("\n".join(lines), f"{PAGE.name}: {title}", "exec"), space)


IMAGES = (
    torch.randn(12, 3, 32, 32, generator=torch.Generator().manual_seed(0)),
    torch.arange(12) % 3,
)


def hf_config() -> ResNetConfig:
    return ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3
    )


def arguments(**options: Any) -> TrainingArguments:
    defaults = {
        "output_dir": "trainer",
        "per_device_train_batch_size": 4,
        "num_train_epochs": 1,
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 0,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(**{**defaults, **options})


THIRD_PARTY = [
    "ignore:.*does not have many workers.*:UserWarning",
    "ignore:The number of training batches.*:UserWarning",
    "ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning",
    "ignore:.*TracerWarning.*",
    "ignore:The `foreach` optimization is not yet:UserWarning",
]


def quiet(test: Any) -> Any:
    for pattern in THIRD_PARTY:
        test = pytest.mark.filterwarnings(pattern)(test)
    return test


@quiet
@pytest.mark.usefixtures("one_process_group_for_fsdp2")
@pytest.mark.parametrize("title", LOOPS)
def test_a_loop_of_the_page_merges(title: str) -> None:
    space = surroundings(title)
    before = dict(space)
    run_block(title, space)
    models = {
        id(value): value
        for name, value in space.items()
        if isinstance(value, InMergeWrapper) and before.get(name) is not value
    }
    model = space["classifier"].model if "classifier" in space else models.popitem()[1]
    assert not models, "one network, one wrapper"
    assert model.step == LOOPS[title]
    assert model.report().drawn > 0


@quiet
@pytest.mark.usefixtures("one_process_group_for_fsdp2")
@pytest.mark.parametrize("title", LOOPS)
def test_it_is_the_loop_you_have_plus_at_most_three_lines(title: str) -> None:
    marked = [line for line in BLOCKS[title].splitlines() if MARK in line]
    assert 1 <= len(marked) <= 3
    run_block(title, surroundings(title, without_mark=True), without_mark=True)


@pytest.fixture
def one_process_group_for_fsdp2(request: pytest.FixtureRequest) -> None:
    if request.node.callspec.params["title"] == "FSDP2":
        request.getfixturevalue("one_process_group")


def test_every_block_is_run() -> None:
    assert BLOCKS.keys() - set(LOOPS) == {"Training loops", "Resuming"}
    space = surroundings("Resuming")
    run_block("Resuming", space)
    assert len(list(space["rest_of_the_epoch"])) == 1


# -- beyond what the page shows ------------------------------------------------------------------


class Module(lightning.LightningModule):
    """Batches in a fixed order and no dropout: Lightning restores no random state."""

    def __init__(self, mode: str = "step") -> None:
        super().__init__()
        self.model = wrapped(mode=mode)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        optimizer = sgd(self.model)
        self.model.attach(optimizer)
        return optimizer


def fit(
    module: Module, epochs: int, checkpoint: str | None = None, **options: Any
) -> lightning.Trainer:
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **options,
    )
    loader = DataLoader(TensorDataset(*batch(0, size=16)), batch_size=4)
    trainer.fit(module, loader, ckpt_path=checkpoint)
    return trainer


@quiet
@pytest.mark.parametrize("mode", ["step", "outputs"])
def test_lightning_resumes_bit_for_bit(mode: str) -> None:
    straight, second = Module(mode), Module(mode)
    fit(straight, 4)
    assert straight.model.step == 16 and straight.model.report().merged > 0
    fit(Module(mode), 2).save_checkpoint("half.ckpt")
    fit(second, 4, checkpoint="half.ckpt")
    assert digest(second.model.state_dict()) == digest(straight.model.state_dict())


@quiet
def test_lightning_accumulation_clipping_and_half_precision() -> None:
    module = Module()
    fit(module, 2, accumulate_grad_batches=2, gradient_clip_val=1.0, precision="bf16-mixed")
    assert module.model.step == 4


@quiet
@pytest.mark.parametrize("mode", ["step", "outputs"])
@pytest.mark.parametrize("prepared", [False, True])
def test_a_step_of_fabric_counts_once(mode: str, prepared: bool) -> None:
    fabric = lightning.Fabric(accelerator="cpu", devices=1)
    model = wrapped(mode=mode)
    bare = sgd(model)
    training, optimizer = fabric.setup(model, bare)
    model.attach(optimizer if prepared else bare)
    for number in range(3):
        images, labels = batch(number)
        fabric.backward(F.cross_entropy(training(images), labels))
        optimizer.step()
        optimizer.zero_grad()
    assert model.step == 3 and {layer.passes for layer in model.report()} == {3}


class Classifier(nn.Module):
    """No PreTrainedModel: a network of one's own that gives its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.net = tiny_net()

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.net(pixel_values)
        if labels is None:
            return {"logits": logits}
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def hf_train(
    resume: str | None = None, mode: str = "step", **options: Any
) -> tuple[InMergeWrapper, Trainer]:
    images, labels = batch(0, size=16)
    dataset = [{"pixel_values": i, "labels": n} for i, n in zip(images, labels, strict=True)]
    settings = {"remove_unused_columns": False, "label_names": ["labels"], **options}
    model = InMergeWrapper(Classifier(), **SETTINGS, mode=mode)
    trainer = Trainer(
        model=model, args=arguments(**settings), train_dataset=dataset, eval_dataset=dataset
    )
    model.attach(trainer.create_optimizer())
    trainer.train(resume_from_checkpoint=resume)
    return model, trainer


def test_trainer_takes_the_wrapper_of_any_network_and_evaluates_it() -> None:
    model, trainer = hf_train()
    assert model.step == 4
    before = weights_of(model)
    assert trainer.evaluate()["eval_loss"] > 0
    assert equal(before, weights_of(model))


@pytest.mark.parametrize("mode", ["step", "outputs"])
def test_trainer_resumes_bit_for_bit(mode: str) -> None:
    straight, _ = hf_train(mode=mode, save_strategy="steps", save_steps=3, num_train_epochs=2)
    assert straight.step == 8
    resumed, _ = hf_train("trainer/checkpoint-3", mode, num_train_epochs=2)
    assert resumed.step == 8
    assert digest(resumed.state_dict()) == digest(straight.state_dict())


def test_trainer_accumulates() -> None:
    model, _ = hf_train(gradient_accumulation_steps=2)
    assert model.step == 2


def test_a_network_that_takes_any_keyword_says_so_through_the_wrapper() -> None:
    class Open(Classifier):
        def forward(self, pixel_values: Tensor, **options: Any) -> Any:  # type: ignore[override]
            return super().forward(pixel_values, options.get("labels"))

    class Told(Open):
        accepts_loss_kwargs = False

    for kind, expected in ((Classifier, False), (Open, True), (Told, False)):
        model = InMergeWrapper(kind(), **SETTINGS)
        assert model.accepts_loss_kwargs is expected


def test_what_the_trainer_saves_is_what_transformers_loads() -> None:
    space = surroundings("Hugging Face Trainer 1")
    run_block("Hugging Face Trainer 1", space)
    loaded = ResNetForImageClassification.from_pretrained("trained")
    assert equal(loaded.state_dict(), space["model"].state_dict())


def timm_run(**options: Any) -> tuple[InMergeWrapper, Any, CheckpointSaver]:
    model = wrapped()
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-2)
    model.attach(optimizer)
    return model, optimizer, CheckpointSaver(model, optimizer, **options)


def test_timm_saves_plain_weights_that_a_stock_model_loads() -> None:
    model, optimizer, saver = timm_run()
    train(model, optimizer, 2)
    saver.save_checkpoint(0, metric=1.0)
    stock = TinyNet()
    timm.models.load_checkpoint(stock, "last.pth.tar")
    assert equal(stock.state_dict(), model.module.state_dict())
    resumed, _, _ = timm_run()
    with pytest.warns(UserWarning, match="no '_extra_state'"):
        timm.models.resume_checkpoint(resumed, "last.pth.tar")
    assert equal(resumed.module.state_dict(), model.module.state_dict()) and resumed.step == 0


def test_timm_resumes_bit_for_bit() -> None:
    """The weights of its checkpoints are the network's, the counter is in the optimizer's state."""
    straight, optimizer, _ = timm_run()
    train(straight, optimizer, 6)
    first, optimizer, saver = timm_run()
    train(first, optimizer, 3)
    saver.save_checkpoint(0, metric=1.0)
    second, optimizer, _ = timm_run()
    timm.models.resume_checkpoint(second.module, "last.pth.tar", optimizer)
    assert second.step == 3
    train(second, optimizer, 3, start=3)
    assert digest(second.state_dict()) == digest(straight.state_dict())


def test_timm_tasks_take_the_wrapper() -> None:
    model, optimizer, _ = timm_run()
    task = ClassificationTask(model, nn.CrossEntropyLoss(), verbose=False)
    task.setup_ema(decay=0.9)
    expected = weights_of(model)
    for number in range(3):
        optimizer.zero_grad()
        task(*batch(number))["loss"].backward()
        optimizer.step()
        task.update_ema()
        for name, parameter in model.named_parameters():
            expected[name].lerp_(parameter.detach(), 0.1)
    assert model.step == 3
    stock = TinyNet()
    stock.load_state_dict(task.get_checkpoint_state()["state_dict"])
    assert equal(stock.state_dict(), model.module.state_dict())
    average = task.get_trainable_module(ema=True).module
    assert average.step == 0
    for name, value in expected.items():
        torch.testing.assert_close(average.get_parameter(name).detach(), value)


def timm_task(ema: bool, mode: str = "step") -> tuple[InMergeWrapper, Any, Any, CheckpointSaver]:
    """What timm's train.py makes of a wrapped model."""
    model = wrapped(mode=mode)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-2)
    model.attach(optimizer)
    task = ClassificationTask(model, nn.CrossEntropyLoss(), verbose=False)
    if ema:
        task.setup_ema(decay=0.9)
    return model, optimizer, task, CheckpointSaver(model, optimizer, task=task)


def run_task(task: Any, optimizer: Any, steps: int, start: int = 0) -> None:
    for number in range(start, start + steps):
        optimizer.zero_grad()
        task(*batch(number))["loss"].backward()
        optimizer.step()
        task.update_ema()


@pytest.mark.parametrize("mode", ["step", "outputs"])
@pytest.mark.parametrize("ema", [False, True])
def test_timm_tasks_resume_bit_for_bit_and_a_plain_run_loads_their_checkpoints(
    ema: bool, mode: str
) -> None:
    straight, optimizer, task, _ = timm_task(ema, mode)
    run_task(task, optimizer, 6)
    _, optimizer, task, saver = timm_task(ema, mode)
    run_task(task, optimizer, 3)
    saver.save_checkpoint(0, metric=1.0)
    resumed, optimizer, task, _ = timm_task(ema, mode)
    resume_task_checkpoint(task, "last.pth.tar", optimizer)
    if ema:
        load_task_ema_checkpoint(task, "last.pth.tar")
    assert resumed.step == 3
    run_task(task, optimizer, 3, start=3)
    assert digest(resumed.state_dict()) == digest(straight.state_dict())
    network = tiny_net()
    plain = ClassificationTask(network, nn.CrossEntropyLoss(), verbose=False)
    plain_optimizer = create_optimizer_v2(network, opt="adamw", lr=1e-2)
    resume_task_checkpoint(plain, "last.pth.tar", plain_optimizer)
    run_task(plain, plain_optimizer, 1, start=3)


def kept_network(
    resume: str | None = None, attach: bool = True, mode: str = "step", **options: Any
) -> tuple[InMergeWrapper, Any]:
    """The Trainer has the network itself, and the wrapper merges beside it."""
    torch.manual_seed(0)
    network = ResNetForImageClassification(hf_config())
    example = torch.zeros(1, 3, 32, 32)
    merging = InMergeWrapper(network, **{**SETTINGS, "example_input": example}, mode=mode)
    trainer = Trainer(
        model=network,
        args=arguments(**options),
        train_dataset=[
            {"pixel_values": image, "labels": label} for image, label in zip(*IMAGES, strict=True)
        ],
    )
    if attach:
        merging.attach(trainer.create_optimizer())
    trainer.train(resume_from_checkpoint=resume)
    return merging, trainer


@quiet
def test_a_trainer_that_keeps_the_network_resumes_bit_for_bit() -> None:
    straight, _ = kept_network(save_strategy="steps", save_steps=4, num_train_epochs=2)
    assert straight.step == 6 and straight.report().merged > 0
    resumed, _ = kept_network("trainer/checkpoint-4", num_train_epochs=2)
    assert resumed.step == 6
    assert digest(resumed.state_dict()) == digest(straight.state_dict())


@quiet
def test_a_trainer_that_keeps_the_network_and_a_forgotten_attach() -> None:
    with pytest.warns(NoEffectWarning, match="AdamW took 10 steps without merging"):
        kept_network(attach=False, num_train_epochs=4)
    with pytest.warns(NoEffectWarning, match="no forward pass of this model merged"):
        kept_network(mode="outputs")


@quiet
@pytest.mark.parametrize("mode", ["step", "outputs"])
def test_lightnings_stray_step_after_averaging_does_not_merge(mode: str) -> None:
    """StochasticWeightAveraging steps once more after it measured BatchNorm."""
    averages = []

    class Averaging(lightning.pytorch.callbacks.StochasticWeightAveraging):
        def transfer_weights(self, source: Any, target: Any) -> None:  # type: ignore[override]
            super().transfer_weights(source, target)
            averages.append(weights_of(target))

    class Sure(Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = wrapped(similarity_threshold=-1.0, merge_probability=1.0, mode=mode)

        def configure_optimizers(self) -> Any:
            optimizer = sgd(self.model, lr=1e-3)
            self.model.attach(optimizer)
            return optimizer

    module = Sure()
    fit(module, 4, callbacks=[Averaging(swa_lrs=1e-3, swa_epoch_start=2)])
    assert module.model.step == 16 and len(averages) == 1
    moved = [(p - averages[0][name]).abs().max() for name, p in weights_of(module).items()]
    # The step itself, of a stale gradient, is Lightning's; a merge would move a kernel by .1.
    assert max(moved) < 5e-3


@quiet
@pytest.mark.parametrize("mode", ["step", "outputs"])
def test_lightnings_weight_average_follows_the_unmerged_weights(mode: str) -> None:
    """EMAWeightAveraging puts the average in the model's place in the end."""
    expected: dict[str, Tensor] = {}

    class Watching(Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = wrapped(similarity_threshold=-1.0, mode=mode)

        def on_train_batch_end(self, *_: Any) -> None:
            for name, weight in weights_of(self.model).items():
                expected.setdefault(name, weight)  # the first update copies
                expected[name] = 0.9 * expected[name] + 0.1 * weight

    module = Watching()
    averaging = lightning.pytorch.callbacks.EMAWeightAveraging(decay=0.9, update_starting_at_step=0)
    fit(module, 2, callbacks=[averaging])
    assert module.model.step == 8 and module.model.report().merged > 0
    for name, weight in weights_of(module.model).items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["step", "outputs"])
def test_torchs_averaging_measures_batch_norm_on_unmerged_weights(mode: str) -> None:
    model, optimizer = attached(similarity_threshold=-1.0, mode=mode)
    average = AveragedModel(model)
    schedule = SWALR(optimizer, swa_lr=0.01)
    seen = []
    for number in range(4):
        train(model, optimizer, 1, start=number)
        average.update_parameters(model)
        schedule.step()
        seen.append(weights_of(model))
    assert model.step == 4 and average.module.step == 0
    update_bn(DataLoader(batch(0, size=16)[0], batch_size=4), average)
    for name, weight in weights_of(average.module).items():
        mean = torch.stack([step[name] for step in seen]).mean(dim=0)
        torch.testing.assert_close(weight, mean, rtol=1e-4, atol=1e-6)
    twin = tiny_net()
    twin.load_state_dict(average.module.module.state_dict())
    images = batch(0, size=16)[0]
    norms = [twin.stem(part).mean((0, 2, 3)) for part in images.split(4)]
    expected = torch.stack(norms).mean(dim=0).detach()
    torch.testing.assert_close(average.module.norm.running_mean, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mode", ["step", "outputs"])
def test_torch_export_gives_what_the_wrapper_computes(mode: str) -> None:
    model, optimizer = attached(mode=mode)
    train(model, optimizer, 2)
    images, _ = batch(0)
    program = torch.export.export(model.eval().module, (images,))
    assert torch.equal(program.module()(images), model(images))


def test_a_wrapped_sequential_is_indexed_as_it_was() -> None:
    network = nn.Sequential(*list(tiny_net().children())[:4])
    model = InMergeWrapper(network, include=["2", "3"])
    assert len(model) == len(network) == 4
    assert model[0] is network[0] and list(model) == list(network)
    assert all(map(torch.equal, model[:2].parameters(), network[:2].parameters()))
    model = wrapped()
    assert model  # a network without a length is no empty one
    for access in (lambda: model[0], lambda: len(model)):
        with pytest.raises(TypeError, match="TinyNet"):
            access()


def test_a_loop_without_an_optimizer_object_merges_by_hand() -> None:
    model = wrapped()
    for number in range(3):
        loss_of(model, number).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.05 * parameter.grad
                parameter.grad = None
        model.merge_()
    assert model.step == 3


def private_net() -> nn.Sequential:
    torch.manual_seed(0)
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3)]
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 16, 3), *head
    )


def made_private(mode: str) -> tuple[InMergeWrapper, SGD, GradSampleModule, DPOptimizer]:
    model = InMergeWrapper(private_net(), **(SETTINGS | {"mode": mode, "example_input": None}))
    optimizer = sgd(model)
    data = DataLoader(TensorDataset(*batch(0, size=8)), batch_size=4)
    private, stepping, _ = PrivacyEngine().make_private(
        module=model,
        optimizer=optimizer,
        data_loader=data,
        noise_multiplier=0.0,
        max_grad_norm=1e9,
    )
    return model, optimizer, private, stepping


@pytest.mark.filterwarnings("ignore:Secure RNG", "ignore:Full backward hook is firing")
@pytest.mark.parametrize("mode", ["weights", "step"])
def test_opacus_steps_as_training_without_it_does(mode: str) -> None:
    model, optimizer, private, stepping = made_private(mode)
    model.attach(optimizer)
    plain = InMergeWrapper(private_net(), **(SETTINGS | {"mode": mode, "example_input": None}))
    stepped = sgd(plain)
    plain.attach(stepped)
    for number in range(3):
        images, labels = batch(number, size=4)
        for network, each in ((private, stepping), (plain, stepped)):
            F.cross_entropy(network(images), labels).backward()
            each.step()
            each.zero_grad()
    assert model.report().merged == plain.report().merged > 0
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.filterwarnings("ignore:Secure RNG", "ignore:Full backward hook is firing")
def test_opacus_is_refused_where_its_gradients_would_be_wrong() -> None:
    model, optimizer, *_ = made_private("outputs")
    with pytest.raises(RuntimeError, match="wrong gradients of '3', from"):
        model.attach(optimizer)
    model = InMergeWrapper(private_net(), **(SETTINGS | {"mode": "outputs", "example_input": None}))
    optimizer = sgd(model)
    model.attach(optimizer)
    private = GradSampleModule(model)
    images, labels = batch(0, size=4)
    F.cross_entropy(private(images), labels).backward()
    with pytest.raises(RuntimeError, match="mode='weights'"):
        optimizer.step()


def test_the_page_names_what_is_refused() -> None:
    refused = PAGE.read_text().partition("### Unsupported setups")[2].partition("## Optimizers")[0]
    for name in ("DeepSpeed", "Megatron-LM", "FSDP1", "XLA", "CUDA graphs", "schedule-free"):
        assert name in refused


@pytest.mark.filterwarnings("ignore:FSDP is switching")
def test_fsdp1_merges_in_the_forward_pass_if_it_keeps_the_parameters(
    one_process_group: None,
) -> None:
    for keeps in (True, False):
        model = InMergeWrapper.recommended(tiny_net(), total_steps=9, example_input=batch(0)[0])
        flat = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=keeps)
        optimizer = sgd(flat)
        if keeps:
            model.attach(optimizer)
            flat(batch(0)[0]).sum().backward()
            optimizer.step()
            assert model.step == 1 and model.report().merged
        else:
            with pytest.raises(RuntimeError, match=r"FSDP1 flattens .* use_orig_params=True"):
                model.attach(optimizer)


def test_fsdp2_of_the_page_writes_plain_weights(one_process_group: None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        space = surroundings("FSDP2")
        run_block("FSDP2", space)
    stock = timm.create_model("resnet18", num_classes=3)
    stock.load_state_dict(load_file("weights.safetensors"))

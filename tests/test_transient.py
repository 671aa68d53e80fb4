"""Transient merging: the gradient is taken at merged kernels, and nobody else ever sees them."""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from schedulefree import AdamWScheduleFree
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from inmerge_wrap import (
    CollapseWarning,
    InMergeWrapper,
    NoEffectWarning,
    Schedule,
    ZScore,
    export_weights,
)
from tests import NEEDS_COMPILER, reference
from tests.test_wrapper import SmallNet, small_net, states_equal

IMAGES = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 3])


def wrapped(network: nn.Module | None = None, **settings: Any) -> InMergeWrapper:
    settings = {
        "transient": True,
        "similarity_threshold": -1.0,
        "merge_probability": 1.0,
        "shallow_layers": 0,
        **settings,
    }
    return InMergeWrapper(small_net() if network is None else network, **settings)


def sgd(model: nn.Module, **settings: Any) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), **{"lr": 0.1, **settings})


def loss_of(model: nn.Module) -> Tensor:
    torch.manual_seed(5)  # of the dropout
    return nn.functional.cross_entropy(model(IMAGES), LABELS)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def in_the_middle(**settings: Any) -> tuple[InMergeWrapper, torch.optim.SGD, dict[str, Tensor]]:
    """A model after its forward and backward pass, its optimizer, and the whole weights."""
    model = wrapped(**settings)
    optimizer = sgd(model)
    model.attach(optimizer)
    whole = weights_of(model)
    loss_of(model.train()).backward()
    assert not states_equal(weights_of(model), whole)  # the kernels are merged now
    return model, optimizer, whole


def merged_by_hand(model: InMergeWrapper, whole: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights with the pairs of the next step merged by the literal loop."""
    weights = {name: weight.clone() for name, weight in whole.items()}
    for layer, (targets, sources) in model.next_pairs().items():
        assert sources is not None and len(targets)
        pairs = list(zip(targets.tolist(), sources.tolist(), strict=True))
        name = f"module.{layer}.weight"
        weights[name], _ = reference.merge(whole[name], pairs, model.merge_weight, -1.0)
    return weights


# -- the law -------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["torch", pytest.param("native", marks=NEEDS_COMPILER)])
def test_a_step_leads_from_the_unmerged_weights_along_the_gradient_at_the_merged_ones(
    engine: Any,
) -> None:
    model = wrapped(engine=engine)
    optimizer = sgd(model)
    model.attach(optimizer)
    model.train()
    for _ in range(5):
        whole = weights_of(model)
        merged = merged_by_hand(model, whole)
        optimizer.zero_grad()
        loss_of(model).backward()
        seen = weights_of(model)
        for name, weight in merged.items():
            torch.testing.assert_close(seen[name], weight, rtol=1e-5, atol=1e-6)
        twin = small_net().train()
        twin.load_state_dict({name.removeprefix("module."): w for name, w in seen.items()}, False)
        for buffer, other in zip(twin.buffers(), model.module.buffers(), strict=True):
            buffer.copy_(other)
        loss_of(twin).backward()
        optimizer.step()
        after = weights_of(model)
        for name, parameter in twin.named_parameters():
            assert parameter.grad is not None
            expected = whole[f"module.{name}"].add(parameter.grad, alpha=-0.1)
            assert torch.equal(after[f"module.{name}"], expected), name
    report = model.report()
    assert model.step == 5 and report.merged == report.drawn > 0


def test_the_literal_loop_makes_the_same_step() -> None:
    """On a single layer whose gradient is known: loss = sum of squares / 2, gradient = weight."""
    network = nn.Sequential(nn.Conv2d(2, 9, 3, bias=False))
    model = wrapped(
        network, similarity_threshold=0.0, merge_weight=0.7, shallow_layers=0.625, include=["0"]
    )
    optimizer = sgd(model)
    model.attach(optimizer)
    expected = network[0].weight.detach().clone()
    for _ in range(10):
        ((targets, sources),) = model.next_pairs().values()
        assert sources is not None
        expected = reference.transient_step(
            expected,
            list(zip(targets.tolist(), sources.tolist(), strict=True)),
            lambda weight: weight,
            lr=0.1,
            merge_weight=0.7,
            similarity_threshold=0.0,
        )
        optimizer.zero_grad()
        model(torch.zeros(1, 2, 4, 4))
        (network[0].weight.square().sum() / 2).backward()
        optimizer.step()
    torch.testing.assert_close(network[0].weight.detach(), expected, rtol=1e-5, atol=1e-6)
    assert 0 < model.report().merged < model.report().drawn


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.RMSprop])
def test_any_optimizer_steps_from_unmerged_weights(kind: Any) -> None:
    model = wrapped()
    optimizer = kind(model.parameters(), lr=1e-3, weight_decay=0.1)
    model.attach(optimizer)
    twin = small_net()
    twin_optimizer = kind(twin.parameters(), lr=1e-3, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(model.train()).backward()
        for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
            theirs.grad = None if ours.grad is None else ours.grad.clone()
        optimizer.step()
        twin_optimizer.step()
        for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.equal(ours, theirs)


# -- whoever looks sees whole kernels ------------------------------------------------------------


def evaluated(model: InMergeWrapper) -> dict[str, Tensor]:
    model.eval()
    return weights_of(model)


def seen_without_gradient(model: InMergeWrapper) -> dict[str, Tensor]:
    with torch.no_grad():
        model(IMAGES)
    return weights_of(model)


def seen_by_the_bare_network(model: InMergeWrapper) -> dict[str, Tensor]:
    model.module.eval()
    model.module(IMAGES)
    return weights_of(model)


def parameters_in(state: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    names = [name for name, _ in small_net().named_parameters()]
    return {f"module.{name}": state[prefix + name].detach().clone() for name in names}


def exported(model: InMergeWrapper) -> dict[str, Tensor]:
    with pytest.warns(UserWarning):
        path = export_weights(model, Path(FOLDER[0], "x.safetensors"))
    return parameters_in(load_file(path))


def pickled(model: InMergeWrapper) -> dict[str, Tensor]:
    return weights_of(pickle.loads(pickle.dumps(model)))


def pickled_network(model: InMergeWrapper) -> dict[str, Tensor]:
    file = io.BytesIO()
    torch.save(model.module, file)
    file.seek(0)
    network = torch.load(file, weights_only=False)
    assert not network._forward_pre_hooks
    return {f"module.{name}": p.detach() for name, p in network.named_parameters()}


def averaged(model: InMergeWrapper) -> dict[str, Tensor]:
    average = AveragedModel(model)
    average.update_parameters(model)
    return weights_of(average.module)


FOLDER: list[Path] = []  # where the exporting look writes
LOOKS: dict[str, Callable[[InMergeWrapper], dict[str, Tensor]]] = {
    "evaluation": evaluated,
    "a pass without gradient": seen_without_gradient,
    "a pass of the network itself": seen_by_the_bare_network,
    "state_dict": lambda model: parameters_in(model.state_dict(), "module."),
    "state_dict of the network": lambda model: parameters_in(model.module.state_dict()),
    "state_dict of a part": lambda model: {
        "module.convs.3.weight": model.module.convs.state_dict()["3.weight"].clone(),
        **{n: w for n, w in weights_of(model).items() if n != "module.convs.3.weight"},
    },
    "export": exported,
    "deepcopy": lambda model: weights_of(copy.deepcopy(model)),
    "deepcopy of the network": lambda model: {
        f"module.{name}": p.detach() for name, p in copy.deepcopy(model.module).named_parameters()
    },
    "pickle": pickled,
    "pickle of the network": pickled_network,
    "EMA": lambda model: weights_of(ModelEmaV3(model).module),
    "an average": averaged,
    "by hand": lambda model: (model.end_interlude(), weights_of(model))[1],
}


@pytest.mark.parametrize("look", LOOKS)
def test_kernels_are_unmerged_for_all_other_readers(look: str, tmp_path: Path) -> None:
    FOLDER[:] = [tmp_path]
    model, optimizer, whole = in_the_middle()
    seen = LOOKS[look](model)
    assert states_equal({name: seen[name] for name in whole}, whole)
    # And training goes on as if nobody had looked.
    model.train()
    undisturbed, other, _ = in_the_middle()
    for trained, steps in ((model, optimizer), (undisturbed, other)):
        steps.step()
        steps.zero_grad()
        loss_of(trained).backward()
        steps.step()
    assert states_equal(weights_of(model), weights_of(undisturbed))


def test_no_trace_is_left_in_the_network() -> None:
    model, optimizer, _ = in_the_middle()
    optimizer.step()
    for module in model.module.modules():
        assert "__getstate__" not in vars(module)
        assert not module._forward_pre_hooks
        assert not module._state_dict_pre_hooks and not module._load_state_dict_pre_hooks


@pytest.mark.filterwarnings("ignore:no training forward pass of this model")
def test_weights_loaded_in_the_middle_of_a_step_stay() -> None:
    for part in (lambda model: model, lambda model: model.module, lambda model: model.convs[3]):
        model, optimizer, _ = in_the_middle()
        state = part(wrapped()).state_dict()
        other = {
            name: value if name == "_extra_state" else torch.full_like(value, 0.5)
            for name, value in state.items()
        }
        part(model).load_state_dict(other)
        optimizer.zero_grad()
        optimizer.step()
        assert (part(model).state_dict()[next(iter(other))] == 0.5).all()
        assert torch.equal(model.convs[3].weight, torch.full_like(model.convs[3].weight, 0.5))


def test_gradient_clipping_is_that_of_the_gradient_at_the_merged_weights() -> None:
    model, optimizer, whole = in_the_middle()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    norm = torch.stack([g.norm() for g in gradients]).norm()
    found = nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    torch.testing.assert_close(found, norm)
    optimizer.step()
    moved = torch.stack([(p - whole[n]).norm() for n, p in model.named_parameters()]).norm()
    torch.testing.assert_close(moved, torch.tensor(1e-4), rtol=1e-3, atol=0)


# -- steps that are not one forward, one backward ------------------------------------------------


def test_an_exception_and_a_skipped_step_lose_nothing() -> None:
    model, optimizer, whole = in_the_middle()
    merged = weights_of(model)
    with pytest.raises(ValueError):
        model(torch.zeros(0, 3, 12, 12).requires_grad_())  # BatchNorm refuses an empty batch
        raise ValueError("no loss")
    optimizer.zero_grad()  # as a scaler does that skips the step
    loss_of(model).backward()
    assert states_equal(weights_of(model), merged)  # the same pairs, for the step did not count
    model.eval()
    assert states_equal(weights_of(model), whole)
    assert model.step == 0 and model.report().drawn == 0


def test_a_scaler_that_skips_a_step_keeps_the_unmerged_weights() -> None:
    for fused in (False, True):
        model = wrapped()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)
        model.attach(optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
        whole = weights_of(model)
        scaler.scale(loss_of(model.train())).backward()
        next(model.parameters()).grad.fill_(torch.inf)  # type: ignore[union-attr]
        scaler.step(optimizer)
        scaler.update()
        assert states_equal(weights_of(model.eval()), whole)


@pytest.mark.parametrize("engine", ["torch", pytest.param("native", marks=NEEDS_COMPILER)])
def test_an_error_in_the_middle_of_merging_loses_nothing(engine: Any) -> None:
    class Failing(ZScore):
        def alike(self, cosines: Tensor, fan_in: int) -> Tensor:
            if fan_in > 100:  # of the last layer
                raise FloatingPointError("no answer")
            return super().alike(cosines, fan_in)

    model = wrapped(similarity_threshold=Failing(-100.0), engine=engine)
    optimizer = sgd(model)
    model.attach(optimizer)
    whole = weights_of(model)
    with pytest.raises(FloatingPointError):
        loss_of(model.train())
    model.eval()
    assert states_equal(weights_of(model), whole)


def test_a_network_that_is_converted_in_the_middle_of_a_step_is_restored() -> None:
    model, _, whole = in_the_middle()
    model.double()
    model.eval()
    assert states_equal(weights_of(model), {name: w.double() for name, w in whole.items()})


def test_a_capture_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer, _ = in_the_middle()
    optimizer.step()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="CUDA graph would repeat the pairs"):
        loss_of(model)


def test_micro_batches_are_merged_alike_and_counted_once() -> None:
    model, optimizer, _ = in_the_middle()
    merged = weights_of(model)
    for _ in range(3):
        loss_of(model).backward()
        assert states_equal(weights_of(model), merged)
    model.eval()  # a look in between changes nothing
    model.train()
    loss_of(model).backward()
    assert states_equal(weights_of(model), merged)
    optimizer.step()
    assert model.step == 1
    assert model.report().drawn == sum(site.shape[0] for site in model.plan.merged)


def test_two_forward_passes_before_the_backward_passes() -> None:
    model = wrapped()
    optimizer = sgd(model)
    model.attach(optimizer)
    model.train()
    losses = [loss_of(model), loss_of(model)]
    losses[0].backward()
    losses[1].backward()  # PyTorch refuses it where a weight was written since its forward pass
    optimizer.step()
    assert model.step == 1


def test_a_closure_is_evaluated_at_merged_weights_and_the_step_is_made_from_unmerged_ones() -> None:
    seen, merged = [], []

    class Watching(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            with torch.enable_grad():
                closure()
            seen.append(weights_of(model))
            return super().step()

    model = wrapped()
    optimizer = Watching(model.parameters(), lr=0.1)
    model.attach(optimizer)
    whole = weights_of(model.train())

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        merged.append(weights_of(model))
        return loss

    for keywords in (False, True):
        optimizer.step(closure=closure) if keywords else optimizer.step(closure)
        assert states_equal(seen[-1], whole) and not states_equal(merged[-1], whole)
        whole = weights_of(model)
    assert model.step == 2


def test_lbfgs_evaluates_its_closure_at_merged_weights_many_times() -> None:
    model = wrapped()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4)
    model.attach(optimizer)
    merged: list[bool] = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        whole = weights_of(model)
        loss = loss_of(model.train())
        loss.backward()
        merged.append(not states_equal(weights_of(model), whole))
        return loss

    optimizer.step(closure)
    assert len(merged) > 2 and all(merged)
    whole = weights_of(model)
    model.eval()
    assert states_equal(weights_of(model), whole) and model.step == 1


def test_sam_climbs_and_returns_between_two_forward_passes() -> None:
    model, optimizer, whole = in_the_middle()
    kept = {name: p.data for name, p in model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.data = parameter + 0.05 * parameter.grad  # another tensor, as SAM's
    optimizer.zero_grad()
    loss_of(model).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    for name, parameter in model.named_parameters():
        parameter.data = kept[name]
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, whole[name].add(gradients[name], alpha=-0.1))


def test_two_optimizers_step_their_own_layers() -> None:
    model = wrapped()
    network: SmallNet = model.module  # type: ignore[assignment]
    first = torch.optim.SGD([*network.convs[:2].parameters()], lr=0.1)
    second = torch.optim.SGD([*network.convs[2:].parameters()], lr=0.1)
    model.attach(first)
    model.attach(second)
    whole = weights_of(model.train())
    loss_of(model).backward()
    assert all(
        not torch.equal(network.convs[n].weight, whole[f"module.convs.{n}.weight"])
        for n in range(4)
    )
    first.step()
    for n in (2, 3):  # not stepped yet, and whole for whoever looks
        assert torch.equal(network.convs[n].weight, whole[f"module.convs.{n}.weight"])
    second.step()
    assert [layer.passes for layer in model.report()] == [1] * 4
    loss_of(model).backward()
    second.step()
    assert [layer.steps for layer in model.report()] == [1, 1, 2, 2]


def test_frozen_layers_are_left_alone() -> None:
    model = wrapped()
    model.convs[2].requires_grad_(False)
    optimizer = sgd(model)
    model.attach(optimizer)
    whole = weights_of(model.train())
    loss_of(model).backward()
    assert torch.equal(model.convs[2].weight, whole["module.convs.2.weight"])
    assert not torch.equal(model.convs[3].weight, whole["module.convs.3.weight"])
    optimizer.step()
    assert [layer.passes for layer in model.report()] == [1, 1, 0, 1]


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_activations_see_the_merged_kernels(reentrant: bool) -> None:
    class Checkpointed(SmallNet):
        def forward(self, x: Tensor) -> Tensor:
            x = x.requires_grad_()
            return checkpoint(super().forward, x, use_reentrant=reentrant)

    gradients = []
    for kind in (SmallNet, Checkpointed):
        torch.manual_seed(0)
        network = kind()
        for norm in network.norms:  # a recomputation would measure twice
            norm.track_running_stats = False
        model = wrapped(network)
        optimizer = sgd(model)
        model.attach(optimizer)
        whole = weights_of(model)
        loss_of(model.train()).backward()
        assert not states_equal(weights_of(model), whole)
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


@pytest.mark.parametrize("what", ["wrapper", "network"])
def test_compiled_code_sees_the_merged_kernels_and_is_not_compiled_again(what: str) -> None:
    torch.compiler.reset()
    compilations: list[int] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        compilations.append(1)
        return graph.forward

    eager = wrapped(small_net().eval())
    network = small_net().eval()
    if what == "network":
        network = torch.compile(network, backend=backend)  # type: ignore[assignment]
    model = wrapped(network)
    called = torch.compile(model, backend=backend) if what == "wrapper" else model
    optimizers = [sgd(eager), sgd(model)]
    for one, optimizer in zip((eager, model), optimizers, strict=True):
        one.attach(optimizer)
        one.train()
        for module in one.modules():  # dropout draws differently in compiled code
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    counts = []
    for _ in range(4):
        for one, optimizer in zip((eager, called), optimizers, strict=True):
            optimizer.zero_grad()
            loss_of(one).backward()
            optimizer.step()
        counts.append(len(compilations))
    for ours, theirs in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert model.report().merged == eager.report().merged > 0
    assert counts[-1] == counts[1]


# -- several processes ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("transient")
    root = Path(__file__).parents[1]
    script = root / "tests" / "scripts" / "transient_parallel.py"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*launcher, "--nproc_per_node", "2", script, folder],
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_replicas_are_equal_after_each_step_and_micro_batches_alike(two_ranks: Any) -> None:
    first, second = (rank["shared"] for rank in two_ranks)
    assert first == second and first["drawn"] > 0
    merged = first["merged"]
    assert all(merged[n] == merged[n + 1] for n in range(0, len(merged), 2))
    assert not set(merged) & set(first["whole"])


def test_replicas_that_draw_for_themselves_are_equal_after_each_step_too(two_ranks: Any) -> None:
    first, second = (rank["own"] for rank in two_ranks)
    assert first["whole"] == second["whole"]
    assert not set(first["merged"]) & set(second["merged"])
    assert two_ranks[0]["mean"]["merged"] != two_ranks[1]["mean"]["merged"]
    assert all(rank["mean"]["worst"] < 1e-6 for rank in two_ranks)


def test_shards_are_refused_with_the_reason(two_ranks: Any) -> None:
    assert all("transient=True does not work with FSDP2" in rank["sharded"] for rank in two_ranks)


# -- what it means for the rest ------------------------------------------------------------------


def test_a_resumed_run_continues_to_the_bit() -> None:
    def steps(model: InMergeWrapper, optimizer: Any, count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            loss_of(model.train()).backward()
            optimizer.step()

    settings = {"merge_probability": 0.5, "schedule": Schedule(end=8, decay="linear")}
    unbroken = wrapped(**settings)
    optimizer = sgd(unbroken, momentum=0.9)
    unbroken.attach(optimizer)
    steps(unbroken, optimizer, 3)
    loss_of(unbroken).backward()  # saved in the middle of a step
    saved = copy.deepcopy((unbroken.state_dict(), optimizer.state_dict()))
    optimizer.zero_grad()
    steps(unbroken, optimizer, 3)
    resumed = wrapped(**settings)
    second = sgd(resumed, momentum=0.9)
    resumed.attach(second)
    resumed.load_state_dict(saved[0])
    second.load_state_dict(saved[1])
    steps(resumed, second, 3)
    # Buffers differ by the forward pass that was thrown away.
    assert states_equal(weights_of(resumed), weights_of(unbroken))
    assert str(resumed.report()) == str(unbroken.report())


def test_the_schedule_ends_it_and_the_export_warning_knows() -> None:
    model = wrapped(schedule=Schedule(end=2))
    optimizer = sgd(model)
    model.attach(optimizer)
    for expected in (True, True, False):
        optimizer.zero_grad()
        loss_of(model.train()).backward()
        optimizer.step()
        assert model.statistics_lag == expected
    assert [layer.passes for layer in model.report()] == [2] * 4


def test_batch_norm_is_recalibrated_on_unmerged_kernels() -> None:
    model, _, whole = in_the_middle()
    model.recalibrate([IMAGES])
    assert states_equal(weights_of(model), whole) and not model.statistics_lag
    twin = small_net()
    twin.load_state_dict({n.removeprefix("module."): w for n, w in whole.items()}, strict=False)
    twin.norms[0].train()(twin.convs[0](IMAGES))
    momentum_corrected = twin.norms[0].running_mean / 0.1
    torch.testing.assert_close(model.norms[0].running_mean, momentum_corrected)


def test_thresholds_and_monitoring_mean_the_same() -> None:
    model = wrapped(similarity_threshold=ZScore(0.0), inspect_every=1)
    optimizer = sgd(model)
    model.attach(optimizer)
    loss_of(model.train()).backward()
    optimizer.step()
    assert 0 < model.report().merged < model.report().drawn
    assert [entry.name for entry in model.history] == [site.name for site in model.plan.merged]


def test_nothing_happens_silently() -> None:
    model = wrapped()
    optimizer = sgd(model)
    with pytest.warns(NoEffectWarning, match="no optimizer is attached"):
        for _ in range(10):
            loss_of(model.train()).backward()
    whole = weights_of(model)
    loss_of(model)
    assert states_equal(weights_of(model), whole)  # nobody would put the kernels back
    model.attach(optimizer)
    loss_of(model.module).backward()
    with pytest.warns(NoEffectWarning, match="no training forward pass of this model"):
        optimizer.step()
    with pytest.raises(RuntimeError, match=r"merge_\(\) merges permanently"):
        model.merge_()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"merge_momentum": True}, "merge_momentum has no effect with transient=True"),
        ({"transient": False, "replica_draws": True}, "replica_draws=True needs transient=True"),
        ({"direction": "north"}, "direction must be 'partner' or 'signed'"),
        ({"radius": -0.1}, r"radius must lie in \[0, 2\], got -0.1"),
        ({"radius": 0.2}, "radius=0.2 has no effect with direction='partner', where merge_weight"),
        (
            {"direction": "signed", "merge_weight": 0.7},
            "merge_weight=0.7 has no effect with direction='signed', where radius is the size",
        ),
        (
            {"transient": False, "merge_momentum": True, "direction": "gaussian"},
            "merge_momentum needs a partner",
        ),
    ],
)
def test_settings_that_contradict_each_other(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrapped(**settings)


# -- directions ----------------------------------------------------------------------------------


def moves(direction: str, **settings: Any) -> list[tuple[Tensor, Tensor, InMergeWrapper]]:
    """(kernels before, kernels after a persistent pass, model) of each layer, flattened."""
    model = wrapped(transient=False, direction=direction, **settings)
    before = weights_of(model)
    model.merge_()
    after = weights_of(model)
    names = [f"module.{site.name}.weight" for site in model.plan.merged]
    return [(before[name].flatten(1), after[name].flatten(1), model) for name in names]


def test_signed_moves_are_the_references_and_go_both_ways() -> None:
    model = wrapped(transient=False, direction="signed", radius=0.4)
    pairs, before = model.next_pairs(), weights_of(model)
    model.merge_()
    signs = []
    for layer, (targets, sources) in pairs.items():
        assert sources is not None
        old = before[f"module.{layer}.weight"]
        new = model.module.get_submodule(layer).weight.detach()
        for i, j in zip(targets.tolist(), sources.tolist(), strict=True):
            ways = {sign: reference.signed(old[i], old[j], sign, 0.4) for sign in (-1, 1)}
            fits = [s for s, way in ways.items() if torch.allclose(new[i], way, atol=1e-6)]
            assert len(fits) == 1
            signs += fits
    assert 0.25 < signs.count(1) / len(signs) < 0.75


@pytest.mark.parametrize("direction", ["signed", "gaussian"])
def test_the_radius_is_the_relative_length_of_the_move(direction: str) -> None:
    for before, after, _ in moves(direction, radius=0.25):
        size = (after - before).norm(dim=1) / before.norm(dim=1)
        torch.testing.assert_close(size, torch.full_like(size, 0.25), rtol=1e-3, atol=0)


def test_multiplicative_noise_has_the_radius_in_expectation() -> None:
    sizes = [
        (after - before).norm(dim=1) / before.norm(dim=1)
        for before, after, _ in moves("multiplicative", radius=0.25)
    ]
    assert torch.cat(sizes).square().mean().sqrt() == pytest.approx(0.25, rel=0.1)
    for before, after, _ in moves("multiplicative", radius=0.25):
        assert torch.equal(before == 0, after == 0)


@pytest.mark.parametrize("direction", ["signed", "gaussian", "multiplicative"])
def test_the_threshold_decides_which_kernels_move_in_every_direction(direction: str) -> None:
    chosen = []
    for way in ("partner", direction):
        layers = moves(way, similarity_threshold=0.1, merge_probability=0.7)
        chosen.append([(before != after).any(dim=1) for before, after, _ in layers])
    assert all(map(torch.equal, *chosen))
    assert 0 < torch.cat(chosen[0]).sum() < len(torch.cat(chosen[0]))


@pytest.mark.parametrize("direction", ["partner", "signed", "gaussian", "multiplicative"])
def test_norms_are_kept_on_demand_in_every_direction(direction: str) -> None:
    size = {"merge_weight": 0.7} if direction == "partner" else {"radius": 0.5}
    for before, after, _ in moves(direction, keep_norm=True, **size):
        assert not torch.equal(before, after)
        torch.testing.assert_close(after.norm(dim=1), before.norm(dim=1))


def test_directions_depend_on_the_seed_and_the_step_alone() -> None:
    def after(seed: int, steps: int) -> dict[str, Tensor]:
        torch.manual_seed(steps * 100)
        model = wrapped(transient=False, direction="gaussian", seed=seed)
        for _ in range(steps):
            model.merge_()
        return weights_of(model)

    assert states_equal(after(1, 2), after(1, 2))
    assert not states_equal(after(1, 2), after(2, 2))


def test_a_weight_above_one_pushes_kernels_apart() -> None:
    model = wrapped(transient=False, merge_weight=1.3, partner="most_similar", keep_norm=True)
    weight = model.convs[3].weight
    gram = nn.functional.normalize(weight.detach().flatten(1), dim=1)
    before = (gram @ gram.T).fill_diagonal_(-1).amax(dim=1)
    norms = weight.flatten(1).norm(dim=1).detach().clone()
    model.merge_()
    gram = nn.functional.normalize(weight.detach().flatten(1), dim=1)
    after = (gram @ gram.T).fill_diagonal_(-1).amax(dim=1)
    assert after.mean() < 0.85 * before.mean()
    torch.testing.assert_close(weight.flatten(1).norm(dim=1), norms)


# -- cost ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("probability", [0.3, 1.0])
def test_only_the_kernels_that_change_are_copied(probability: float) -> None:
    network = timm.create_model("resnet10t", num_classes=3)
    model = wrapped(network, merge_probability=probability, shallow_layers=0.5)
    optimizer = sgd(model)
    model.attach(optimizer)
    model.train()(torch.randn(2, 3, 32, 32))
    interlude = model._interlude
    assert interlude is not None
    copied = sum(rows.nbytes for part in interlude._kept for rows in part.rows)
    merged = sum(p.nbytes for layer in model._layers() for p in layer.parameters)
    assert copied == pytest.approx(probability * merged, rel=0.1 if probability < 1 else 1e-9)


@pytest.mark.parametrize("transient", [True, False])
def test_kernels_that_grow_alike_in_training_are_not_put_down_to_transient_merging(
    transient: bool,
) -> None:
    model = wrapped(transient=transient, merge_weight=0.999, inspect_every=1)
    optimizer = sgd(model, lr=0.0)
    model.attach(optimizer)
    loss_of(model.train()).backward()
    optimizer.step()
    with torch.no_grad():  # as a training without merging might end
        weight = model.module.convs[3].weight
        weight.copy_(weight[:1] + 1e-3 * weight)
    loss_of(model).backward()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.step()
    named = [str(w.message) for w in caught if w.category is CollapseWarning]
    assert len(named) == (0 if transient else 1)


def test_a_setting_that_the_optimizer_cannot_work_with_is_refused_and_not_taken() -> None:
    model = wrapped(transient=False)
    optimizer = AdamWScheduleFree(model.parameters(), lr=0.01)
    model.attach(optimizer)
    with pytest.raises(RuntimeError, match="cannot follow direction='gaussian'"):
        model.direction = "gaussian"
    assert model.direction == "partner"
    model.transient = True
    model.direction = "gaussian"
    with pytest.raises(RuntimeError, match="cannot follow direction='gaussian'"):
        model.transient = False
    assert model.transient

"""Replicas stay equal, shards are merged as a whole, and what cannot be merged is refused."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from inmerge_wrap.replicas import check_replicas
from tests.scripts.common import TinyNet, attached, equal, loss_of, sgd, train, wrapped

ROOT = Path(__file__).parents[1]
SCRIPTS = Path(__file__).parent / "scripts"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]


def start(command: list[Any], **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [str(part) for part in command],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> None:
    try:
        output, _ = process.communicate(timeout=600)
    finally:
        process.kill()
    assert process.returncode == 0, output[-6000:]


def outcomes(folder: Path, ranks: int) -> list[dict[str, Any]]:
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]


# -- DDP under Accelerate ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def replicas(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("three")
    cases = ["merged", "drawn_globally", "one_rank_changed", "one_rank_resumed"]
    cases += ["saved_and_resumed"]
    finish(start([*TORCHRUN, 3, SCRIPTS / "data_parallel.py", folder, *cases]))
    return outcomes(folder, 3)


def assert_replicas_equal(ranks: list[dict[str, Any]]) -> None:
    merged = [rank["merged"] for rank in ranks]
    assert {rank["world"] for rank in ranks} == {len(ranks)}
    assert {rank["parallel"] for rank in merged} == {"DistributedDataParallel"}
    # They had other data and other random numbers ...
    assert len({rank["buffers"] for rank in merged}) == len(ranks)
    assert len({rank["global generator"] for rank in merged}) == len(ranks)
    # ... and the same weights, of which a good part was merged.
    assert len({rank["weights"] for rank in merged}) == 1
    assert all(rank["report"] == merged[0]["report"] for rank in merged)
    assert all(layer["merged"] > 10 for layer in merged[0]["report"].values())


def test_three_replicas_end_with_the_same_bits(replicas: list[dict[str, Any]]) -> None:
    assert_replicas_equal(replicas)


def test_the_global_generator_would_have_let_them_drift(replicas: list[dict[str, Any]]) -> None:
    """The control: the comparison above can fail."""
    assert replicas[0]["drawn_globally"] != replicas[1]["drawn_globally"]


def test_a_drift_is_an_error_on_every_rank_that_names_the_layer(
    replicas: list[dict[str, Any]],
) -> None:
    for rank in replicas:
        error = rank["one_rank_changed"]["error"]
        assert "drifted apart: body.last.weight differ" in error and "rank(s) [1]" in error
        # Changed after step 6; the comparisons are at steps 1, 5 and 9.
        assert rank["one_rank_changed"]["step"] == 9


def test_a_checkpoint_loaded_on_one_rank_only_is_found_at_the_first_step(
    replicas: list[dict[str, Any]],
) -> None:
    for rank in replicas:
        assert "the step counter of merging" in rank["one_rank_resumed"]["error"]
        assert "load checkpoints" in rank["one_rank_resumed"]["error"]


def test_replicas_saved_in_the_middle_continue_bit_for_bit(
    replicas: list[dict[str, Any]],
) -> None:
    runs = [rank["saved_and_resumed"] for rank in replicas]
    assert {run["steps"] for run in runs} == {4}
    assert len({run[how] for run in runs for how in ("straight", "resumed")}) == 1


def test_two_machines(tmp_path: Path) -> None:
    """Two nodes of one process each, as ``accelerate launch`` starts them, over loopback."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
    launch += ["--num_machines", 2, "--num_processes", 2, "--mixed_precision", "no"]
    launch += ["--dynamo_backend", "no", "--main_process_ip", "127.0.0.1"]
    launch += ["--main_process_port", port, "--machine_rank"]
    script = [SCRIPTS / "data_parallel.py", tmp_path, "merged"]
    nodes = [start([*launch, rank, *script], ACCELERATE_USE_CPU="true") for rank in range(2)]
    try:
        for node in nodes:
            finish(node)
    finally:
        for node in nodes:
            node.kill()
    assert_replicas_equal(outcomes(tmp_path, 2))


def test_alone_there_is_nothing_to_compare() -> None:
    check_replicas({"weight": torch.zeros(2, 2)}, {"step": 1})
    model, optimizer = attached(check_replicas_every=1)
    train(model, optimizer, 2)


# -- other settings and uneven inputs under plain DDP ---------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the cases for two ranks wrote; they share their processes, which are slow to start."""
    folder = tmp_path_factory.mktemp("two")
    finish(start([*TORCHRUN, 2, SCRIPTS / "two_ranks.py", folder]))
    return folder


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    return outcomes(folder, 2)


@pytest.mark.parametrize(
    "case,message",
    [
        ("other_seeds", "the replicas differ in seed: "),
        ("other_radius", "the replicas differ in radius: 0."),
        ("other_plan", "the replicas differ in plan: "),
    ],
)
def test_replicas_that_merge_differently_are_an_error_at_the_first_step(
    ranks: list[dict[str, Any]], case: str, message: str
) -> None:
    for rank in ranks:
        assert rank[case]["error"].startswith(message)
        assert "on rank 0" in rank[case]["error"] and "on rank 1" in rank[case]["error"]
        assert rank[case]["step"] == 0


def test_merging_by_hand_differently_is_an_error_soon(ranks: list[dict[str, Any]]) -> None:
    assert all("differ in seed" in rank["by_hand"]["error"] for rank in ranks)
    assert max(rank["by_hand"]["step"] for rank in ranks) <= 1


@pytest.mark.parametrize(
    "case",
    [
        "other_seeds_in_the_forward_pass",
        "other_intervals_of_inspection",
        "changed_alike_after_attaching",
    ],
)
def test_what_may_differ_is_no_error(ranks: list[dict[str, Any]], case: str) -> None:
    assert [rank[case]["error"] for rank in ranks] == [None, None]


def test_a_process_that_steps_alone_waits_for_nobody(ranks: list[dict[str, Any]]) -> None:
    assert [rank["only_one_steps"] for rank in ranks] == [
        {"step": 3, "alone": 3},
        {"step": 3, "alone": 0},
    ]


def test_replicas_with_uneven_inputs_stay_equal(ranks: list[dict[str, Any]]) -> None:
    """Rank 1 had 3 batches in epochs where rank 0 had 5; both count the steps of rank 0."""
    first, second = (rank["uneven"] for rank in ranks)
    assert first["ends"] == second["ends"] and len(set(first["ends"])) == 4
    assert first["step"] == second["step"] == 3 * 5 + 3
    assert first["merged"] > second["merged"] > 10  # so one process did merge less often


def test_the_schedule_of_the_forward_pass_counts_the_steps_of_all(
    ranks: list[dict[str, Any]],
) -> None:
    first, second = (rank["uneven_in_the_forward_pass"] for rank in ranks)
    assert first["ends"] == second["ends"] and len(set(first["ends"])) == 4
    assert first["step"] == second["step"] == 3 * 5 + 3


@pytest.mark.parametrize("where", ["", "_in_the_forward_pass"])
def test_a_comparison_that_would_wait_forever_is_refused(
    ranks: list[dict[str, Any]], where: str
) -> None:
    for rank in ranks:
        error = rank[f"uneven_but_compared{where}"]["error"]
        assert "check_replicas_every=2 would wait forever" in error


# -- in the forward pass -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["outputs", "outputs, compared", "weights"])
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_merging_in_the_forward_pass_is_that_of_one_process(
    ranks: list[dict[str, Any]], kind: str, name: str
) -> None:
    """Each rank draws for its own images what one process draws for them."""
    for rank in ranks:
        outcome = rank[f"{kind}, {name}"]
        assert outcome["worst"] < 1e-6 < 1e-3 < outcome["moved"]
        assert outcome["drawn"] is True and outcome["merged"] > 0 and outcome["step"] == 4


# -- FSDP2 ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case",
    [
        "wrapped_then_sharded",
        "sharded_then_wrapped",
        "attached_then_sharded",
        "with_evaluation_between",
        "by_hand_after_evaluation",
        "inside_a_sharded_parent",
        "replicated_and_sharded",
        "other_ranks",
        "schedule_free",
        "resumed",
        "resumed_with_its_optimizer",
        "resumed_from_an_asynchronous_save",
        "resumed_by_accelerate",
    ],
)
def test_fsdp2_equals_one_process(ranks: list[dict[str, Any]], case: str) -> None:
    for rank in ranks:
        outcome = rank[case]
        # Both ranks see the same data: halves of equal gradients add up without rounding.
        assert outcome["worst"] == 0.0
        assert outcome["reports"] is True and outcome["merged"] > 10
        assert outcome["sharded"] is True


def test_fsdp2_loading_optimizer_state_is_no_step(
    ranks: list[dict[str, Any]],
) -> None:
    """torch makes a fresh optimizer's state by a step, which must neither merge nor count."""
    for rank in ranks:
        for case in ("with_its_optimizer", "from_an_asynchronous_save", "by_accelerate"):
            assert rank[f"resumed_{case}"]["found"] == 2


def test_fsdp2_keeps_shards_and_uneven_ones(
    ranks: list[dict[str, Any]],
) -> None:
    first, second = (rank["wrapped_then_sharded"] for rank in ranks)
    assert (first["rows"], second["rows"]) == (4, 3)
    assert first["local"] + second["local"] == first["total"]


def test_fsdp2_evaluation_had_left_weights_unsharded(
    ranks: list[dict[str, Any]],
) -> None:
    """The trap is real: when the step came, the weight was a plain parameter."""
    assert ranks[0]["with_evaluation_between"]["seen"] == ["Parameter"]


def test_fsdp2_with_a_forgotten_optimizer_is_an_error(
    ranks: list[dict[str, Any]],
) -> None:
    for rank in ranks:
        error = rank["attached_and_forgotten"]["error"]
        assert "no longer holds the weights of mid, last" in error
        assert "create the optimizer after sharding" in error


def test_fsdp2_export_gathers(folder: Path) -> None:
    exported, expected = (load_file(folder / f"{n}.safetensors") for n in ("sharded", "alone"))
    assert equal(exported, expected)
    TinyNet().load_state_dict(exported)


def test_fsdp2_exports_a_timm_folder(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["exported_to_timm"]["equal"] is True
        assert "local-dir:" in rank["exported_to_timm"]["line"]


# -- what cannot be merged ----------------------------------------------------------------------


def test_fsdp1_is_refused(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert len(rank["flattened"]) == 4
        for error in rank["flattened"].values():
            assert "FSDP1" in error and "FSDP2" in error and "DDP" in error


def stand_in(name: str, module: str = "elsewhere") -> Any:
    """An object of a class by this name, for libraries that cannot be installed here."""
    return type(name, (), {"__module__": module, "param_groups": []})()


@pytest.mark.parametrize(
    "name,module",
    [
        ("DeepSpeedOptimizerWrapper", "accelerate.utils.deepspeed"),
        ("MegatronLMOptimizerWrapper", "accelerate.utils.megatron_lm"),
        ("DummyOptim", "accelerate.utils.deepspeed"),
        ("DeepSpeedZeroOptimizer", "deepspeed.runtime.zero.stage_1_and_2"),
        ("BF16_Optimizer", "deepspeed.runtime.bf16_optimizer"),
        ("DistributedOptimizer", "megatron.core.optimizer.distrib_optimizer"),
    ],
)
def test_deepspeed_and_megatron_are_refused_by_name(name: str, module: str) -> None:
    with pytest.raises(RuntimeError, match=rf"{name} steps copies.*DDP or FSDP2 \(fully_shard\)"):
        wrapped().attach(stand_in(name, module))


def test_accelerates_real_deepspeed_and_megatron_classes_are_refused() -> None:
    from accelerate.utils.deepspeed import DeepSpeedOptimizerWrapper
    from accelerate.utils.megatron_lm import MegatronLMOptimizerWrapper

    for kind in (DeepSpeedOptimizerWrapper, MegatronLMOptimizerWrapper):
        model = wrapped()
        with pytest.raises(RuntimeError, match=f"{kind.__name__} steps copies"):
            model.attach(kind.__new__(kind))


def test_a_flat_partition_taken_into_the_optimizer_is_an_error() -> None:
    """What DeepSpeed ZeRO does to an optimizer that was attached before."""
    model, optimizer = attached()
    flat = nn.Parameter(torch.cat([p.detach().flatten() for p in model.parameters()]))
    optimizer.param_groups[0]["params"] = [flat]
    flat.grad = torch.zeros_like(flat)
    with pytest.raises(RuntimeError, match="DeepSpeed, Megatron-LM and FSDP1 step copies"):
        optimizer.step()


def test_weights_emptied_by_zero3_are_an_error() -> None:
    model, optimizer = attached()
    loss_of(model, 0).backward()
    for parameter in model.parameters():
        parameter.grad = None
        parameter.data = torch.empty(0)  # as ZeRO-3 leaves them between two uses
    with pytest.raises(RuntimeError, match=r"mid have the shape \(0,\) instead of \(7, 5, 3, 3\)"):
        optimizer.step()


class OnXla(Tensor):
    """Says of itself what a tensor of torch_xla says; there is no such device here."""

    @property
    def device(self) -> torch.device:
        return torch.device("xla:0")


def test_xla_is_refused_before_and_after_the_weights_moved() -> None:
    model, optimizer = attached()
    model.mid.weight = nn.Parameter(model.mid.weight.detach().as_subclass(OnXla))
    with pytest.raises(RuntimeError, match=r"on XLA devices parameters are swapped.*CUDA or CPU"):
        optimizer.step()
    with pytest.raises(RuntimeError, match="on XLA devices"):
        model.attach(sgd(model))

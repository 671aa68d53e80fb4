"""peft: LoRA on convolutions trains factors, which are no kernels; full fine-tuning merges.

python -m tests.clients.peft_lora
"""

from __future__ import annotations

from pathlib import Path

import peft

from inmerge_wrap import InMergeWrapper
from tests.clients.check import SURE, check, merged, run
from tests.scripts.common import EXAMPLE, MERGED, sgd, tiny_net, train


def lora_has_nothing_to_merge(folder: Path, mode: str) -> None:
    config = peft.LoraConfig(r=2, target_modules=list(MERGED))
    network = peft.get_peft_model(tiny_net(), config).base_model.model
    try:
        InMergeWrapper(network, example_input=EXAMPLE, exclude=["*lora_*"], mode=mode, **SURE)
    except ValueError as error:
        check(f"an error: {error}", "frozen" in str(error))
    else:
        check("wrapping a network whose convolutions are frozen is an error", False)


def after_unloading(folder: Path, mode: str) -> None:
    """The network with its factors multiplied in is a plain one, and merges."""
    config = peft.LoraConfig(r=2, target_modules=list(MERGED))
    network = peft.get_peft_model(tiny_net(), config).merge_and_unload().requires_grad_(True)
    model = InMergeWrapper(network, example_input=EXAMPLE, shallow_layers=1, mode=mode, **SURE)
    optimizer = sgd(model)
    model.attach(optimizer)
    train(model, optimizer, 3)
    merged(model, 3)


if __name__ == "__main__":
    run(("peft",), lora_has_nothing_to_merge, after_unloading)

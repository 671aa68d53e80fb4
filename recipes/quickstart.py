"""Trains a network with in-model merging, without a download.

    accelerate launch recipes/quickstart.py

What it does: trains a small timm network on the scanned digits that scikit-learn ships, while
kernels are merged inside the forward pass; tests the last epoch; exports plain weights; loads them
with timm alone and checks that the logits are equal. Writes the weights and ``results.json`` into
``runs/quickstart/``.

Cost: two minutes of one CPU core. Expected: a test accuracy of about 0.99.

One run cannot show whether merging helps: chance decides which of two runs is ahead. The last line
of the output is the command that compares both, paired by seed.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from tqdm import tqdm

from inmerge_wrap import InMergeWrapper, __version__, export_timm

# -- options ---------------------------------------------------------------------------------------

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
add = parser.add_argument
add("--arch", default="resnet10t", help="any timm CNN (default: %(default)s)")
add("--mode", choices=["outputs", "step", "none"], default="outputs", help="merge inside the "
    "forward pass, for each image (outputs), in the weights after each optimizer step (step), or "
    "not at all (none) (default: %(default)s)")  # fmt: skip
add("--epochs", type=int, default=8, help="passes over the images (default: %(default)s)")
add("--batch-size", type=int, default=32, help="over all processes (default: %(default)s)")
add("--lr", type=float, default=0.05, help="peak of the one-cycle schedule (default: %(default)s)")
add("--seed", type=int, default=0, help="of network, order and merging (default: %(default)s)")
add("--out", type=Path, default=Path("runs/quickstart"), help="folder (default: %(default)s)")


# -- data ------------------------------------------------------------------------------------------


class Digits(Dataset[tuple[Tensor, int]]):
    """A part of scikit-learn's 1,797 digits: floats (1, 32, 32), enlarged from 8 x 8 pixels."""

    MEAN, STD = 0.305, 0.323  # of the training pixels in [0, 1]

    def __init__(self, part: str) -> None:
        digits = load_digits()
        order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
        train, val, test = order.split([1100, 200, 497])
        rows = {"train": train, "val": val, "test": test}[part]
        small = torch.from_numpy(digits.images)[rows, None].float() / 16
        self.pixels = F.interpolate(small, size=(32, 32), mode="bilinear")
        self.labels = torch.from_numpy(digits.target)[rows]
        steps: list[nn.Module] = [v2.Normalize([self.MEAN], [self.STD])]
        if part == "train":
            steps.insert(0, v2.RandomAffine(degrees=10, translate=(0.06, 0.06)))
        self.transform = v2.Compose(steps)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.pixels[index]), int(self.labels[index])


# -- training --------------------------------------------------------------------------------------


def train(accelerator: Accelerator, options: argparse.Namespace) -> tuple[nn.Module, list[float]]:
    """Returns the trained model, wrapped if it merges, and the validation accuracy by epoch."""
    set_seed(options.seed)
    network = timm.create_model(options.arch, num_classes=10, in_chans=1)
    loader = DataLoader(Digits("train"), options.batch_size, shuffle=True, drop_last=True)
    loader = accelerator.prepare(loader)
    total_steps = options.epochs * len(loader)

    # The two lines that merging takes: wrap the network ...
    model: nn.Module = network
    if options.mode != "none":
        model = InMergeWrapper.recommended(
            network, total_steps=total_steps, mode=options.mode, seed=options.seed
        )
    optimizer = torch.optim.SGD(model.parameters(), lr=options.lr, momentum=0.9, weight_decay=5e-4)
    if isinstance(model, InMergeWrapper):
        model.attach(optimizer)  # ... and attach its optimizer.

    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.lr, total_steps=total_steps)
    model, optimizer = accelerator.prepare(model, optimizer)
    accuracies = []
    bar = tqdm(range(options.epochs), desc="epochs", disable=not accelerator.is_main_process)
    for _ in bar:
        model.train()
        for pixels, labels in loader:
            accelerator.backward(F.cross_entropy(model(pixels), labels))
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        accuracies.append(accuracy(network, "val", accelerator.device))
        bar.set_postfix(val_accuracy=f"{accuracies[-1]:.3f}")
    return accelerator.unwrap_model(model), accuracies


# -- evaluation and export -------------------------------------------------------------------------


@torch.no_grad()
def predict(network: nn.Module, part: str, device: torch.device) -> Tensor:
    """Returns the logits (N, 10) of a part, in eval mode, on the CPU."""
    network.eval()
    batches = DataLoader(Digits(part), batch_size=200)
    return torch.cat([network(pixels.to(device)).cpu() for pixels, _ in batches])


def accuracy(network: nn.Module, part: str, device: torch.device) -> float:
    """Returns the share of right answers on a part."""
    right = predict(network, part, device).argmax(1) == Digits(part).labels
    return right.float().mean().item()


def export(model: nn.Module, folder: Path, device: torch.device) -> str:
    """Exports plain weights, checks them in plain timm and returns the call that loads them."""
    names = [str(digit) for digit in range(10)]
    about = {"input_size": (1, 32, 32), "mean": [Digits.MEAN], "std": [Digits.STD]}
    call = export_timm(model, folder, label_names=names, **about)
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).to(device)
    ours, theirs = (predict(network, "test", device) for network in (model, loaded))
    if not torch.equal(ours, theirs):
        raise SystemExit(f"{folder} gives other logits than the trained network: do not use it")
    return call


def main() -> None:
    options = parser.parse_args()
    if min(options.epochs, options.batch_size) < 1:
        parser.error("--epochs and --batch-size must be at least 1")
    # Without cpu=True, two processes on a machine without a GPU would train two networks.
    cpu = not (torch.cuda.is_available() or torch.backends.mps.is_available())
    # Each process takes its part of a batch, so that their number does not change the training.
    loading = DataLoaderConfiguration(split_batches=True)
    accelerator = Accelerator(cpu=cpu, dataloader_config=loading)
    model, accuracies = train(accelerator, options)
    if not accelerator.is_main_process:
        return
    result = {
        "settings": {name: str(value) for name, value in vars(options).items()},
        "val_accuracy": accuracies,
        "test_accuracy": accuracy(model, "test", accelerator.device),
        "environment": {
            "command": shlex.join(["python", *sys.argv]),
            "processes": accelerator.num_processes,
            "versions": {
                "inmerge_wrap": __version__,
                "torch": torch.__version__,
                "timm": timm.__version__,
            },
        },
    }
    if isinstance(model, InMergeWrapper):
        report = model.report()
        print(model.plan, report, sep="\n")
        result["merging"] = report.to_dict()
    call = export(model, options.out / "model", accelerator.device)
    (options.out / "results.json").write_text(json.dumps(result, indent=2))
    print(f"Test accuracy of this one run: {result['test_accuracy']:.3f}")
    print(f"The exported weights give equal logits in plain timm. Load them with\n  {call}")
    print(f"Results: {options.out}/results.json")
    print(
        "Does merging help? One run cannot tell. Compare pairs of runs from the same seeds:\n"
        "  accelerate launch recipes/medmnist_2d.py --dataset digits --seeds 5"
    )


if __name__ == "__main__":
    main()

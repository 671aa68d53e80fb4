"""ChestX-ray14 in the paper's two phases: training, then fine-tuning with in-model merging.

    accelerate launch recipes/chestxray.py --data-root DIR
    accelerate launch recipes/chestxray.py --data-root DIR --arch densenet121 --mode none  # CheXNet
    accelerate launch recipes/chestxray.py --dataset OWNER/NAME --revision COMMIT

What it does: trains as arXiv 2502.20516 does, with SGD whose learning rate is divided by 10 when
the validation loss stalls for 8 epochs: 30 epochs without merging, then 10 with merging, from the
best network of the first phase. Ten more epochs help any network, so ``--control`` also trains a
second phase without merging, with the same images in the same order. Every epoch ends with a
checkpoint, from which ``--resume`` continues.

``DIR`` is the NIH release as downloaded; inmerge_wrap/images/nih.py says what a Hugging Face data
set needs. Validation patients are a tenth of the training patients; no patient may be in two parts.
``--cache DIR`` decodes each image once (7.3 GB for all at 224 px); later epochs read the results.

Cost: meant for GPUs (112,120 images of 1024 px); a small folder runs on a CPU with ``--size 64``.
Expected: a mean test AUROC between those of the published systems that the table lists, 0.745 to
0.830. We have not run it on the whole data set.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, set_seed
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader
from torchvision.transforms import v2
from tqdm import tqdm

from inmerge_wrap import InMergeWrapper, export_timm
from inmerge_wrap.app.batches import per_process
from inmerge_wrap.app.records import environment
from inmerge_wrap.app.starting_weights import start_network
from inmerge_wrap.app.training import make_accelerator, one_line_if_out_of_memory
from inmerge_wrap.errors import at_least, for_command_line
from inmerge_wrap.files import replacing, write_json
from inmerge_wrap.images import nih
from inmerge_wrap.robustness import classification_metrics

# -- options ---------------------------------------------------------------------------------------

Parts, Options, Areas = dict[str, nih.Part], argparse.Namespace, dict[str, float | None]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet
SHORT = "Atel Card Effu Infi Mass Nodu Pnma Pntx Cons Edem Emph Fibr P_T Hern mean".split()
PUBLISHED = {  # test AUROC in the same order, as the paper lists them
    "U-DCNN": ".700 .810 .759 .661 .693 .669 .658 .799 .703 .805 .833 .786 .684 .872 .745",
    "LSTM": ".733 .856 .806 .673 .718 .777 .684 .805 .711 .806 .842 .743 .724 .775 .761",
    "AGCL": ".756 .887 .819 .689 .814 .755 .729 .850 .728 .848 .906 .818 .765 .875 .803",
    "CheXNet": ".769 .885 .825 .694 .824 .759 .715 .852 .745 .842 .906 .821 .766 .901 .807",
    "DNet": ".767 .883 .828 .709 .821 .758 .731 .846 .745 .835 .895 .818 .761 .896 .807",
    "CRAL": ".781 .880 .829 .702 .834 .773 .729 .857 .754 .850 .908 .830 .778 .917 .816",
    "CAN": ".777 .894 .829 .696 .838 .771 .722 .862 .750 .846 .908 .827 .779 .934 .817",
    "DualCXN": ".784 .888 .831 .705 .838 .796 .727 .876 .746 .852 .942 .837 .796 .912 .823",
    "LLAGnet": ".783 .885 .834 .703 .841 .790 .729 .877 .754 .851 .939 .832 .798 .916 .824",
    "CheXGCN": ".786 .893 .832 .699 .840 .800 .739 .876 .751 .850 .944 .834 .795 .929 .826",
    "InMerge": ".805 .895 .881 .710 .842 .750 .770 .878 .801 .888 .915 .818 .773 .903 .830",
}
OFFICIAL_TEST_IMAGES = 25_596  # in the release's test_list.txt
# On the device: workers transfer grey bytes, a twelfth of the data.
prepare = v2.Compose([v2.RGB(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
one = parser.add_mutually_exclusive_group(required=True)
one.add_argument("--data-root", type=Path, help="the NIH release")
one.add_argument("--dataset", help="a Hugging Face data set: a name on the hub, or a folder")
add = parser.add_argument
add("--revision", help="commit of a --dataset on the hub, 40 hex digits")
add("--cache", type=Path, help="folder of decoded images, created if needed")
add("--arch", default="resnet34", help="any timm CNN (default: %(default)s)")
add("--weights", default="imagenet", help="imagenet (downloaded by timm), none, or a file")
add("--size", type=at_least(1), default=224, help="side of the images (default: %(default)s)")
add("--mode", choices=["outputs", "step", "none"], help="in the second phase, merge inside the "
    "forward pass, for each image (outputs, the default), in the weights after each optimizer step "
    "(step), or not at all (none)")  # fmt: skip
add("--paper", action="store_true", help="--mode step with the constants of the paper")
add("--control", action="store_true", help="also train the second phase without merging")
add("--epochs", type=at_least(0), nargs=2, default=[30, 10], metavar=("FIRST", "SECOND"),
    help="epochs of the two phases (default: 30 10)")  # fmt: skip
add("--batch-size", type=int, default=324, help="over all processes (default: %(default)s)")
add("--lr", type=float, default=0.1, help="learning rate at the start (default: %(default)s)")
add("--workers", type=at_least(0), default=4, help="readers of each process (default: %(default)s)")
add("--seed", type=at_least(0), default=0, help="seed of validation patients, network and order")
add("--resume", action="store_true", help="continue the run in --out from its last epoch")
add("--out", type=Path, default=Path("runs/chestxray"), help="folder (default: %(default)s)")


# -- data ------------------------------------------------------------------------------------------


def read_parts(options: Options) -> Parts:
    try:
        if options.dataset:
            source = f"{options.dataset} {options.revision or ''}".strip()
            parts = nih.read_hub(options.dataset, options.revision, options.seed)
        else:
            source = str(options.data_root.resolve())
            parts = nih.read_release(options.data_root, options.seed)
    except ValueError as error:
        raise SystemExit(for_command_line(error)) from error
    if not options.cache:
        return parts
    about = source, options.size, options.workers
    return {k: nih.cached(v, options.cache / f"{k}.npy", *about) for k, v in parts.items()}


# -- evaluation ------------------------------------------------------------------------------------


@torch.no_grad()
def predict(accelerator: Accelerator, model: nn.Module, loader: DataLoader) -> list[Tensor]:
    """Returns the logits and labels of a part, in double precision, on the CPU of every process."""
    model.eval()
    outputs = []
    for images, labels in loader:
        pair = model(prepare(images)).float(), labels
        outputs.append([column.cpu() for column in accelerator.gather_for_metrics(pair)])
    return [torch.cat(column).double() for column in zip(*outputs, strict=True)]


def aurocs(logits: Tensor, labels: Tensor) -> Areas:
    """Returns the AUROC of each finding, None without positives or negatives, and their mean."""
    found: Areas = {}
    for finding, scores, truth in zip(nih.FINDINGS, logits.sigmoid().T, labels.T, strict=True):
        area = float(classification_metrics(scores, truth, task="binary")[0]["auroc"])
        found[finding] = None if math.isnan(area) else area
    known = [area for area in found.values() if area is not None]
    return found | {"mean": sum(known) / len(known) if known else None}


def print_tables(official: bool, rows: dict[str, Areas]) -> None:
    lines = [f"{'test AUROC':12} {' '.join(SHORT)}"]
    for name, areas in rows.items():
        cells = ["  - " if area is None else f"{area:.3f}".lstrip("0") for area in areas.values()]
        lines.append(f"{name:12} {' '.join(cells)}")
    if not official:
        lines.append(f"\nNOT COMPARABLE: published for {OFFICIAL_TEST_IMAGES:,} official images")
    print(*lines, *(f"{name:12} {row}" for name, row in PUBLISHED.items()), sep="\n")


# -- training --------------------------------------------------------------------------------------


def loaders_of(accelerator: Accelerator, parts: Parts, options: Options) -> list[DataLoader]:
    loaders = []
    for name in ("train", "val", "test"):
        train, size = name == "train", per_process(options.batch_size, accelerator.num_processes)
        images = nih.Radiographs(parts[name], options.size, train=train)
        about = {"num_workers": options.workers, "pin_memory": torch.cuda.is_available()}
        loaders.append(DataLoader(images, size, shuffle=train, drop_last=train, **about))
    return accelerator.prepare(*loaders)


def train_epoch(
    accelerator: Accelerator, model: nn.Module, loader: DataLoader, optimizer: Any, title: str
) -> float:
    """Returns the mean loss over the epoch and all processes."""
    model.train()
    losses = torch.zeros((), device=accelerator.device)
    for images, labels in tqdm(loader, title, disable=not accelerator.is_main_process):
        loss = F.binary_cross_entropy_with_logits(model(prepare(images)), labels)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses += loss.detach()  # stays on the device: .item() would wait for each step
    return accelerator.reduce(losses, "mean").item() / len(loader)


def train(
    accelerator: Accelerator, parts: Parts, options: Options, phase: str, start: str, lr: float
) -> dict[str, Any]:
    """Trains a phase (first, control or merged) from its last saved epoch, and tests its best one.

    Every epoch has seeds of its own: resumed phases are exact, second phases see the same images.
    """
    epochs, folder = options.epochs[phase != "first"], options.out / phase
    set_seed(options.seed)
    train_loader, val_loader, test_loader = loaders_of(accelerator, parts, options)
    network, *_ = start_network(options.arch, start, num_classes=len(nih.FINDINGS), channels=3)
    model: nn.Module = network
    if phase == "merged" and options.paper:
        model = InMergeWrapper(network, seed=options.seed)
    elif phase == "merged":
        about = {"mode": options.mode, "seed": options.seed}
        model = InMergeWrapper.recommended(network, total_steps=epochs * len(train_loader), **about)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=1e-4)
    if isinstance(model, InMergeWrapper):
        model.attach(optimizer)
    stall = ReduceLROnPlateau(optimizer, factor=0.1, patience=8)
    model, optimizer = accelerator.prepare(model, optimizer)
    trained = accelerator.unwrap_model(model)
    saved, history = {"model": trained, "optimizer": optimizer, "stall": stall}, []
    if (checkpoint := folder / "checkpoint.pt").exists():
        stored = torch.load(checkpoint, map_location=accelerator.device, weights_only=True)
        history = stored.pop("history")
        for name, state in stored.items():
            saved[name].load_state_dict(state)

    for epoch in range(len(history), epochs):
        began = time.perf_counter()
        set_seed(1000 * epoch + options.seed, device_specific=True)
        train_loader.set_epoch(epoch)
        row, title = {"lr": optimizer.param_groups[0]["lr"]}, f"{phase}, epoch {epoch + 1}"
        row["train_loss"] = train_epoch(accelerator, model, train_loader, optimizer, title)
        logits, labels = predict(accelerator, model, val_loader)
        row["val_loss"] = F.binary_cross_entropy_with_logits(logits, labels).item()
        if not math.isfinite(row["val_loss"]):
            raise SystemExit(f"{title}: the loss is {row['val_loss']}: lower --lr {options.lr:g}")
        row |= {"val_auroc": aurocs(logits, labels)["mean"], "seconds": time.perf_counter() - began}
        stall.step(row["val_loss"])
        history.append(row)
        accelerator.print(f"{title}: {row}")
        if accelerator.is_main_process:
            if row["val_loss"] == min(one["val_loss"] for one in history):
                about = {"input_size": (3, options.size, options.size), "crop_pct": 224 / 256}
                export_timm(network, folder, mean=MEAN, std=STD, label_names=nih.FINDINGS, **about)
            with replacing(checkpoint) as draft:
                states = {name: part.state_dict() for name, part in saved.items()}
                torch.save(states | {"history": history}, draft)
        accelerator.wait_for_everyone()

    network.load_state_dict(load_file(folder / "model.safetensors"))
    found = {"history": history, "test_auroc": aurocs(*predict(accelerator, model, test_loader))}
    if isinstance(trained, InMergeWrapper):
        accelerator.print(trained.plan, trained.report(), sep="\n")
        found["merging"] = trained.report().to_dict()
    accelerator.free_memory()
    return found | {"lr": optimizer.param_groups[0]["lr"]}


# -- the phases ------------------------------------------------------------------------------------


def check_run(options: Options, parts: Parts) -> dict[str, str]:
    """Returns what decides the outcome; refuses to overwrite a run or to mix two."""
    free = {"resume", "out", "workers", "cache", "data_root"}
    run = {name: str(value) for name, value in vars(options).items() if name not in free}
    run |= {f"{name} images": str(len(part)) for name, part in parts.items()}
    path = options.out / "run.json"
    if options.resume != path.exists():
        state = "holds a run: continue it with --resume" if path.exists() else "holds no run"
        raise SystemExit(f"{options.out} {state}, or choose another --out")
    before = json.loads(path.read_text()) if options.resume else run
    if different := [f"{k}={before.get(k)}, not {v}" for k, v in run.items() if before.get(k) != v]:
        raise SystemExit(f"--resume: {options.out} holds a run with {'; '.join(different)}")
    return run


def main() -> None:
    options = parser.parse_args()
    if options.paper and options.mode not in (None, "step"):
        parser.error(f"--paper merges after each step: leave out --mode {options.mode}")
    options.mode = "step" if options.paper else options.mode or "outputs"
    first, second = options.epochs
    if not second and (options.mode != "none" or options.control or not first):
        parser.error(f"--epochs {first} 0 is a first phase alone: it needs epochs and --mode none")
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=12))  # while one writes the cache
    accelerator = make_accelerator(kwargs_handlers=[patience])
    with accelerator.local_main_process_first():  # one process downloads and writes the cache
        parts = read_parts(options)
    per_process(options.batch_size, accelerator.num_processes, len(parts["train"]))
    run = check_run(options, parts)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_json(options.out / "run.json", run)

    found, start, lr = {}, options.weights, options.lr
    if options.epochs[0]:
        found["first"] = train(accelerator, parts, options, "first", start, lr)
        start, lr = str(options.out / "first"), found["first"]["lr"]
    if options.epochs[1] and (options.control or options.mode == "none"):
        found["control"] = train(accelerator, parts, options, "control", start, lr)
    if options.mode != "none":
        found["merged"] = train(accelerator, parts, options, "merged", start, lr)
    if not accelerator.is_main_process:
        return
    results = {"settings": run, **found, "environment": environment()}
    write_json(options.out / "results.json", results)
    rows = {phase: row["test_auroc"] for phase, row in found.items()}
    print_tables(not options.dataset and len(parts["test"]) == OFFICIAL_TEST_IMAGES, rows)
    print(f"Results: {options.out}/results.json; weights: {options.out}/{list(found)[-1]}/")


if __name__ == "__main__":
    with one_line_if_out_of_memory():
        main()

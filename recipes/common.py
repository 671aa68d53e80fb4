"""What the recipes share: images on the device, one training run, its metrics, results files."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import accelerate
import numpy as np
import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, get_available_trackers
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from inmerge_wrap import Fixed, InMergeWrapper, Quantile, Schedule, ZScore, __version__
from inmerge_wrap.robustness import classification_metrics
from inmerge_wrap.robustness.corruptions import corrupt

# What the test images are damaged with, at the middle severity.
CORRUPTIONS = {
    name: (3,) for name in ("gaussian_noise", "gaussian_blur", "contrast_down", "brightness_up")
}


# -- data ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Images:
    """A data set that fits into memory: uint8 pixels (N, C, H, W) and labels for each part.

    Labels are class indices (N,), or 0 and 1 of shape (N, classes) for a multi-label task.
    """

    name: str
    task: str
    classes: tuple[str, ...]
    parts: Mapping[str, tuple[Tensor, Tensor]]

    @property
    def input_size(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        return tuple(self.parts["train"][0].shape[1:])  # type: ignore[return-value]

    def statistics(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of the training pixels in [0, 1], per channel."""
        pixels = self.parts["train"][0].float() / 255
        return pixels.mean((0, 2, 3)).tolist(), pixels.std((0, 2, 3)).tolist()

    def to(self, device: torch.device) -> Images:
        """The same on a device."""
        parts = {name: (x.to(device), y.to(device)) for name, (x, y) in self.parts.items()}
        return replace(self, parts=parts)

    def first_labels(self, count: int, seed: int) -> Images:
        """The same with a random ``count`` of the training images, to study small data sets.

        Raises:
            SystemExit: If there are fewer.
        """
        images, labels = self.parts["train"]
        if not 1 <= count <= len(images):
            raise SystemExit(f"--train-images must lie in [1, {len(images)}], got {count}")
        chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:count]
        return self.trained_on(images[chosen], labels[chosen])

    def trained_on(self, images: Tensor, labels: Tensor) -> Images:
        """The same with other training images."""
        return replace(self, parts={**self.parts, "train": (images, labels)})


def load_digits(size: int = 32) -> Images:
    """The 1,797 scanned digits that scikit-learn ships, enlarged from 8 x 8 pixels."""
    from sklearn.datasets import load_digits as read

    digits = read()
    images = torch.from_numpy(digits.images).float().unsqueeze(1) / 16
    images = F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
    images, labels = (images * 255).round().byte(), torch.from_numpy(digits.target).long()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    parts = dict(zip(("train", "val", "test"), order.split([1100, 200, 497]), strict=True))
    return Images(
        "digits",
        "multiclass",
        tuple(str(name) for name in digits.target_names),
        {name: (images[index], labels[index]) for name, index in parts.items()},
    )


def load_images(name: str, root: Path, size: int) -> Images:
    """A MedMNIST data set of the given size, or ``"digits"``."""
    return load_digits(size) if name == "digits" else load_medmnist(name, root, size)


def load_medmnist(flag: str, root: Path, size: int = 28) -> Images:
    """A 2D MedMNIST data set from its npz file, downloaded if it is missing and can be.

    Raises:
        SystemExit: With one clear line, if the file is neither there nor to be had.
    """
    package = _medmnist_package()
    if flag not in package.INFO or "3d" in flag:
        flat = sorted(name for name in package.INFO if "3d" not in name)
        raise SystemExit(f"unknown data set {flag!r}; the 2D sets are {', '.join(flat)}")
    info = package.INFO[flag]
    path = root / (f"{flag}.npz" if size == 28 else f"{flag}_{size}.npz")
    if not path.exists():
        _download(package, info, path, size)
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    multilabel = info["task"].startswith("multi-label")
    parts = {}
    for part in ("train", "val", "test"):
        pixels, labels = arrays[f"{part}_images"], torch.from_numpy(arrays[f"{part}_labels"])
        images = torch.from_numpy(pixels if pixels.ndim == 4 else pixels[..., None])
        labels = labels.float() if multilabel else labels.long().flatten()
        parts[part] = (images.permute(0, 3, 1, 2).contiguous(), labels)
    names = tuple(info["label"][str(index)] for index in range(len(info["label"])))
    return Images(flag, "multilabel" if multilabel else "multiclass", names, parts)


def _medmnist_package() -> Any:
    """The package ``medmnist``, although recipes/medmnist.py stands first on a script's path."""
    here = Path(__file__).parent.resolve()
    kept, sys.path[:] = sys.path[:], [p for p in sys.path if Path(p or ".").resolve() != here]
    try:
        import medmnist
    except ImportError as error:
        raise SystemExit('medmnist is missing: pip install "inmerge-wrap[recipes]"') from error
    finally:
        sys.path[:] = kept
    return medmnist


def _download(package: Any, info: Mapping[str, Any], path: Path, size: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        data_set = getattr(package, info["python_class"])
        data_set(split="train", download=True, root=str(path.parent), size=size)
    except Exception as error:  # medmnist hides the cause of a failed download
        address = info["url" if size == 28 else f"url_{size}"]
        raise SystemExit(
            f"{path} is missing and the download failed ({error}).\n"
            f"Get it from {address} and put it there, or name its folder with --data-root."
        ) from error


# -- training --------------------------------------------------------------------------------------


def make_accelerator(**settings: Any) -> Accelerator:
    """Accelerate's set-up, which without ``cpu`` starts CPU processes that know nothing of another.

    ``torchrun --nproc_per_node 2`` on a machine without an accelerator would train two networks.
    """
    cpu = not (torch.cuda.is_available() or torch.backends.mps.is_available())
    return Accelerator(cpu=cpu, **settings)


def start(options: argparse.Namespace, project: str, **settings: Any) -> Accelerator:
    """The accelerator of a run with the arguments of ``add_run_arguments``, its tracker started."""
    if options.deterministic:
        # cuBLAS reads it once, when CUDA starts; without it deterministic kernels are refused.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    accelerator = make_accelerator(**tracking(options.tracker, options.out), **settings)
    accelerator.init_trackers(project, {key: str(value) for key, value in vars(options).items()})
    return accelerator


@contextmanager
def one_line_if_out_of_memory() -> Iterator[None]:
    """Ends a run whose memory is too small with a line that helps, instead of a traceback."""
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)):
            raise
        cause = str(error).splitlines()[0]
        raise SystemExit(f"out of memory: pass a smaller --batch-size ({cause})") from None


class Normalised:
    """uint8 pixels -> what the network is trained on: optionally augmented, then standardised."""

    def __init__(self, data: Images, device: torch.device) -> None:
        mean, std = data.statistics()
        self._mean = torch.tensor(mean, device=device).view(1, -1, 1, 1)
        self._std = torch.tensor(std, device=device).view(1, -1, 1, 1)

    def __call__(self, pixels: Tensor) -> Tensor:
        """Pixels as uint8, or as floats in [0, 1]."""
        scaled = pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels
        return (scaled - self._mean) / self._std

    def batches(self, images: Tensor, size: int = 500) -> Iterator[Tensor]:
        """All images in order, as the network takes them."""
        return (self(part) for part in images.split(size))


def augment(images: Tensor, generator: torch.Generator, *, flip: bool) -> Tensor:
    """Shifts each image by up to a fourteenth of its side, and flips half of them."""
    count, _, height, width = images.shape
    reach = max(1, height // 14)
    shifts = torch.randint(-reach, reach + 1, (2, count, 1), generator=generator).to(images.device)
    rows = (torch.arange(height, device=images.device) + shifts[0]).clamp(0, height - 1)
    columns = (torch.arange(width, device=images.device) + shifts[1]).clamp(0, width - 1)
    if flip:
        flipped = (torch.rand(count, 1, generator=generator) < 0.5).to(images.device)
        columns = torch.where(flipped, columns.flip(1), columns)
    picture = torch.arange(count, device=images.device).view(-1, 1, 1)
    return images.permute(0, 2, 3, 1)[picture, rows.unsqueeze(2), columns.unsqueeze(1)].permute(
        0, 3, 1, 2
    )


def loss_of(task: str) -> Callable[[Tensor, Tensor], Tensor]:
    """Cross-entropy, or its binary form for each finding of a multi-label task."""
    return F.binary_cross_entropy_with_logits if task == "multilabel" else F.cross_entropy


def per_process(batch_size: int, processes: int) -> int:
    """What each process takes of a batch.

    Raises:
        SystemExit: If the batch can not be divided evenly.
    """
    if batch_size < 1 or batch_size % processes:
        raise SystemExit(
            f"--batch-size {batch_size} is the size over all processes: "
            f"give a positive multiple of their number, {processes}"
        )
    return batch_size // processes


def batches(accelerator: Accelerator, count: int, batch_size: int, seed: int) -> DataLoader:
    """Shuffled indices of the training images, each batch split over the processes."""
    generator = torch.Generator().manual_seed(seed)
    loader = DataLoader(
        TensorDataset(torch.arange(count)),
        batch_size=per_process(batch_size, accelerator.num_processes),
        shuffle=True,
        drop_last=count > batch_size,  # BatchNorm can not train on a last batch of one image
        generator=generator,
    )
    return accelerator.prepare(loader)


class Waited:
    """A loader that adds up the seconds for which its batches were waited for.

    They are an upper bound of what an accelerator stood idle: it goes on with its queue meanwhile.
    """

    def __init__(self, loader: Iterable[Any]) -> None:
        self.loader, self.seconds = loader, 0.0

    def __iter__(self) -> Iterator[Any]:
        began = time.perf_counter()
        for batch in self.loader:
            self.seconds += time.perf_counter() - began
            yield batch
            began = time.perf_counter()
        self.seconds += time.perf_counter() - began


@torch.no_grad()
def predict(model: nn.Module, pixels: Tensor, normalise: Normalised, batch_size: int) -> Tensor:
    """Logits for uint8 or float pixels, shape (N, classes), in eval mode, on the CPU."""
    was_training = model.training
    model.eval()
    outputs = [model(part).float().cpu() for part in normalise.batches(pixels, batch_size)]
    model.train(was_training)
    return torch.cat(outputs)


def metrics(logits: Tensor, labels: Tensor, task: str) -> dict[str, float]:
    """Accuracy, balanced error, AUROC, calibration and more; what is undefined is absent."""
    probabilities = logits.sigmoid() if task == "multilabel" else logits.softmax(1)
    values, _ = classification_metrics(probabilities, labels.cpu(), task=task)
    return {name: float(value) for name, value in values.items()}


def evaluate(
    model: nn.Module,
    data: Images,
    normalise: Normalised,
    *,
    corruptions: Mapping[str, tuple[int, ...]],
    batch_size: int = 500,
) -> dict[str, dict[str, float]]:
    """Metrics of the test part, clean and under each ``corruption/severity``.

    Every model sees the same damaged images: the draws depend on the image's index alone.
    """
    pixels, labels = data.parts["test"]
    rows = {"clean": metrics(predict(model, pixels, normalise, batch_size), labels, data.task)}
    for name, severities in corruptions.items():
        for severity in severities:
            damaged = [
                corrupt(part.float() / 255, name, severity, indices=index.tolist())
                for part, index in zip(
                    pixels.split(batch_size),
                    torch.arange(len(pixels)).split(batch_size),
                    strict=True,
                )
            ]
            logits = predict(model, torch.cat(damaged), normalise, batch_size)
            rows[f"{name}/{severity}"] = metrics(logits, labels, data.task)
    return rows


# -- tracking --------------------------------------------------------------------------------------


class JsonLines(GeneralTracker):
    """One JSON line for each ``Accelerator.log``, in a file that takes no package to read."""

    name, requires_logging_directory = "jsonl", False

    def __init__(self, path: Path) -> None:
        self.tracker = path
        super().__init__()  # which looks for the attributes

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        """Appends, so that a resumed run continues its file."""
        self.tracker.parent.mkdir(parents=True, exist_ok=True)
        with open(self.tracker, "a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")


def tracking(name: str | None, folder: Path) -> dict[str, Any]:
    """The arguments of Accelerator for a tracker that writes into ``folder``.

    Raises:
        SystemExit: If its package is missing, where Accelerate would quietly track nothing.
    """
    if name is None:
        return {}
    if name == "jsonl":
        return {"log_with": JsonLines(folder / "log.jsonl")}
    if name not in map(str, get_available_trackers()):
        raise SystemExit(f"--tracker {name}: the package {name} is missing: pip install {name}")
    return {"log_with": name, "project_dir": folder}


def merged_share(model: nn.Module) -> dict[str, float]:
    """For a tracker: share of the drawn pairs that merged so far; empty without merging.

    Waits for the device, so it is for the end of an epoch, not for every step.
    """
    if not isinstance(model, InMergeWrapper):
        return {}
    report = model.report()
    return {"merged_share": report.merged / report.drawn if report.drawn else 0.0}


# -- results ---------------------------------------------------------------------------------------


def environment() -> dict[str, Any]:
    """What a reader needs to judge a figure: the command, the versions, the machine."""
    return {
        "command": shlex.join(["python", *sys.argv]),
        "versions": {
            "inmerge_wrap": __version__,
            "torch": torch.__version__,
            "timm": timm.__version__,
            "accelerate": accelerate.__version__,
            "python": platform.python_version(),
        },
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "cpu_cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def spread(values: Sequence[float]) -> str:
    """Mean and, of several values, standard deviation."""
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def difference_text(paired: Mapping[str, float]) -> str:
    """What ``paired_difference`` found: the mean and, of several pairs, its 95% interval."""
    text = f"{paired['mean']:+.3f}"
    return text + (f" ({paired['low']:+.3f} to {paired['high']:+.3f})" if "low" in paired else "")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a results file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, draft = tempfile.mkstemp(dir=path.parent, prefix=".draft-")
    with os.fdopen(handle, "w") as file:
        json.dump(content, file, indent=1)
    os.chmod(draft, 0o644)  # temporary files are for their owner alone
    os.replace(draft, path)


# -- the command line ------------------------------------------------------------------------------


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """What ``start`` reads, beside ``--out``."""
    parser.add_argument(
        "--tracker",
        choices=["tensorboard", "wandb", "trackio", "jsonl"],
        help="where each epoch's figures go; jsonl, a file in --out, takes no package "
        "(default: nowhere)",
    )
    parser.add_argument(
        "--deterministic",
        action="store_true",
        help="the same bits each time on the same machine, by slower kernels where there are some",
    )


# -- merging on the command line -------------------------------------------------------------------

MERGING = {  # argument -> what holds where it is left out
    "merge_weight": 0.8,
    "merge_probability": 0.3,
    "similarity_threshold": ZScore(2.0),
    "shallow_layers": 0.625,
    "decay": "cosine",
}
PAPER = {**MERGING, "similarity_threshold": 0.3, "decay": "constant"}


def add_merging_arguments(parser: argparse.ArgumentParser, *, optional: bool = True) -> None:
    """The settings of merging, each with its symbol in the paper (arXiv 2502.20516).

    They are None until ``parse_run`` fills them in, which so can tell what was given. A recipe
    that always merges is not ``optional``: it offers no ``--no-merge``.
    """
    group = parser.add_argument_group("in-model merging (symbols of arXiv 2502.20516)")
    if optional:
        group.add_argument("--no-merge", action="store_true", help="train plainly, without merging")
    group.add_argument(
        "--paper",
        action="store_true",
        help="the paper's settings: alpha .8, p .3, fixed tau .3, merging in every step to the end",
    )
    group.add_argument(
        "--merge-weight",
        type=float,
        help="alpha: share of a kernel that stays, 0 to 1 (default: 0.8)",
    )
    group.add_argument(
        "--merge-probability",
        type=float,
        help="p: chance of a kernel to be drawn in a step (default: 0.3)",
    )
    group.add_argument(
        "--similarity-threshold",
        type=threshold,
        metavar="TAU",
        help="tau: cosine above which a pair merges, -1 to 1; or z=2, so many standard deviations "
        "above chance; or top=0.5, that share of the drawn pairs of each layer (default: z=2)",
    )
    group.add_argument(
        "--shallow-layers",
        type=layers_or_share,
        metavar="L_S",
        help="L_s: first convolutions left alone, a count such as 10 or a share of "
        "the depth such as 0.625 (default: 0.625)",
    )
    group.add_argument(
        "--decay",
        choices=["constant", "linear", "cosine"],
        help="course of p over training (default: cosine)",
    )


def parse_run(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parses the command line of a recipe that merges, and fills in the settings of merging.

    They are those in force, for the results file: the defaults, the paper's, or None without
    merging. Arguments that ``--paper`` or ``--no-merge`` would ignore are refused.
    """
    options = parser.parse_args()
    merges = not getattr(options, "no_merge", False)
    given = [name for name in MERGING if getattr(options, name) is not None]
    ignored: list[str] = []
    if not merges:
        ignored = given + ["paper"] * options.paper
    elif options.paper:
        ignored = [name for name in given if name != "shallow_layers"]
    if ignored:
        names = ", ".join("--" + name.replace("_", "-") for name in ignored)
        switch = "--paper" if merges else "--no-merge"
        parser.error(f"{switch} would ignore {names}: leave out the one or the other")
    if merges:
        defaults = PAPER if options.paper else MERGING
        vars(options).update({k: v for k, v in defaults.items() if k not in given})
    return options


def threshold(text: str) -> float | ZScore | Quantile:
    """``"0.3"`` -> the paper's fixed cosine, ``"z=2"`` and ``"top=0.5"`` -> what adapts to a layer.

    Raises:
        argparse.ArgumentTypeError: If it is none of these, or out of range.
    """
    kind, given, number = text.rpartition("=")
    rules: dict[str, Callable[[float], Any]] = {"": Fixed, "z": ZScore, "top": Quantile}
    try:
        rule = rules[kind if given else ""](float(number))
    except (KeyError, ValueError) as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no threshold: give a cosine such as 0.3, z=2 or top=0.5 ({error})"
        ) from error
    return rule.tau if isinstance(rule, Fixed) else rule


def layers_or_share(text: str) -> int | float:
    """``"10"`` -> 10 layers, ``"0.5"`` -> half of the depth."""
    return int(text) if text.isdigit() else float(text)


def merging_settings(
    options: argparse.Namespace, total_steps: int, start: int = 0
) -> dict[str, Any]:
    """The arguments of InMergeWrapper that the command line asks for, merging from ``start`` on."""
    end = None if options.decay == "constant" else total_steps
    return {
        "merge_weight": options.merge_weight,
        "merge_probability": options.merge_probability,
        "similarity_threshold": options.similarity_threshold,
        "shallow_layers": options.shallow_layers,
        "schedule": Schedule(start=start, end=end, decay=options.decay),
    }

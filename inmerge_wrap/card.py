"""Model cards: the README.md of an exported model, and its upload to the Hugging Face Hub."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from inmerge_wrap.errors import ArgumentError, check_choice
from inmerge_wrap.markdown import one_line, template
from inmerge_wrap.report import MergeReport
from inmerge_wrap.unwrapping import find_wrapper

if TYPE_CHECKING:
    from inmerge_wrap.robustness import RobustnessResult

__all__ = ["PLACE", "CardResult", "ModelCard", "merging_settings", "push_to_hub", "results_of"]

PLACE = "local-dir:path/to/this/folder"
"""Where the code of a card loads the model from; ``push_to_hub`` puts the repository there."""
_NEEDED = ("README.md", "config.json", "model.safetensors")
_PICTURES = tuple(f"robustness.{kind}" for kind in ("png", "jpg", "jpeg", "svg"))

_INTENDED_USE = """\
Research on the classification of medical images and on its robustness. It is not a medical device
and must not be used for decisions about patients."""
UNEXAMINED = (
    "Differences in performance between groups of patients were not examined, unless stated above."
)
_LIMITS = (
    "It was evaluated only on the data named under Results. On images from another scanner, "
    "hospital, population or preprocessing it may be wrong more often, with no lower confidence.",
    "Its outputs are scores. Check on data from the site of use whether they are calibrated "
    "probabilities.",
    "It returns scores for every image, even one that shows none of its classes or no patient.",
    UNEXAMINED,
)
_IN_WORDS = "in words"  # the entry of the settings that is a sentence, not a row of the table
_TASKS = ("multiclass", "multilabel", "binary")
_DECIDED = ("accuracy", "balanced_error")  # metrics that depend on a threshold
_SYMBOLS = {
    "merge_weight": " (alpha)",
    "similarity_threshold": " (tau)",
    "merge_probability": " (p)",
}
_SETTINGS = (
    *_SYMBOLS, "schedule", "partner", "direction", "radius", "mode", "keep_norm", "merge_momentum",
)  # fmt: skip
_METRIC_NAMES = {
    "accuracy": "Accuracy",
    "auroc": "AUROC",
    "balanced_error": "Balanced error",
    "ece": "Expected calibration error",
}


@dataclass(frozen=True)
class CardResult:
    """One measured figure.

    Attributes:
        metric: Its short name, as in ``accuracy`` or ``auroc``.
        value: The figure, in the metric's own unit (an accuracy in [0, 1]).
        dataset: Display name of the data.
        dataset_id: Its id on the Hub, or another short id; derived from ``dataset`` if None.
        config: A variant of the data, such as ``corrupted``.
        split: The part of the data. Published figures often use different splits of one data set.
        interval: Ends of the 95% interval.
        note: What else a reader must know, such as "mean of 5 seeds".
    """

    metric: str
    value: float
    dataset: str
    dataset_id: str | None = None
    config: str | None = None
    split: str = "test"
    interval: tuple[float, float] | None = None
    note: str = ""

    def __post_init__(self) -> None:
        if isinstance(self.value, str):
            raise ValueError(f"value of a result must be a number, got {self.value!r}")

    @property
    def metric_name(self) -> str:
        """Display name of the metric."""
        return _METRIC_NAMES.get(self.metric, self.metric)

    @property
    def shown_dataset(self) -> str:
        """Display name of the data, with its variant."""
        return self.dataset if self.config is None else f"{self.dataset} ({self.config})"


def results_of(
    result: RobustnessResult,
    *,
    dataset: str,
    dataset_id: str | None = None,
    split: str = "test",
    metrics: str | Sequence[str] = ("accuracy", "auroc", "balanced_error"),
) -> list[CardResult]:
    """Converts the results of a robustness evaluation to the results of a card.

    Args:
        result: The result of :func:`inmerge_wrap.robustness.evaluate_robustness`.
        dataset: Name of the data.
        dataset_id: See :class:`CardResult`.
        split: The part of the data that was evaluated.
        metrics: Metrics to include; undefined values are left out.

    Returns:
        The clean figures, then their means over all corruptions and severities.
    """
    metrics = (metrics,) if isinstance(metrics, str) else metrics
    settings = result.settings
    severities = settings["severities"]
    corrupted = (
        f"mean of {len(settings['corruptions'])} corruptions at "
        f"{'severity' if len(severities) == 1 else 'severities'} {_numbers(severities)}"
    )
    at_threshold = "" if settings["task"] == "multiclass" else _at(settings["threshold"])
    found = []
    for condition, config in (("clean", None), ("all", "corrupted")):
        row = result.row(condition)
        for metric in (metric for metric in metrics if metric in row):
            ends: Any = row.get(f"{metric}_low"), row.get(f"{metric}_high")
            notes = [corrupted if config else "", at_threshold if metric in _DECIDED else ""]
            found.append(
                CardResult(
                    metric=metric,
                    value=row[metric],
                    dataset=dataset,
                    dataset_id=dataset_id,
                    config=config,
                    split=split,
                    interval=None if None in ends else ends,
                    note="; ".join(filter(None, notes)),
                )
            )
    return found


def _at(threshold: float | Sequence[float]) -> str:
    values = {threshold} if isinstance(threshold, int | float) else set(threshold)
    return f"at threshold {values.pop():.4g}" if len(values) == 1 else "at each class's threshold"


@dataclass(frozen=True)
class ModelCard:
    """The facts that users of a model need; :func:`inmerge_wrap.export_timm` writes them.

    Attributes:
        title: Name of the model.
        license: Licence of the weights, as the Hub spells it: ``apache-2.0``,
            ``cc-by-nc-4.0``, ``other``. The licence of the training data may limit your choice.
        training_data: Source, size, split, exclusions and licence of the training data.
        description: What the model does, in one paragraph.
        license_name: Name of the licence if ``license`` is ``other``.
        license_link: Its address.
        datasets: Ids of the training data on the Hub, for its search.
        base_model: Id on the Hub of the model whose weights training started from.
        training: How it was trained: optimizer, epochs, augmentation, hardware.
        task: ``"multiclass"``, ``"multilabel"``, or ``"binary"`` for a single output.
        thresholds: Probabilities above which a class counts as found, one for each class or one
            for all; 0.5 if empty. Not for ``"multiclass"``.
        code: Python code that reads an image as the training did and computes ``scores``; timm's
            transform of an 8-bit image if empty. It loads the model from
            :data:`PLACE`, which :func:`push_to_hub` replaces.
        intended_use: What it is for.
        limits: What it cannot do.
        results: What was measured.
        tags: Further tags for the Hub's search, besides those that every card gets.
        robustness_picture: An image file or a matplotlib figure, shown under the results.
        merging: The settings of in-model merging, by name; those of the InMergeWrapper that is
            exported if None.
        merged: Whether the training used merging; taken from the wrapper's report if None. If
            neither says so and ``merging`` is not given, the card does not mention merging.
        citation: BibTeX of your own work.
    """

    title: str
    license: str
    training_data: str
    description: str = ""
    license_name: str | None = None
    license_link: str | None = None
    datasets: Sequence[str] = ()
    base_model: str | None = None
    training: str = ""
    task: str = "multiclass"
    thresholds: Sequence[float] = ()
    code: str = ""
    intended_use: str = _INTENDED_USE
    limits: Sequence[str] = _LIMITS
    results: Sequence[CardResult] = ()
    tags: Sequence[str] = ()
    robustness_picture: Any = None
    merging: Mapping[str, Any] | None = None
    merged: bool | None = None
    citation: str = ""

    def __post_init__(self) -> None:
        for name in ("title", "training_data"):
            if not getattr(self, name).strip():
                raise ValueError(f"{name} of the card is empty; users of the model need it")
        if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", self.license):
            raise ArgumentError(
                f"license {self.license!r} is not an identifier of the Hub; use for example "
                "apache-2.0, mit, cc-by-4.0, cc-by-nc-4.0, or other with <license_name>"
            )
        if self.license == "other" and not self.license_name:
            raise ArgumentError("<license=other> needs <license_name>")
        if self.license_link and not re.fullmatch(r"(https?://)?[^\s()<>:]+", self.license_link):
            raise ValueError(
                f"license_link {self.license_link!r} is neither a web address nor a file name"
            )
        check_choice("task", self.task, _TASKS)
        if self.thresholds and self.task == "multiclass":
            raise ValueError("thresholds have no effect with task 'multiclass': leave them out")
        for value in self.thresholds:
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"thresholds are probabilities in [0, 1], got {value}")
        if self.code and PLACE not in self.code:
            raise ValueError(f"code of the card must load the model from {PLACE!r}")
        for name in ("datasets", "limits", "tags"):
            if isinstance(getattr(self, name), str):
                raise ValueError(f"{name} of the card must be a list, got one string")

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> ModelCard:
        """Builds a card from plain data such as JSON; results are dicts of CardResult's fields.

        Raises:
            ValueError: If a field is unknown, missing or malformed.
        """
        fields = dict(content)
        try:
            fields["results"] = [
                entry if isinstance(entry, CardResult) else CardResult(**entry)
                for entry in fields.get("results", ())
            ]
            return cls(**fields)
        except (AttributeError, TypeError) as error:  # as of a number where text is needed
            known = ", ".join(entry.name for entry in dataclasses.fields(cls))
            raise ValueError(f"the card does not fit ({error}); its fields are {known}") from error

    def with_report(
        self, report: MergeReport, settings: Mapping[str, Any] | None = None
    ) -> ModelCard:
        """Returns the card with a report's account of merging; unchanged if the report has none.

        Args:
            report: Report of the training run, from a wrapper or a checkpoint.
            settings: The table of the card, if it has none of its own; the counts of the report
                if None.
        """
        if not report.step and report.idle is None:  # a copy, as an average of weights is
            return self
        return dataclasses.replace(
            self,
            merging=self.merging or settings or _outcome(report),
            merged=report.had_effect if self.merged is None else self.merged,
        )

    def render(
        self,
        *,
        architecture: str,
        data_config: Mapping[str, Any],
        label_names: Sequence[str] | None = None,
        picture: str | None = None,
        several_outputs: bool = False,
    ) -> str:
        """Renders the card as Markdown with the Hub's metadata on top.

        Args:
            architecture: timm's name of the architecture.
            data_config: ``input_size``, ``mean`` and ``std`` of the images.
            label_names: Names of the classes.
            picture: Name of the image file next to the card.
            several_outputs: Whether the network returns other tensors after its class scores.

        Raises:
            ValueError: If there are more or fewer thresholds than classes.
        """
        thresholds = list(self.thresholds) or [0.5]
        if label_names and len(thresholds) == 1:
            thresholds *= len(label_names)
        if label_names and len(thresholds) != len(label_names):
            raise ValueError(
                f"the card has {len(thresholds)} thresholds for {len(label_names)} classes"
            )
        return f"---\n{self._metadata()}\n---\n\n" + template("card.md.jinja").render(
            card=self,
            architecture=architecture,
            channels=data_config["input_size"][0],
            size=" x ".join(map(str, data_config["input_size"])),
            mean=_numbers(data_config["mean"]),
            std=_numbers(data_config["std"]),
            labels=list(label_names or ()),
            thresholds=[f"{value:.4g}" for value in thresholds],
            picture=picture,
            several_outputs=several_outputs,
            claims_merging=self._claims_merging,
            place=PLACE,
        )

    def write(self, directory: Path, *, model: nn.Module, **facts: Any) -> None:
        """Writes README.md and the image to a folder.

        Args:
            directory: The folder.
            model: The network that is exported; a wrapper tells how it was merged.
            facts: As for :meth:`render`, without the picture.

        Raises:
            ValueError: If the robustness picture is not an image file.
        """
        wrapper: Any = find_wrapper(model)
        card = self
        if wrapper is not None:
            card = self.with_report(wrapper.report(), merging_settings(model))
        picture = self._write_picture(directory)
        text = card.render(picture=picture, **facts)
        (directory / "README.md").write_text(text, encoding="utf-8")

    @property
    def _claims_merging(self) -> bool:
        return bool(self.merging) if self.merged is None else self.merged

    def _metadata(self) -> str:
        from huggingface_hub import EvalResult, ModelCardData

        results = [
            EvalResult(
                task_type="image-classification",
                dataset_type=entry.dataset_id or _slug(entry.dataset),
                dataset_name=one_line(entry.dataset),
                dataset_config=entry.config,
                dataset_split=entry.split,
                metric_type=entry.metric,
                metric_name=entry.metric_name,
                metric_value=round(entry.value, 6),
            )
            for entry in self.results
        ]
        own = ["in-model-merging"] if self._claims_merging else []
        own += ["multi-label"] if self.task == "multilabel" else []
        tags = ["image-classification", "timm", "medical", *own, *self.tags]
        data = ModelCardData(
            license=self.license,
            license_name=self.license_name,
            license_link=self.license_link,
            library_name="timm",
            pipeline_tag="image-classification",
            base_model=self.base_model,
            datasets=list(self.datasets) or None,
            tags=list(dict.fromkeys(tags)),
            model_name=one_line(self.title) if results else None,
            eval_results=results or None,
        )
        return data.to_yaml()

    def _write_picture(self, directory: Path) -> str | None:
        picture = self.robustness_picture
        if picture is None:
            return None
        if hasattr(picture, "savefig"):
            picture.savefig(directory / _PICTURES[0])
            return _PICTURES[0]
        source = Path(picture)
        name = f"robustness{source.suffix.lower()}"
        if name not in _PICTURES or not source.is_file():
            raise ValueError(f"robustness_picture is not a PNG, JPEG or SVG file: {source}")
        shutil.copyfile(source, directory / name)
        return name


def merging_settings(model: nn.Module) -> dict[str, Any]:
    """Returns settings and outcome of in-model merging, by name; empty without a wrapper.

    Args:
        model: A wrapper, alone or inside DDP or torch.compile, or any other network.
    """
    wrapper: Any = find_wrapper(model)
    if wrapper is None:
        return {}
    plan, names = wrapper.plan, [site.name for site in wrapper.plan.merged]
    return {
        _IN_WORDS: wrapper.settings.in_words,
        **{f"{name}{_SYMBOLS.get(name, '')}": getattr(wrapper, name) for name in _SETTINGS},
        "merged layers": f"{len(names)} of {len(names) + len(plan.skipped)}: {', '.join(names)}",
        "seed": wrapper.seed,
        **_outcome(wrapper.report()),
    }


def _outcome(report: MergeReport) -> dict[str, Any]:
    share = f" ({report.share:.2%})" if report.drawn else ""
    return {
        "optimizer steps": report.step,
        "merged pairs": f"{report.merged:,} of {report.drawn:,} {report.unit}{share}"
        + ("" if report.had_effect else "; a plain training run"),
    }


def push_to_hub(
    directory: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool = False,
    token: str | None = None,
    message: str = "Add model",
) -> str:
    """Uploads a folder that ``export_timm(..., card=...)`` wrote to the Hugging Face Hub.

    The code in the card then names the repository. Only files that the export wrote are uploaded.

    Args:
        directory: The folder.
        repo_id: ``"user/name"``; created if it does not exist.
        private: Whether a new repository is private.
        token: Token for the Hub; the one that ``hf auth login`` stored if None.
        message: Commit message.

    Returns:
        The line of code that loads the model from the Hub.

    Raises:
        ValueError: If the folder is not a complete export with a card, or the name is malformed.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    source = Path(directory)
    missing = [name for name in _NEEDED if not (source / name).is_file()]
    if missing:
        raise ValueError(
            f"{source} has no {', '.join(missing)}: write the folder with "
            "export_timm(model, directory, card=ModelCard(...), ...)"
        )
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id):
        raise ValueError(f"repo_id must be 'user/name', got {repo_id!r}")
    names = [name for name in (*_NEEDED, *_PICTURES) if (source / name).is_file()]
    contents: dict[str, Path | bytes] = {name: source / name for name in names}
    card = (source / "README.md").read_text(encoding="utf-8")
    contents["README.md"] = card.replace(PLACE, f"hf-hub:{repo_id}").encode()
    operations = [CommitOperationAdd(name, content) for name, content in contents.items()]
    api = HfApi(token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    api.create_commit(repo_id, operations, commit_message=message)
    return loading_line(f"hf-hub:{repo_id}")


def loading_line(place: str) -> str:
    """Returns the line of Python that loads a network from a folder or the Hub with plain timm."""
    return f'timm.create_model("{place}", pretrained=True)'


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-") or "unknown"

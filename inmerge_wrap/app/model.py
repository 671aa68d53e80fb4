"""A trained network with all that it needs: the folder that a training wrote."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from inmerge_wrap.architectures import is_timm_folder
from inmerge_wrap.card import ModelCard, loading_line
from inmerge_wrap.checkpoints import load_network
from inmerge_wrap.errors import ArgumentError
from inmerge_wrap.export import export_timm
from inmerge_wrap.files import replacing_files
from inmerge_wrap.images.files import decode, facts_of, failure
from inmerge_wrap.images.looks import Look, look_at
from inmerge_wrap.images.preparation import Preparation, Recipe
from inmerge_wrap.images.sets import Mapped

Progress = Callable[[int], None]  # called with the number of images after each batch


def silent(count: int) -> None:
    """The progress that nobody watches."""


class Tempered(nn.Module):
    """A network whose outputs are divided by a temperature."""

    def __init__(self, network: nn.Module, temperature: float) -> None:
        super().__init__()
        self.network, self.temperature = network, temperature

    def forward(self, images: Tensor) -> Tensor:
        """Returns the outputs (N, classes)."""
        return self.network(images) / self.temperature


class Normalise:
    """Turns uint8 pixels (N, C, H, W), or floats in [0, 1], into network input."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device) -> None:
        self.mean = torch.tensor(mean, device=device).view(-1, 1, 1)
        self.std = torch.tensor(std, device=device).view(-1, 1, 1)

    def __call__(self, pixels: Tensor) -> Tensor:
        pixels = pixels.to(self.mean.device)
        scaled = pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels
        return (scaled - self.mean) / self.std


@dataclass(frozen=True)
class TrainedModel:
    """A network in eval mode, from normalised images to scores (N, classes), and its recipe."""

    network: nn.Module
    recipe: Recipe

    @classmethod
    def read(cls, folder: Path, device: str = "cpu") -> TrainedModel:
        """Reads the folder ``model/`` of a training."""
        recipe = Recipe.read(folder)
        if not is_timm_folder(folder):
            raise ValueError(
                f"{folder} lacks config.json or model.safetensors: copy all of the folder model/ "
                "that a training wrote"
            )
        network: nn.Module = load_network(folder)[0].eval().to(device)
        if getattr(network, "num_classes", len(recipe.classes)) != len(recipe.classes):
            raise ValueError(
                f"{folder} has {len(recipe.classes)} classes in preparation.json and "
                f"{network.num_classes} outputs: they are of different trainings"
            )
        return cls(network, recipe)

    def write(self, folder: Path, card: ModelCard | str) -> str:
        """Writes the folder that `read` reads, with a card or the text of one.

        Returns the line that loads the network with plain timm.
        """
        preparation = self.recipe.preparation
        with replacing_files(folder) as draft:  # no weights without their preparation
            export_timm(
                self.network,
                draft,
                input_size=(preparation.channels, preparation.size, preparation.size),
                mean=self.recipe.mean,
                std=self.recipe.std,
                crop_mode=preparation.crop_mode,
                label_names=self.recipe.classes,
                card=card if isinstance(card, ModelCard) else None,
            )
            if isinstance(card, str):
                (draft / "README.md").write_text(card, encoding="utf-8")
            self.recipe.write(draft)
        return loading_line(f"local-dir:{folder}")

    def normalised(self, pixels: Tensor) -> Tensor:
        """Pixels uint8 (N, C, S, S) as input of the network, on its device."""
        device = next(self.network.parameters()).device
        return Normalise(self.recipe.mean, self.recipe.std, device)(pixels)

    def scores(self, pixels: Tensor) -> Tensor:
        """The network's outputs (N, classes) for pixels uint8 (N, C, S, S), on the CPU."""
        with torch.no_grad():
            found = self.network(self.normalised(pixels)).float().cpu()
        if not found.isfinite().all():  # of which the first class would be taken for the answer
            raise ValueError(
                "the network's outputs are not finite (NaN or infinite): its weights are damaged, "
                "copy the folder again"
            )
        return found


@dataclass(frozen=True)
class Read:
    """One file: its name, and what it is like, or why it cannot be read."""

    name: str
    look: Look | None = None
    error: str | None = None


def _read(preparation: Preparation, file: tuple[str, Path]) -> tuple[Read, Tensor | None]:
    name, path = file
    try:
        decoded = decode(path)
        pixels = preparation.pixels_of(decoded)
        return Read(name, look_at(facts_of(decoded), pixels)), pixels
    except Exception as error:  # readers raise all sorts of things on files that are not sound
        return Read(name, error=failure(error, path)), None


def _stacked(batch: list[tuple[Read, Tensor | None]]) -> tuple[list[Read], Tensor]:
    """One tensor of all pixels: each tensor from another process holds a file descriptor."""
    pixels = [each for _, each in batch if each is not None]
    return [read for read, _ in batch], torch.stack(pixels) if pixels else torch.empty(0)


def read_files(
    files: Sequence[tuple[str, Path]],
    preparation: Preparation,
    *,
    batch_size: int = 64,
    workers: int = 0,
    progress: Progress = silent,
) -> Iterator[tuple[list[Read], Tensor]]:
    """Reads files, given by name and path, in batches and in their order, as in training.

    Yields what is known of each file, and the pixels uint8 (n, C, S, S) of those that can be read.
    """
    if not files:
        raise ArgumentError("there is no image to read")
    reading = Mapped(partial(_read, preparation), files)
    for batch, pixels in DataLoader(reading, batch_size, num_workers=workers, collate_fn=_stacked):
        yield batch, pixels
        progress(len(batch))

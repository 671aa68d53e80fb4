"""What merging did, as plain numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["LayerReport", "LayerSnapshot", "MergeReport"]

_NEGLIGIBLE = 1e-3  # share of merged pairs below which a run counts as a plain training run


@dataclass(frozen=True)
class LayerReport:
    """What merging did to one convolution.

    Attributes:
        name: The convolution.
        steps: Steps of the optimizer that trains the layer.
        passes: Steps in which its pairs were drawn; in the forward pass, of any attached optimizer.
        drawn: Pairs drawn in all passes; on the outputs, images x channels of all forward passes.
        merged: Of these, the pairs that passed the threshold and were blended.
        undefined: Of these, the pairs without a cosine: a kernel was zero or held NaN or Inf.
        compared: Of these, the pairs with a cosine. Without a threshold (tau = -1) nothing is
            compared on the outputs.
        mean_cosine: Mean over the compared pairs; None before the first.
        max_cosine: The largest cosine drawn; None before the first.
    """

    name: str
    steps: int
    passes: int
    drawn: int
    merged: int
    undefined: int
    compared: int
    mean_cosine: float | None
    max_cosine: float | None

    @property
    def share(self) -> float:
        """Returns merged pairs over drawn pairs, 0 where none was drawn."""
        return self.merged / self.drawn if self.drawn else 0.0

    def since(self, earlier: LayerReport | None) -> LayerReport:
        """Returns what was counted after an earlier report of the layer; without one, everything.

        The largest cosine of that part is not known, so it is None.
        """
        if earlier is None:
            return self
        compared = self.compared - earlier.compared
        before, now = ((each.mean_cosine or 0.0) * each.compared for each in (earlier, self))
        return LayerReport(
            name=self.name,
            steps=self.steps - earlier.steps,
            passes=self.passes - earlier.passes,
            drawn=self.drawn - earlier.drawn,
            merged=self.merged - earlier.merged,
            undefined=self.undefined - earlier.undefined,
            compared=compared,
            mean_cosine=(now - before) / compared if compared else None,
            max_cosine=None,
        )


@dataclass(frozen=True)
class LayerSnapshot:
    """The state of one convolution at one step, and what merging did since the last snapshot.

    Attributes:
        name: The convolution.
        step: Optimizer steps seen.
        share: Merged over drawn pairs since the last snapshot, 0 where none was drawn.
        mean_cosine: Mean over the pairs drawn since then; None if none has a cosine.
        effective_rank: Of all its kernels, see :func:`inmerge_wrap.similarity.effective_rank`.
    """

    name: str
    step: int
    share: float
    mean_cosine: float | None
    effective_rank: float


@dataclass(frozen=True)
class MergeReport:
    """What merging did to each layer; print it to see a table.

    Attributes:
        layers: One report per layer, in the order of the plan.
        ended: The step at which the schedule ended merging, if training went on after it.
        idle: Why no step was seen although training ran; None otherwise.
        unit: What is counted: ``"drawn pairs"`` of kernels, or on the outputs
            ``"images x channels"``.
    """

    layers: tuple[LayerReport, ...]
    ended: int | None = None
    idle: str | None = None
    unit: str = "drawn pairs"

    def __iter__(self) -> Iterator[LayerReport]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, name: str) -> LayerReport:
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(name)

    @property
    def step(self) -> int:
        """Optimizer steps seen; with several optimizers, those of the one with most."""
        return max((layer.steps for layer in self.layers), default=0)

    @property
    def had_effect(self) -> bool:
        """Whether merging had an effect: at least a thousandth of the pairs merged."""
        return self.share >= _NEGLIGIBLE

    @property
    def drawn(self) -> int:
        """Pairs drawn in all layers."""
        return sum(layer.drawn for layer in self.layers)

    @property
    def merged(self) -> int:
        """Pairs merged in all layers."""
        return sum(layer.merged for layer in self.layers)

    @property
    def share(self) -> float:
        """Merged pairs over drawn pairs in all layers, 0 where none was drawn."""
        return self.merged / self.drawn if self.drawn else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Returns plain numbers, for a JSON file or a tracker."""
        return {layer.name: {**asdict(layer), "share": layer.share} for layer in self.layers}

    def __str__(self) -> str:
        def number(value: float | None) -> str:
            return "-" if value is None else f"{value:.3f}"

        width = max([len("convolution"), *(len(layer.name) for layer in self.layers)])
        lines = [
            f"{'convolution':<{width}}  {'steps':>7}  {'drawn':>10}  {'merged':>10}  "
            f"{'share':>7}  {'mean cos':>8}  {'max cos':>7}"
        ]
        for layer in self.layers:
            broken = f"  pairs without a cosine: {layer.undefined:,}" if layer.undefined else ""
            lines.append(
                f"{layer.name:<{width}}  {layer.steps:>7,}  {layer.drawn:>10,}  "
                f"{layer.merged:>10,}  {layer.share:>7.2%}  {number(layer.mean_cosine):>8}  "
                f"{number(layer.max_cosine):>7}{broken}"
            )
        lines.append(
            f"{self.merged:,} of {self.drawn:,} {self.unit} were merged ({self.share:.2%})."
        )
        if self.ended is not None:
            lines.append(
                f"Merging ended at step {self.ended:,}, as its schedule says; training has run to "
                f"step {self.step:,}."
            )
        if self.idle is not None:
            lines.append(f"Never merged: {self.idle}.")
        return "\n".join(lines)

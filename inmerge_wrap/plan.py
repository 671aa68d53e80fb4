"""Which convolutions are merged, and why the others are not: plain values, found by discovery."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["ConvSite", "MergePlan"]


@dataclass(frozen=True)
class ConvSite:
    """One convolution of a network and what merging does with it.

    Attributes:
        name: Its name in ``model.named_modules()``.
        depth: Its position in the order of execution among all convolutions, from 1; None if it
            never ran.
        shape: Shape of its kernels, (C_out, C_in / groups, *kernel size), one per output channel.
            It is the shape of the weight, except for transposed convolutions, which store
            (C_in, C_out / groups, *kernel size).
        groups: The convolution's groups.
        kind: ``"kernels"``, or a key of :data:`SKIPPED_KINDS`.
        centred: Whether kernels are compared without their mean, because the forward pass
            standardises them (StdConv2d, ScaledStdConv2d). Their gain is a scale of the output
            channel, like BatchNorm's, and takes no part in the comparison.
        reason: Why it is skipped; None if it is merged.
        reason_kind: The reason as an identifier: the ``kind`` if that is the reason; ``"shallow"``,
            ``"excluded"``, ``"not_included"``; ``"unwritable"`` (a weight that is computed,
            quantised or complex, or has no shape yet), ``"shared"`` (with an earlier layer),
            ``"functional"`` (used without calling the module), ``"composite"`` (on the outputs: the
            module computes more after its convolution), ``"one_kernel"`` (alone, or in its group).
    """

    name: str
    depth: int | None
    shape: tuple[int, ...]
    groups: int = 1
    kind: str = "kernels"
    centred: bool = False
    reason: str | None = None
    reason_kind: str | None = None

    @property
    def pair_groups(self) -> int:
        """The groups inside which kernels are paired; a depthwise layer pairs across groups."""
        depthwise = self.shape[:1] == (self.groups,) and self.shape[1] == 1
        return 1 if depthwise else self.groups

    @property
    def fan_in(self) -> int:
        """Entries of one kernel."""
        return math.prod(self.shape[1:])


@dataclass(frozen=True)
class MergePlan:
    """Which convolutions are merged and why the others are not; print it to see a table.

    Attributes:
        merged: Convolutions to merge, in depth order.
        skipped: All the others, in depth order, each with its reason.
        found_by: How the order was found: ``"trace"`` (meta tensors), ``"forward"`` (a real
            forward pass), or ``"registration"`` (no forward pass was possible).
        mode: The mode of :class:`InMergeWrapper` that it was made for: other modes can merge other
            convolutions.
    """

    merged: tuple[ConvSite, ...]
    skipped: tuple[ConvSite, ...]
    found_by: str = "trace"
    mode: str = "step"

    @property
    def summary(self) -> str:
        """How many of all convolutions are merged, as a sentence without its full stop."""
        count, total = len(self.merged), len(self.merged) + len(self.skipped)
        return f"{count} of {total} convolutions {'is' if count == 1 else 'are'} merged"

    @property
    def sites(self) -> list[ConvSite]:
        """All convolutions in depth order, those that never ran at the end."""
        everyone = self.merged + self.skipped
        return sorted(everyone, key=lambda site: (site.depth is None, site.depth or 0))

    def __str__(self) -> str:
        rows = [("depth", "convolution", "weight", "groups", "")]
        rows += [
            (
                "-" if site.depth is None else str(site.depth),
                site.name,
                "x".join(map(str, site.shape)) or "?",
                str(site.groups),
                "merged" if site.reason is None else f"skipped ({site.reason})",
            )
            for site in self.sites
        ]
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = [
            f"{row[0]:>{widths[0]}}  {row[1]:<{widths[1]}}  {row[2]:<{widths[2]}}  "
            f"{row[3]:>{widths[3]}}  {row[4]}".rstrip()
            for row in rows
        ]
        lines.append(f"{self.summary}.")
        return "\n".join(lines)

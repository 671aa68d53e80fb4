"""What merging in the forward pass did, counted on the device of the network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor


class Counts:
    """Sums for each merged layer, which nothing waits for until they are taken."""

    def __init__(self, layers: int, device: torch.device) -> None:
        wide = torch.float32 if device.type == "mps" else torch.float64  # mps has no float64
        self._device = device
        with torch.device(device):
            # Drawn, merged, pairs without and with a cosine; then sum and maximum of the cosines.
            self._numbers = [
                [torch.zeros((), dtype=torch.int64) for _ in range(4)] for _ in range(layers)
            ]
            self._cosines = [
                (torch.zeros((), dtype=wide), torch.full((), -2.0, dtype=torch.float32))
                for _ in range(layers)
            ]
        self._acted: dict[int, int] = {}  # in the pass that runs
        self._waiting: Counter[int] = Counter()  # in passes before, not yet on the device

    def take_over(self, other: Counts) -> None:
        """Takes over the sums of another device, from which the network came."""
        self._waiting = other._waiting
        if other._numbers[0][0].is_meta:  # which held none
            return
        for layer, numbers in enumerate(other._numbers):
            torch._foreach_copy_(self._numbers[layer], numbers)
            torch._foreach_copy_(list(self._cosines[layer]), list(other._cosines[layer]))

    def add(self, layer: int, drawn: int | Tensor, merged: Tensor) -> None:
        """Adds images x channels, or kernels, that were drawn, and those of them that merged.

        Here as in :meth:`add_cosines`, they may be on another device: that of a layer, where a
        network is spread over several, or went to another after the last step.
        """
        drawn = drawn.to(self._device) if isinstance(drawn, Tensor) else drawn
        self._numbers[layer][0].add_(drawn)
        self._numbers[layer][1].add_(merged.to(self._device))

    def add_all(self, layer: int, drawn: int) -> None:
        """Adds images x channels that were drawn and all merged, at the end of the pass."""
        self._acted[layer] = self._acted.get(layer, 0) + drawn

    def end_pass(self, *, is_repeated: bool) -> None:
        """Keeps on the host what :meth:`add_all` got, but for a compiled or captured pass.

        The host does not run that again, so it adds on the device, all layers in one launch.
        """
        if is_repeated:
            self._send(self._acted)
        else:
            for layer, drawn in self._acted.items():
                self._waiting[layer] += drawn
        self._acted.clear()

    def _send(self, drawn: Mapping[int, int]) -> None:
        if drawn:
            sums = [number for layer in drawn for number in self._numbers[layer][:2]]
            torch._foreach_add_(sums, [count for count in drawn.values() for _ in range(2)])

    def add_cosines(
        self, layer: int, cosines: Tensor, images: int, drawn: Tensor | None = None
    ) -> None:
        """Adds the cosines of pairs that so many images share, shape (pairs,), NaN where undefined.

        Only those that were ``drawn``, bool, shape (pairs,), count; None stands for all.
        """
        cosines = cosines.to(self._device)
        undefined = cosines.isnan()
        known = ~undefined
        if drawn is not None:
            drawn = drawn.to(self._device)
            undefined, known = undefined & drawn, known & drawn
        numbers, (total, largest) = self._numbers[layer], self._cosines[layer]
        numbers[2].add_(undefined.sum() * images)
        numbers[3].add_(known.sum() * images)
        total.add_(torch.where(known, cosines, 0.0).sum() * images)
        highest = torch.where(known, cosines, -2.0).max()
        largest.copy_(torch.maximum(largest, highest))

    def take(self) -> tuple[Tensor, Tensor]:
        """Returns the sums since the last call, and begins anew; waits for the device.

        Returns:
            int64, shape (layers, 4): images x channels (in the weights: kernels) that were drawn
            and that merged, pairs without and with a cosine; float64, shape (layers, 2): sum and
            largest of the cosines, -2 for none. On the CPU.
        """
        self._send(self._waiting)
        self._waiting.clear()
        numbers = torch.stack([torch.stack(layer) for layer in self._numbers]).cpu()
        cosines = torch.stack([torch.stack([t, m.to(t)]) for t, m in self._cosines]).cpu().double()
        torch._foreach_zero_([number for layer in self._numbers for number in layer])
        for total, largest in self._cosines:
            total.zero_()
            largest.fill_(-2.0)
        return numbers, cosines

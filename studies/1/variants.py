@dataclass(frozen=True)
class Variant(Method):
    """Two variants of merging that the first study tried, and that are not part of the library."""

    name: ClassVar[str] = "variant"
    toward: Literal["clusters", "unit"]

    def follow(self, training: Training) -> Follower:
        return _Varying(training, self.toward)


class _Varying(Follower):
    def __init__(self, training: Training, toward: Literal["clusters", "unit"]) -> None:
        plan = plan_merging(training.network)
        self.convolutions = [training.network.get_submodule(site.name) for site in plan.merged]
        self.fade = Schedule(end=training.epochs * training.steps, decay="cosine")
        self.generator = torch.Generator().manual_seed(training.seed)
        self.toward = toward

    def after_step(self, step: int) -> None:
        for convolution in self.convolutions:
            merge_variant_(
                convolution.weight,  # type: ignore[arg-type]
                self.generator,
                probability=0.3 * self.fade.level(step),
                toward=self.toward,
            )


@torch.no_grad()
def merge_variant_(
    weight: Tensor,
    generator: torch.Generator,
    *,
    probability: float,
    merge_weight: float = 0.8,
    toward: str,
) -> None:
    """Merges toward ``clusters`` or ``unit`` kernels, in place.

    ``clusters``: each drawn kernel moves toward the mean of those kernels that share its most
    similar one of C_out / 8 drawn at random. ``unit``: the most similar half of random pairs is
    blended by direction, as BatchNorm sees kernels; each keeps its norm.
    """
    kernels = weight.flatten(1)
    norms = kernels.norm(dim=1, keepdim=True).clamp_min(1e-12)
    unit = kernels / norms
    if toward == "clusters":
        drawn = (torch.rand(len(kernels), generator=generator) < probability).nonzero().flatten()
        centres = torch.randperm(len(kernels), generator=generator)[: max(1, len(kernels) // 8)]
        cluster = (unit @ unit[centres].T).argmax(dim=1)
        sums = kernels.new_zeros(len(centres), kernels.shape[1]).index_add_(0, cluster, kernels)
        means = sums / cluster.bincount(minlength=len(centres)).clamp_min(1).unsqueeze(1)
        blended = torch.lerp(means[cluster[drawn]], kernels[drawn], merge_weight)
    else:
        drawn, partners = draw_pairs(len(kernels), probability, generator)
        cosines = pair_cosines(kernels[drawn], kernels[partners])
        alike = cosines >= cosines.median()
        drawn, partners = drawn[alike], partners[alike]
        pair = unit[drawn], unit[partners]
        scale = norm_scale(*pair, merge_weight)
        blended = norms[drawn] * blend_kernels(*pair, None, merge_weight, scale)
    weight.index_copy_(0, drawn, blended.unflatten(1, weight.shape[1:]))

"""In-model merging (InMerge, arXiv 2502.20516) for any CNN of timm or torchvision."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from inmerge_wrap.discovery import plan_merging
    from inmerge_wrap.export import export_timm, export_weights
    from inmerge_wrap.merging import blend_kernels, draw_pairs, mix_channels, pair_cosines
    from inmerge_wrap.plan import ConvSite, MergePlan
    from inmerge_wrap.recalibration import recalibrate
    from inmerge_wrap.report import LayerReport, LayerSnapshot, MergeReport
    from inmerge_wrap.schedule import Schedule
    from inmerge_wrap.settings import (
        DirectionRule,
        MergeSettings,
        PartnerRule,
        recommended_settings,
    )
    from inmerge_wrap.thresholds import Fixed, Quantile, Threshold, ZScore
    from inmerge_wrap.watch import CollapseWarning, NoEffectWarning
    from inmerge_wrap.wrapper import InMergeWrapper

__version__ = "0.1.0"

__all__ = [
    "CollapseWarning",
    "ConvSite",
    "DirectionRule",
    "Fixed",
    "InMergeWrapper",
    "LayerReport",
    "LayerSnapshot",
    "MergePlan",
    "MergeReport",
    "MergeSettings",
    "NoEffectWarning",
    "PartnerRule",
    "Quantile",
    "Schedule",
    "Threshold",
    "ZScore",
    "blend_kernels",
    "draw_pairs",
    "export_timm",
    "export_weights",
    "mix_channels",
    "pair_cosines",
    "plan_merging",
    "recalibrate",
    "recommended_settings",
]

_HOMES = {
    "discovery": ("plan_merging",),
    "export": ("export_timm", "export_weights"),
    "merging": ("blend_kernels", "draw_pairs", "mix_channels", "pair_cosines"),
    "plan": ("ConvSite", "MergePlan"),
    "recalibration": ("recalibrate",),
    "report": ("LayerReport", "LayerSnapshot", "MergeReport"),
    "schedule": ("Schedule",),
    "settings": ("DirectionRule", "MergeSettings", "PartnerRule", "recommended_settings"),
    "thresholds": ("Fixed", "Quantile", "Threshold", "ZScore"),
    "watch": ("CollapseWarning", "NoEffectWarning"),
    "wrapper": ("InMergeWrapper",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Imports a public name on first use, so that ``inmerge --help`` does not wait for torch."""
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

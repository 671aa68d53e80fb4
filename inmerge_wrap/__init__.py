"""In-model merging (InMerge, arXiv 2502.20516) for any CNN of timm or torchvision."""

from inmerge_wrap.discovery import ConvSite, MergePlan, plan_merging
from inmerge_wrap.export import export_timm, export_weights
from inmerge_wrap.merge_pass import merge_pairs_
from inmerge_wrap.merging import draw_pairs
from inmerge_wrap.recalibration import recalibrate
from inmerge_wrap.report import LayerReport, LayerSnapshot, MergeReport
from inmerge_wrap.schedule import Schedule
from inmerge_wrap.thresholds import Fixed, Quantile, Threshold, ZScore
from inmerge_wrap.wrapper import CollapseWarning, InMergeWrapper, NoEffectWarning

__version__ = "0.1.0"

__all__ = [
    "CollapseWarning",
    "ConvSite",
    "Fixed",
    "InMergeWrapper",
    "LayerReport",
    "LayerSnapshot",
    "MergePlan",
    "MergeReport",
    "NoEffectWarning",
    "Quantile",
    "Schedule",
    "Threshold",
    "ZScore",
    "draw_pairs",
    "export_timm",
    "export_weights",
    "merge_pairs_",
    "plan_merging",
    "recalibrate",
]

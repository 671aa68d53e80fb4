"""Constants that the help of the command line shows, in a module that does not import torch."""

DEFAULT_SHALLOW_SHARE = 0.625
"""L_s as a share of the depth: the authors do not merge 10 of VGG-19's 16 convolutions."""

SKIPPED_KINDS = {
    "depthwise": "depthwise: every kernel reads a different channel",
    "vector": "works on a pooled 1x1 map: a gate (squeeze-excite, attention) or a dense layer",
    "dense": "one kernel covers the whole map: a dense layer written as a convolution",
    "head": "head: its outputs are the predictions",
    "patch_embedding": "patch embedding: cuts the image into patches",
    "auxiliary": "auxiliary: runs in training only and is left out at inference",
    "unused": "never executed in a forward pass",
    "frozen": "frozen: requires_grad is False",
    "adapter": "adapter: a factor of a low-rank update (LoRA), whose rows are not kernels",
}
"""Kinds of convolution that are skipped unless named in ``also_merge``, each with its reason."""

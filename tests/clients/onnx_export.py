"""ONNX and torch.export of the trained network, which computes what the wrapper computed.

python -m tests.clients.onnx_export
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import torch

from tests.clients.check import check, run, wrapped
from tests.scripts.common import batch, sgd, train


def exports(folder: Path, mode: str) -> None:
    model = wrapped(mode)
    optimizer = sgd(model)
    model.attach(optimizer)
    train(model, optimizer, 3)
    images, _ = batch(0)
    network = model.eval().module  # InMerge
    with torch.no_grad():
        expected = model(images)
    program = torch.export.export(network, (images,))
    torch.export.save(program, folder / "net.pt2")
    loaded = torch.export.load(folder / "net.pt2").module()
    check("torch.export gives the same logits", torch.equal(loaded(images), expected))
    names = {name for name, _ in network.named_parameters()}
    check("and holds the network's parameters", set(program.graph_signature.parameters) == names)
    torch.onnx.export(network, (images,), folder / "net.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(str(folder / "net.onnx"))
    (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    check("ONNX gives the same logits", np.allclose(found, expected.numpy(), atol=1e-5))


if __name__ == "__main__":
    run(("onnx", "onnxscript", "onnxruntime"), exports)

"""timm's train.py and torchvision's references/classification/train.py, with our lines in them.

    python -m tests.clients.training_scripts timm PATH/train.py
    python -m tests.clients.training_scripts torchvision PATH/references/classification/train.py

The lines are put beneath those that they belong to, in a copy; everything else is as it was. Each
script trains four epochs with an average, mixup and clipped gradients, and then two, stopped and
resumed, as the counters must show. Neither script restores the order of its data.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import torch
from PIL import Image

from tests.clients.check import check, run

IMPORT = "from inmerge_wrap import InMergeWrapper"
WRAP = "model = InMergeWrapper(model, similarity_threshold=-1.0, merge_probability=1.0, mode=MODE)"
ATTACH = "model.attach(optimizer)"
LINES = {
    # a line of the script -> what is put beneath it
    "timm": {
        r"^from timm\.optim import .*$": IMPORT,
        r"^    model\.to\(device=device, dtype=model_dtype\).*$": "    " + WRAP,
        r"^        \*\*args\.opt_kwargs,\n    \)$": "    " + ATTACH,
    },
    "torchvision": {
        r"^import torchvision$": IMPORT,
        r"^    model\.to\(device\)$": "    " + WRAP,
        r"^    scaler = .*GradScaler.*$": "    " + ATTACH,
    },
}
TIMM = (
    "--data-dir {data} --model resnet10t --num-classes 6 --input-size 3 32 32 "
    "--batch-size 4 --device cpu --workers 1 --no-prefetcher --sched-on-updates --warmup-epochs 0 "
    "--model-ema --model-ema-decay 0.9 --mixup 0.2 --clip-grad 1.0 --output {out} --experiment run "
    "--epochs 4"
)
TORCHVISION = (
    "--data-path {data} --model resnet18 --batch-size 4 --device cpu --workers 0 --lr 0.01 "
    "--val-resize-size 32 --val-crop-size 32 --train-crop-size 32 --model-ema --model-ema-steps 1 "
    "--mixup-alpha 0.2 --clip-grad-norm 1.0 --output-dir {out} --epochs {epochs}"
)


def write_images(folder: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 4), ("val", 2)):
        for label in "abcdef":  # torchvision counts the five best
            (folder / part / label).mkdir(parents=True)
            for number in range(count):
                pixels = torch.randint(256, (32, 32, 3), generator=generator, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(folder / part / label / f"{number}.png")


def with_our_lines(name: str, script: Path, mode: str) -> Path:
    text = script.read_text()
    for line, ours in LINES[name].items():
        text, found = re.subn(
            line,
            lambda match, ours=ours: match[0] + "\n" + ours.replace("MODE", repr(mode)),
            text,
            flags=re.MULTILINE,
        )
        check(f"one place for {ours.strip()}", found == 1)
    copy = script.with_name(f"train_inmerge_{mode}.py")
    copy.write_text(text)
    return copy


def start(script: Path, line: str, *more: str) -> None:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), str(script.parent)]),
        "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1",  # torchvision's checkpoints hold a Namespace
    }
    command = [sys.executable, str(script), *line.split(), *more]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    check(
        f"it ran: {' '.join(more) or 'from the start'}", done.returncode == 0 or print(done.stderr)
    )


def counters(checkpoint: Path) -> list[list[float]]:
    """Steps, passes, drawn and merged pairs of each layer, from the optimizer's state."""
    ((_, numbers),) = torch.load(checkpoint, weights_only=False)["optimizer"]["inmerge"]
    return torch.tensor(numbers[4:]).reshape(-1, 8)[:, :4].tolist()


def trains_and_resumes(folder: Path, mode: str) -> None:
    name, script = sys.argv[1], Path(sys.argv[2]).resolve()
    write_images(folder / "data")
    copy = with_our_lines(name, script, mode)
    files = {}
    try:
        for run_name in ("straight", "resumed"):
            out = folder / run_name
            if name == "timm":
                line = TIMM.format(data=folder / "data", out=out)
                last = out / "run" / "last.pth.tar"
                if run_name == "straight":
                    start(copy, line)
                else:
                    half = folder / "straight" / "run" / "checkpoint-1.pth.tar"
                    start(copy, line, "--resume", str(half))
            else:
                last = out / "checkpoint.pth"
                for epochs in (4,) if run_name == "straight" else (2, 4):
                    line = TORCHVISION.format(data=folder / "data", out=out, epochs=epochs)
                    start(copy, line, *(["--resume", str(last)] if last.exists() else []))
            files[run_name] = counters(last)
    finally:
        copy.unlink()
    straight, resumed = files["straight"], files["resumed"]
    check("24 steps were seen", {layer[0] for layer in straight} == {24.0})
    check("all drawn pairs merged", all(layer[2] == layer[3] > 0 for layer in straight))
    check("the resumed run drew the same pairs", straight == resumed)


if __name__ == "__main__":
    run(("timm", "torchvision"), trains_and_resumes)

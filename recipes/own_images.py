"""Trains a classifier on a folder of your own images, and writes a report that you can share.

    accelerate launch recipes/own_images.py --data-dir DIR --arch resnet18 --weights none \
        --size 224 --epochs 20 --out runs/mine

`--help` lists the options; docs/own-images.md describes what is read, checked, trained and written.
"""

from inmerge_wrap.app.train import main

if __name__ == "__main__":
    main()

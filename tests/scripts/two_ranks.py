"""Runs every case for two ranks in one pair of processes: to start them takes longer than a case.

    python -m torch.distributed.run --nproc_per_node 2 tests/scripts/two_ranks.py FOLDER

Every rank writes FOLDER/RANK.json: case -> outcome.
"""

from __future__ import annotations

import json
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from tests.scripts import forward_parallel, sharded, uneven


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(minutes=5))
    outcome = {case.__name__: case(folder) for case in sharded.CASES}
    for kind in ("ddp", "fsdp2"):
        for name, settings in forward_parallel.CASES.items():
            outcome[f"{kind}, {name}"] = forward_parallel.in_parallel(kind, **settings)
    outcome |= {case.__name__: case() for case in uneven.CASES}
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(outcome))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

"""Run under torchrun by the fixture `matrix`: one matrix after the other in one process group.

    torchrun --nproc-per-node W tests/engine/rank_loop.py FOLDER PID

For every FOLDER/<n>.task, a JSON list of a module beside this script and its arguments, all ranks call the module's
`matrix(*arguments)`, and rank 0 writes what it returns to FOLDER/<n>.result. Ends on FOLDER/end, where a matrix raises,
and when the process PID, who asks, is gone.
"""

from __future__ import annotations

import gc
import importlib
import itertools
import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from cmpt.dist import process_group


def next_task(folder: Path, number: int, asker: int) -> list[str] | None:
    while not (task := folder / f"{number}.task").exists():
        if (folder / "end").exists():
            return None
        os.kill(asker, 0)
        time.sleep(0.05)
    return json.loads(task.read_text())


def main() -> None:
    folder, asker = Path(sys.argv[1]), int(sys.argv[2])
    rank, _, _ = process_group.start()
    for number in itertools.count():
        task = next_task(folder, number, asker)
        if task is None:
            break
        module, *arguments = task
        found = importlib.import_module(module).matrix(*arguments)
        if rank == 0:
            (folder / "new").write_text(json.dumps(found))
            (folder / "new").rename(folder / f"{number}.result")
        gc.collect()  # engines hold each other in cycles
        process_group.barrier()
    process_group.stop()


if __name__ == "__main__":
    main()

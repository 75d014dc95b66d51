"""`python group.py FOLDER K RANK`: scripts one after another as one of two processes, which saves the seconds of their starts.

Command k, from K on, is FOLDER/k.json: [port, script, arguments...]. Each process answers with FOLDER/k.RANK.json, which is its
traceback or null. The fixture `group` of conftest.py writes the commands.
"""

import importlib
import itertools
import json
import os
import sys
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState
from conftest import MAINS

from flow.runtime import files

torch.set_num_threads(1)
folder, first, rank = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
parent = os.getppid()
for k in itertools.count(first):
    while not (folder / f"{k}.json").exists():
        time.sleep(0.01)
        if os.getppid() != parent:  # the tests were killed
            sys.exit()
    port, script, *arguments = json.loads((folder / f"{k}.json").read_text())
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    sys.argv = [f"{script}.py", *arguments]
    problem = None
    try:
        importlib.import_module(MAINS.get(script, f"scripts.{script}")).main()
    except BaseException:
        problem = traceback.format_exc()
    if dist.is_initialized():
        dist.destroy_process_group()
    files.write_text(folder / f"{k}.{rank}.json", json.dumps(problem))

"""The process of a rank other than the first: `python -m outpace.runtime.worker TASK`, which rank 0 starts.

It reads passes from its standard input and ends when that is closed. Signals that ask a server to end are for
rank 0, which finishes what runs first.
"""

from __future__ import annotations

import json
import logging
import os
import select
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

_PIPE, _OUTPUT, _ERRORS = 0, 1, 2
_GRACE_S = 1.0


def main() -> None:
    """Serves rank 0 until it is gone."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    status = os.dup(_OUTPUT)
    os.dup2(_ERRORS, _OUTPUT)  # what libraries print is not our status
    task = json.loads(sys.argv[1])
    threading.Thread(target=_end_with_rank_0, args=(Path(task["store"]).parent,), daemon=True).start()
    logging.disable(logging.WARNING)  # rank 0 says the same
    try:
        _serve(task, status)
    except EOFError:
        return
    except RuntimeError:
        time.sleep(_GRACE_S)  # if rank 0's end is what broke the connection, this process ends here, silently
        raise


def _end_with_rank_0(directory: Path) -> None:
    """Waits until the pipe is closed at its other end, whatever the main thread waits for."""
    poll = select.poll()
    poll.register(_PIPE, 0)  # hang-ups are always told
    poll.poll()
    shutil.rmtree(directory, ignore_errors=True)  # if rank 0 was killed, it could not
    os._exit(0)


def _serve(task: dict[str, Any], status: int) -> None:
    import torch

    from outpace.models.shard import Shard
    from outpace.runtime.kv_cache import KVCache
    from outpace.runtime.parallel import Part, Ranks, read_integers, receive

    part, shard = Part(**task["part"]), Shard(task["rank"], task["size"])
    ranks = Ranks(task["store"], shard, part.device)
    decoder = part.load(shard, ranks.total)
    os.write(status, b".")
    ranks.join()
    (num_blocks,) = read_integers(_PIPE, 1).tolist()
    cache = KVCache.of(decoder, num_blocks, False)
    stack = decoder.stack(cache.layers)
    while True:
        step = receive(_PIPE)
        if step.moves:
            cache.move(step.moves)
        batch = step.batch.to(decoder.device)
        with torch.inference_mode():  # all layers, or those that draft
            stack.run(decoder.attention(batch.rows), decoder.embed(batch.token_ids), end=step.num_layers)


if __name__ == "__main__":
    main()

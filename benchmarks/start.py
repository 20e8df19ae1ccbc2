"""From `outpace serve` to the end of a first answer of 8 tokens, with a warm cache.

python benchmarks/start.py
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import time
from argparse import Namespace
from pathlib import Path

import serving


def main() -> None:
    command = f"{Path(sys.executable).parent / 'outpace'} serve --port {{port}}"
    args = Namespace(output_len=8, temperature=0.0)
    seconds = []
    for _ in range(4):
        begin = time.perf_counter()
        server = serving.start("start", command, "", Path("/tmp"))
        asyncio.run(serving.ask(server, "Hi", args, seed=0))
        seconds.append(time.perf_counter() - begin)
        server.stop()
    warm = seconds[1:]  # the first may have filled the cache
    print(json.dumps({"median_s": statistics.median(warm), "lowest_s": min(warm), "highest_s": max(warm)}))


if __name__ == "__main__":
    main()

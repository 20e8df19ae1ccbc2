"""From `outpace serve` to the end of a first answer of 8 tokens, with a warm cache.

python benchmarks/start.py
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path

from outpace.bench import client
from outpace.bench.servers import Server
from outpace.bench.workload import Closed, built_in_prompts, make_queries


def main() -> None:
    command = [sys.executable, "-m", "outpace", "serve", "--port", "{port}"]
    query = make_queries(built_in_prompts(), [8], seed=0)
    seconds = []
    for _ in range(4):
        begin = time.perf_counter()
        server = Server("start", command, Path("/tmp"))
        server.start()
        endpoint = client.Endpoint(server.base_url, server.model, ignore_eos=True)
        (answer,) = client.run(endpoint, query, Closed(1)).answers
        seconds.append(time.perf_counter() - begin)
        server.stop()
        if answer.error is not None:
            sys.exit(answer.error)
    warm = seconds[1:]  # the first may have filled the cache
    print(json.dumps({"median_s": statistics.median(warm), "lowest_s": min(warm), "highest_s": max(warm)}))


if __name__ == "__main__":
    main()

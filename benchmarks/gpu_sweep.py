"""No drafts, fixed lengths and goodput on a GPU, with drafts that are accepted at given rates.

    python benchmarks/gpu_sweep.py --output results

One `outpace bench sweep` for each rate, over closed loops; a rate of 0.7 means that a draft token is accepted
with that probability if those before it are. All servers of a sweep live on the GPU at once, one at work and
the others frozen, each with the weights and --kv-cache-memory-bytes: name fewer --servers on a smaller GPU.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path

from outpace.config import EngineConfig
from outpace.device import choose_device
from outpace.errors import ConfigError
from outpace.models.hub import resolve_model

SHAPE = Path(__file__).parent / "llama-3.1-8b"
LONGEST = 7  # draft tokens that goodput may use


def server(name: str, rate: float) -> str:
    """A server of the sweep, as `--server` takes it: `off`, `fixed-3` or a policy."""
    policy, _, length = name.partition("-")
    if policy == "off":
        return "off: --spec-policy off"
    num_tokens = int(length or LONGEST)
    drafts = {
        "method": "synthetic",
        "num_speculative_tokens": num_tokens,
        "synthetic_acceptance_rates": [round(rate**depth, 6) for depth in range(1, num_tokens + 1)],
    }
    config = shlex.quote(json.dumps(drafts))
    return f"{name}: --spec-policy {policy} --allow-synthetic --speculative-config {config}"


def command(rate: float, args: argparse.Namespace) -> list[str]:
    """The sweep at one rate."""
    most = max(int(number) for number in args.concurrency.split(","))
    ours = [
        *("--model", args.model or str(SHAPE), "--device", args.device, "--max-model-len", "2048"),
        *("--max-num-seqs", str(most), "--max-num-batched-tokens", str(max(2048, most))),
        *("--kv-cache-memory-bytes", args.kv_cache_memory_bytes),
    ]
    if not args.model:
        tokenizer = args.tokenizer or str(resolve_model(None))
        ours += ["--load-format", "dummy", "--tokenizer", tokenizer]
    sweep = [sys.executable, "-m", "outpace", "bench", "sweep", "--serve-args", shlex.join(ours)]
    for name in args.servers.split(","):
        sweep += ["--server", server(name, rate)]
    output = Path(args.output) / f"acceptance-{rate:g}.json"
    sweep += ["--concurrency", args.concurrency, "--ignore-eos", "--output-len", str(args.output_len)]
    sweep += ["--endpoint", "completions", "--step-log", "--repetitions", str(args.repetitions)]
    return [*sweep, "--json", str(output), "--resume"]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", required=True, help="folder of the results; what is there goes on")
    parser.add_argument("--model", help="default: the shape of Llama-3.1-8B with random weights")
    parser.add_argument("--tokenizer", help="default: that of SmolLM2-135M-Instruct")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.5, 0.7, 0.9])
    parser.add_argument("--servers", default="off,fixed-3,fixed-5,fixed-7,goodput")
    parser.add_argument("--concurrency", default="1,2,4,8,16,32,64,128,256")
    parser.add_argument("--kv-cache-memory-bytes", default="8G")
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--dry-run", action="store_true", help="print the commands only")
    args = parser.parse_args()
    try:
        if not args.dry_run:
            choose_device(EngineConfig(device=args.device).device)
        commands = [command(rate, args) for rate in args.rates]
    except ConfigError as error:
        sys.exit(str(error))
    Path(args.output).mkdir(parents=True, exist_ok=True)
    for words in commands:
        print(shlex.join(words))
        if not args.dry_run:
            subprocess.run(words, check=True)


if __name__ == "__main__":
    main()

"""Makes code-editing prompts out of solved problems: the answer repeats most of the prompt.

python benchmarks/code_edits.py humaneval.jsonl.gz edits.jsonl
"""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

EDITS = (
    "Rename the function `{name}` to `{name}_checked`",
    "Add a comment above every return statement",
    "Add the keyword argument `verbose=False` to `{name}`",
)


def main() -> None:
    source, target = map(Path, sys.argv[1:])
    with gzip.open(source, "rt", encoding="utf-8") as file:
        problems = [json.loads(line) for line in file]
    with target.open("w", encoding="utf-8") as out:
        for i, problem in enumerate(problems):
            edit = EDITS[i % len(EDITS)].format(name=problem["entry_point"])
            text = f"{edit}. Return the whole code.\n\n```python\n{problem['reference'][0]}\n```"
            out.write(json.dumps({"id": f"edit/{i}", "turns": [text]}) + "\n")


if __name__ == "__main__":
    main()

"""WordNet's noun glosses as labelled text: which of 25 supersenses (act, animal, .. time) a definition is of.

    python -m benchmarks.glosses /usr/share/wordnet glosses/       Debian: apt install wordnet-base
    d2v race text_tiny --data glosses/train.jsonl --probe.data glosses/ --out race/

Writes train.jsonl and test.jsonl (every tenth by chance, the same on any machine) with "text" and "label".
Examples in quotes are left out of the text, synsets of noun.Tops out of both files.
Source: WordNet 3.0, wndb(5WN) and lexnames(5WN).
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

SUPERSENSES = (
    "act", "animal", "artifact", "attribute", "body", "cognition", "communication", "event", "feeling",
    "food", "group", "location", "motive", "object", "person", "phenomenon", "plant", "possession", "process",
    "quantity", "relation", "shape", "state", "substance", "time",
)  # fmt: skip
FIRST = 4
"""number of the file noun.act in lexnames; 3 is noun.Tops"""
TEST_SHARE = 0.1
_EXAMPLES = re.compile(r';?\s*"[^"]*"?')


def glosses(dictionary: Path) -> Iterator[tuple[str, str]]:
    """(definition, supersense) of every noun synset, in the order of `data.noun`."""
    for line in (dictionary / "data.noun").read_text(encoding="utf-8").splitlines():
        if line.startswith("  "):
            continue  # the licence
        entry, _, gloss = line.partition("|")
        number = int(entry.split()[1]) - FIRST
        text = _EXAMPLES.sub("", gloss).strip()
        if 0 <= number < len(SUPERSENSES) and text:
            yield text, SUPERSENSES[number]


def write(dictionary: Path, out: Path) -> dict[str, int]:
    """Write both files; the number of glosses in each."""
    rows = list(glosses(dictionary))
    order = np.random.Generator(np.random.PCG64(0)).permutation(len(rows))
    test = set(order[: round(TEST_SHARE * len(rows))].tolist())
    out.mkdir(parents=True, exist_ok=True)
    counts = {}
    for name, wanted in (("train", False), ("test", True)):
        chosen = [rows[i] for i in range(len(rows)) if (i in test) == wanted]
        lines = (json.dumps({"text": text, "label": label}, ensure_ascii=False) for text, label in chosen)
        (out / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        counts[name] = len(chosen)
    return counts


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.glosses",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("dictionary", type=Path, help="folder that holds data.noun")
    parser.add_argument("out", type=Path, help="folder to write into")
    given = parser.parse_args(arguments)
    print(write(given.dictionary, given.out))


if __name__ == "__main__":
    main()

"""Count the FLOPs of recorded races anew, by formula: `flops_per_step` of benchmarks/results/race_*.json.

    python -m benchmarks.race_flops benchmarks/results/race_image_cpu.json ...

For files made when torch's FlopCounterMode counted a first step. Settings and data are those of the recorded
command, its paths seen from where this is run; the samples of every step are drawn again, nothing is trained.
A file says under "flops" how they were counted. Then `make results` writes the tables.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from d2v.cli.race import read
from d2v.tools.race import recount


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.race_flops", description=__doc__.split("\n")[0]
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="RACE.json")
    for path in parser.parse_args().files:
        race = json.loads(path.read_text(encoding="utf-8"))
        given, cfg = read(race["environment"]["command"][2:])  # behind "d2v race"
        with tempfile.TemporaryDirectory() as folder:
            found = recount(race, cfg, given.objectives, Path(folder))
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        for old, new in zip(race["tracks"], found["tracks"], strict=True):
            before, after = (track["flops_per_step"] / 1e9 for track in (old, new))
            print(
                f"{path.name} {new['entry']} seed {new['seed']}: {before:.3f} GFLOP a step, now {after:.3f}: "
                f"it was {before / after:.2f} times that"
            )


if __name__ == "__main__":
    main()

"""The Triton kernels: the files of the repository's flat `kernels/` folder.

An installed wheel holds them without this file. In a checkout or an unpacked sdist they stand two levels up,
so that folder is added to the search path; `csrc` beside it tells our `kernels/` from a stranger's.
"""

from pathlib import Path

_root = Path(__file__).resolve().parents[2]
if (_root / "csrc").is_dir() and (_root / "kernels").is_dir():
    __path__.append(str(_root / "kernels"))

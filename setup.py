"""Packages and version; all other metadata stands in pyproject.toml.

The Triton kernels live in `kernels/` at the top of the repository and install as `d2vkern.kernels`. Packages
are listed by hand: `find_packages` loses that mapping when a wheel is built from an sdist.
"""

import re
from pathlib import Path

from setuptools import setup

init = Path(__file__).with_name("d2vkern").joinpath("__init__.py").read_text(encoding="utf-8")
version = re.search(r'^__version__ = "([^"]+)"$', init, re.MULTILINE)
if version is None:
    raise SystemExit("setup.py: d2vkern/__init__.py must define __version__")

setup(
    version=version[1],
    packages=[
        "d2vkern",
        "d2vkern.kernels",
        "d2vkern.ops",
        "d2vkern.peers",
        "d2vkern.reference",
        "d2v",
        "d2v.data",
        "d2v.data.embedded",
        "d2v.model",
    ],
    package_dir={"d2vkern.kernels": "kernels"},
    package_data={
        "d2vkern": ["py.typed", "measured.json"],
        "d2vkern.kernels": ["*.json"],
        "d2v.data": ["assets/*"],
    },
    include_package_data=False,
)

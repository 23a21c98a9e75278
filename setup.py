"""Packages, version and the compiled extension; all other metadata stands in pyproject.toml.

The Triton kernels live in `kernels/` at the top of the repository and install as `d2vkern.kernels`. Packages
are listed by hand: `find_packages` loses that mapping when a wheel is built from an sdist.

The extension (csrc/build.py) is one file of the package, d2vkern/_C.so, without any Python in it. It is no
ext_module: setuptools would name it and the wheel after one Python, and fail where it cannot be compiled.
"""

import importlib.util
import os
import re
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
EXTENSION = Path("d2vkern", "_C.so")

init = (ROOT / "d2vkern" / "__init__.py").read_text(encoding="utf-8")
version = re.search(r'^__version__ = "([^"]+)"$', init, re.MULTILINE)
if version is None:
    raise SystemExit("setup.py: d2vkern/__init__.py must define __version__")

spec = importlib.util.spec_from_file_location("d2vkern_build", ROOT / "csrc" / "build.py")
assert spec is not None and spec.loader is not None
native = importlib.util.module_from_spec(spec)
spec.loader.exec_module(native)


def build_extension(distribution: Distribution) -> Path | None:
    """The compiled extension, None without one; compiled at the first call, which says what was built."""
    if not hasattr(distribution, "d2vkern_extension"):
        target = ROOT / "build" / "native" / EXTENSION.name
        work = native.work_folder(os.environ)
        try:
            words = native.build(version[1], target, work, os.environ, native.find_torch())
        except native.BuildError as error:
            raise SystemExit(f"d2vkern: {error}") from None
        # pip shows what a build writes only with -v or when it fails
        distribution.announce(words, level=3)
        print(words)
        distribution.d2vkern_extension = target if target.is_file() else None
    return distribution.d2vkern_extension


class Package(Distribution):
    """Goes to the folder for one platform when the extension is in it."""

    def has_ext_modules(self) -> bool:
        return super().has_ext_modules() or getattr(self, "d2vkern_extension", None) is not None


class BuildPackage(build_py):
    """The Python files, and the extension beside them; in a development install in the source tree."""

    def run(self) -> None:
        super().run()
        built = build_extension(self.distribution)
        target = (ROOT if self.editable_mode else Path(self.build_lib)) / EXTENSION
        if built is None:
            # one of an earlier version or machine would only be refused
            target.unlink(missing_ok=True)
        else:
            self.mkpath(str(target.parent))
            fresh = target.with_name(f"{target.name}.new")
            self.copy_file(str(built), str(fresh))
            fresh.replace(target)  # whoever has the old file loaded keeps it

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        outputs = super().get_outputs(include_bytecode)
        target = Path(self.build_lib) / EXTENSION
        return [*outputs, str(target)] if target.is_file() else outputs


class Wheel(bdist_wheel):
    """Tagged for this platform when the extension is in it, for any otherwise; for every Python 3 both."""

    def run(self) -> None:
        self.root_is_pure = build_extension(self.distribution) is None
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        return native.wheel_tag(not self.root_is_pure)


setup(
    version=version[1],
    packages=[
        "d2vkern",
        "d2vkern.functions",
        "d2vkern.kernels",
        "d2vkern.native",
        "d2vkern.ops",
        "d2vkern.peers",
        "d2vkern.reference",
        "d2v",
        "d2v.cli",
        "d2v.config",
        "d2v.data",
        "d2v.data.embedded",
        "d2v.data.images",
        "d2v.data.speech",
        "d2v.data.text",
        "d2v.evaluate",
        "d2v.formats",
        "d2v.formats.hf_code",
        "d2v.model",
        "d2v.tools",
        "d2v.train",
    ],
    package_dir={"d2vkern.kernels": "kernels"},
    package_data={
        "d2vkern": ["py.typed", "measured.json"],
        "d2vkern.kernels": ["*.json"],
        "d2v.data": ["assets/*"],
    },
    include_package_data=False,
    distclass=Package,
    cmdclass={"build_py": BuildPackage, "bdist_wheel": Wheel},
)

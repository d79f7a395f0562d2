"""Builds the C++ kernels when iolite is installed from source; pyproject.toml has everything else.

Without a C++ compiler the installation goes on and says what is lost.
"""

import importlib.util
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

CPU = Path("iolite/kernels/cpu")


class BuildKernels(build_ext):
    """Compiles beside the sources, and copies the library into the wheel when one is being made."""

    def run(self) -> None:
        spec = importlib.util.spec_from_file_location("build_kernels", CPU / "build.py")
        assert spec is not None and spec.loader is not None
        builder = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(builder)
        try:
            library = builder.build()
        except builder.BuildError as error:
            lost = "plain torch takes their place: packed weights work, many times slower"
            print(f"iolite: the C++ kernels were not built, {lost}.\n{error}", file=sys.stderr)
            return
        if not self.editable_mode and not self.inplace:
            target = Path(self.build_lib) / CPU
            target.mkdir(parents=True, exist_ok=True)
            shutil.copy2(library, target)

    def get_source_files(self) -> list[str]:
        return [str(p) for p in sorted(CPU.iterdir()) if p.suffix in (".cpp", ".h")]

    def get_outputs(self) -> list[str]:
        return []


class PlatformWheel(bdist_wheel):
    """The library is called through ctypes: the wheel fits every Python 3 of the platform."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


setup(
    # An extension in name only: it makes setuptools call build_ext and mark the wheel as one for this platform.
    ext_modules=[Extension("iolite.kernels.cpu.libiolite", sources=[])],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": PlatformWheel},
)

"""What pyproject.toml cannot say: an installed package has configs/ as uae/configs."""

from __future__ import annotations

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
    """Builds the package and puts the configurations into it. An editable install reads them where they are."""

    def run(self) -> None:
        """Copy the modules, then the configurations."""
        super().run()
        if not self.editable_mode:
            for source, target in self._configs():
                self.mkpath(str(Path(target).parent))
                self.copy_file(source, target)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        """The files that `run` writes."""
        configs = [] if self.editable_mode else [target for _, target in self._configs()]
        return [*super().get_outputs(include_bytecode), *configs]

    def _configs(self) -> list[tuple[str, str]]:
        files = sorted(Path("configs").rglob("*.yaml"))
        return [(str(file), str(Path(self.build_lib, "uae", file))) for file in files]


setup(cmdclass={"build_py": BuildWithConfigs})

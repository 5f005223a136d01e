"""What pyproject.toml cannot say: the templates of k8s/ go along, inside the package."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class WithTemplates(build_py):
    """In an editable installation they are where they are."""

    def run(self) -> None:
        """Copies them after the modules."""
        super().run()
        if Path("k8s").is_dir() and not self.editable_mode:
            there = Path(self.build_lib) / "launch" / "kubernetes" / "k8s"
            shutil.copytree("k8s", there, dirs_exist_ok=True)


setup(cmdclass={"build_py": WithTemplates})

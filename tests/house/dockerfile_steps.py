"""Execute the Dockerfile where there is no container engine: every step in turn, then a short training by its entry point.

    sudo PYTHON=python3.12 python tests/house/dockerfile_steps.py [FOLDER]

The steps see this machine's files, but whatever they write goes to a new folder in FOLDER (default: where temporary files are), which
is removed at the end. The base image is not here: a virtual environment of Python 3.12 stands for it, made by the interpreter that the
variable PYTHON names. Needs Linux, root, network, and 10 GB of disk.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

CHECKOUT = Path(__file__).parents[2]
IN_ITS_OWN_MOUNTS = "UAE_STEPS_MOUNTED"
BASE = "/image"  # the environment that stands for the base image
SHORT = ["--config", "debug/fast"]


def instructions(text: str) -> Iterator[tuple[str, str]]:
    """Name and rest of every instruction, without comments."""
    for line in text.replace("\\\n", " ").splitlines():
        if line and not line.startswith("#"):
            name, _, rest = line.partition(" ")
            yield name, rest.strip()


class Root:
    """A root whose changes stay in a folder, with what the instructions have set so far."""

    def __init__(self, folder: Path) -> None:
        self.path, self.folder, self.user = folder / "root", "/", "root"
        self.entry: list[str] = []
        for name in ("changes", "work", "root"):
            (folder / name).mkdir(parents=True)
        overlay = f"lowerdir=/,upperdir={folder / 'changes'},workdir={folder / 'work'}"
        subprocess.run(["mount", "-t", "overlay", "overlay", "-o", overlay, str(self.path)], check=True)
        for name in ("dev", "proc"):
            subprocess.run(["mount", "--rbind", f"/{name}", str(self.path / name)], check=True)
        network = {name: value for name, value in os.environ.items() if name.startswith("PIP_") or name.lower().endswith("_proxy")}
        self.environment = {**network, "PATH": f"{BASE}/bin:{os.environ['PATH']}", "LANG": "C.UTF-8"}
        self.run("sed -i -E '/^[^:]*:[^:]*:[1-9][0-9]{3}:/d' /etc/passwd /etc/group")  # accounts of this machine
        self.run(f"{os.environ.get('PYTHON', 'python3.12')} -m venv {BASE} && chmod o+x ~")  # the interpreter may be in there

    def run(self, command: str) -> None:
        """A command in this root, as the user and in the folder that are set."""
        user = f"setpriv --reuid {self.user} --regid {self.user} --init-groups"
        inside = f"export HOME=~{self.user} && cd {self.folder} && exec {user} sh -ec {shlex.quote(command)}"
        subprocess.run(["chroot", str(self.path), "bash", "-c", inside], check=True, env=self.environment)

    def inside(self, folder: str) -> Path:
        """Where a folder of this root is on the machine; made if need be."""
        target = self.path / os.path.join(self.folder, folder).lstrip("/")
        target.mkdir(parents=True, exist_ok=True)
        return target

    def do(self, name: str, rest: str) -> None:
        """One instruction.

        Raises:
            ValueError: Nobody has taught this script that instruction.
        """
        if name == "RUN":
            self.run(rest)
        elif name == "COPY":
            *sources, target = rest.split()
            for source in sources:
                one, to = CHECKOUT / source, self.inside(target)
                shutil.copytree(one, to, dirs_exist_ok=True) if one.is_dir() else shutil.copy2(one, to)
        elif name == "WORKDIR":
            self.folder = rest
            self.inside(".")
        elif name == "USER":
            self.user = rest
        elif name == "ENV":
            self.environment |= dict(re.findall(r"(\w+)=(\S+)", rest))
        elif name in ("ENTRYPOINT", "CMD"):
            self.entry += json.loads(rest)
        elif name != "FROM":
            raise ValueError(f"{name}: this script does not know this instruction of the Dockerfile")


def main(folder: Path) -> None:
    """Execute all steps, and what a container would then execute, on a few images."""
    root = Root(folder)
    for name, rest in instructions((CHECKOUT / "Dockerfile").read_text()):
        start = time.perf_counter()
        root.do(name, rest)
        print(f"== {time.perf_counter() - start:6.1f} s  {name} {rest}", flush=True)
    command = shlex.join([*root.entry, *SHORT])
    root.run(f"{command} && ls outputs/tiny && id -un")
    print(f"== ran  {command}")


if __name__ == "__main__":
    if IN_ITS_OWN_MOUNTS not in os.environ:
        own = ["unshare", "--mount", sys.executable, *sys.argv]
        raise SystemExit(subprocess.run(own, env={**os.environ, IN_ITS_OWN_MOUNTS: "1"}).returncode)
    place = Path(tempfile.mkdtemp(dir=sys.argv[1] if len(sys.argv) > 1 else None))
    try:
        main(place)
    finally:
        subprocess.run(["umount", "--recursive", "--lazy", str(place / "root")], check=False)
        shutil.rmtree(place / "changes", ignore_errors=True)
        shutil.rmtree(place / "work", ignore_errors=True)
        with suppress(OSError):  # never its contents: where it is still mounted, they are this machine's files
            (place / "root").rmdir()
            place.rmdir()

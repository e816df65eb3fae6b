"""The versions of Python and of the libraries, against the bounds of this package and against each other's."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable
from importlib import import_module, metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from uae import __version__
from uae.doctor.finding import Finding, note, ok, wrong

PACKAGE = "uae"
REINSTALL = "python -m pip install --editable ."
Requires = Callable[[str], Iterable[str]]


def check_versions() -> list[Finding]:
    """The findings about Python, the required libraries, and whether torch and torchvision belong together."""
    try:
        installed = metadata.metadata(PACKAGE)
    except metadata.PackageNotFoundError:
        return [note(f"{PACKAGE} is not installed, so its bounds on versions are unknown", f"{REINSTALL} in the checkout")]
    found = [_check_python(installed["Requires-Python"] or "")]
    if installed["Version"] != __version__:
        found.append(note(f"installed as version {installed['Version']}, but the code is version {__version__}", REINSTALL))
    required = list(_required(_requirements(PACKAGE)))
    present = _versions(one.name for one in required)
    return [*found, *compare(required, present), *pairs(present, _requirements), _check_operators()]


def _check_python(allowed: str) -> Finding:
    here = platform.python_version()
    if SpecifierSet(allowed).contains(here, prereleases=True):
        return ok(f"{PACKAGE} {__version__}, Python {here} (allowed: {allowed})")
    return wrong(f"Python {here}; allowed: {allowed}", "make a new environment: make PYTHON=python3.12 demo")


def compare(required: Iterable[Requirement], present: dict[str, str]) -> list[Finding]:
    """The findings about libraries that the package requires.

    Args:
        required: The requirements.
        present: Installed versions by canonical name.
    """
    found, fitting = [], []
    for one in required:
        version = present.get(canonicalize_name(one.name))
        if version is None:
            found.append(wrong(f"{one.name} is not installed; needed: {one}", f"python -m pip install '{_plain(one)}'"))
        elif not one.specifier.contains(version, prereleases=True):
            found.append(wrong(f"{one.name} {version}; allowed: {one.specifier}", f"python -m pip install '{_plain(one)}'"))
        else:
            fitting.append(f"{one.name} {version}")
    return [*found, ok(f"{len(fitting)} libraries within their bounds: {', '.join(fitting)}")]


def pairs(present: dict[str, str], requires: Requires) -> list[Finding]:
    """The findings about libraries that require other versions of each other, such as torchvision of torch.

    Args:
        present: Installed versions by canonical name.
        requires: Returns the requirements of an installed library.
    """
    found = []
    for name in present:
        for one in _required(requires(name)):
            version = present.get(canonicalize_name(one.name))
            if version is not None and not one.specifier.contains(version, prereleases=True):
                cure = f"install both together: python -m pip install --upgrade {name} '{_plain(one)}'"
                found.append(wrong(f"{name} {present[name]} needs {_plain(one)}, but {one.name} is {version}", cure))
    return found or [ok("these libraries accept each other's versions")]


def _check_operators() -> Finding:
    """Whether torchvision finds the operators of torch, which it does not if one is built for CUDA and the other is not."""
    try:
        import_module("torchvision.ops")
    except (ImportError, RuntimeError, OSError) as error:
        reason = str(error).splitlines()[0]
        return wrong(f"torchvision cannot be imported beside this torch: {reason}", "install both from the same package index")
    return ok("torchvision works with this torch")


def _requirements(name: str) -> Iterable[str]:
    try:
        return metadata.requires(name) or ()
    except metadata.PackageNotFoundError:
        return ()


def _required(requirements: Iterable[str]) -> Iterable[Requirement]:
    """The requirements that hold here, without those of extras."""
    parsed = map(Requirement, requirements)
    return (one for one in parsed if one.marker is None or one.marker.evaluate({"extra": ""}))


def _versions(names: Iterable[str]) -> dict[str, str]:
    found = {}
    for name in names:
        try:
            found[canonicalize_name(name)] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {str(name): version for name, version in found.items()}


def _plain(requirement: Requirement) -> str:
    """A requirement without its marker, as pip takes it."""
    extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
    return f"{requirement.name}{extras}{requirement.specifier}"

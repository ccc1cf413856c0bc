"""Compares the archives in a folder with the checkout; `make dist` runs it.

    python tests/archives.py dist

The source distribution must hold the files under version control and no others: what
is generated, or left over, does not belong there. The wheel, which is built from it,
must hold the whole package, and install nothing beside it.
"""

import pathlib
import subprocess
import sys
import tarfile
import zipfile

ROOT = pathlib.Path(__file__).resolve().parents[1]
NOT_SHIPPED = {".gitignore", ".ci/run"}
# What setuptools adds.
ADDED = {"PKG-INFO", "setup.cfg"}


def tracked():
    """The files under version control."""
    names = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True)
    return set(names.split("\0")) - {""}


def in_sdist(path):
    """The files in a source distribution, without its top folder."""
    with tarfile.open(path) as archive:
        files = [member.name for member in archive if not member.isdir()]
    names = {name.split("/", 1)[1] for name in files} - ADDED
    return {name for name in names if ".egg-info/" not in name}


def in_wheel(path):
    """The files in a wheel, without its metadata."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    return {name for name in names if ".dist-info/" not in name}


def main(folder):
    """Prints what is wrong; the exit code is 1 if anything is."""
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    files = tracked()
    sources, installed = in_sdist(sdist), in_wheel(wheel)
    package = {name for name in files if name.startswith("nlcg_optax/")}
    beside = {name for name in installed if not name.startswith("nlcg_optax/")}
    wrong = [
        f"{archive.name} {what} {name}"
        for archive, what, names in (
            (sdist, "lacks", files - NOT_SHIPPED - sources),
            (sdist, "should not hold", sources - files),
            (wheel, "lacks", package - installed),
            (wheel, "should not hold", beside),
        )
        for name in sorted(names)
    ]
    print(*wrong, sep="\n", end="\n" if wrong else "", file=sys.stderr)
    print(f"{sdist.name}: {len(sources)} files; {wheel.name}: {len(installed)}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(pathlib.Path(sys.argv[1])))

"""Builds wheel and sdist into `dist/` and looks at them as a user would: `make dist-check`.

    python .ci/dist_check.py               # builds, checks, installs both into empty environments
    python .ci/dist_check.py --no-install  # without the installs, of more than a gigabyte each

1. The sdist builds the same wheel as the tree, byte for byte.
2. `twine check --strict`: what an index shows of them is well formed.
3. Each is installed into an empty environment, with the versions of constraints.txt. There `bitfit --version`
   answers, a delta that an earlier version saved loads, and a user's file passes `mypy --strict`.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DIST = ROOT / "dist"
USERS_FILE = ROOT / "tests" / "helpers" / "typed_user.py"
LOADING = """
import sys
from bitfit_hf import BiasDelta
print(BiasDelta.from_pretrained(sys.argv[1]).num_parameters(head=True), "parameters")
"""


def run(*command: str | os.PathLike[str], **options: object) -> None:
    print("$", *command, flush=True)
    subprocess.run([str(word) for word in command], check=True, **options)  # type: ignore[call-overload]


def tree(target: Path) -> Path:
    """A copy of what git tracks, so that nothing that lies around gets into a distribution."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    for name in listed.decode().split("\0"):
        if name and (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    return target


def build(source: Path, target: Path, kind: str) -> Path:
    """Builds `source` as a `wheel` or an `sdist`."""
    run(
        sys.executable,
        "-m",
        "build",
        "--no-isolation",
        f"--{kind}",
        "--outdir",
        target,
        source,
        stdout=subprocess.DEVNULL,
    )
    (built,) = target.glob("*.whl" if kind == "wheel" else "*.tar.gz")
    return built


def try_in_empty_environment(distribution: Path, folder: Path) -> None:
    """Installs a distribution with its dependencies into a new environment and uses it there."""
    venv.create(folder, with_pip=True)
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", ROOT / "constraints.txt"]
    run(*pip, distribution)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    print(f"{distribution.name}: {size / 1e9:.1f} GB with everything that it needs")
    run(python.parent / "bitfit", "--version", cwd=folder)
    (delta,) = (ROOT / "tests" / "library" / "regression").glob("*plain-json/delta")
    run(python, "-c", LOADING, delta, cwd=folder)
    # mypy runs in its own environment and reads the other's packages.
    run(sys.executable, "-m", "mypy", "--strict", "--python-executable", python, USERS_FILE, cwd=folder)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--no-install", action="store_true", help="do not install them")
    args = parser.parse_args(argv)
    os.environ.setdefault("SOURCE_DATE_EPOCH", "1767225600")  # times in archives: any, but the same ones
    shutil.rmtree(DIST, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix="bitfit-dist-") as name:
        place = Path(name)
        source = tree(place / "tree")
        wheel, sdist = build(source, DIST, "wheel"), build(source, DIST, "sdist")
        with tarfile.open(sdist) as archive:
            archive.extractall(place / "sdist", filter="data")
        (unpacked,) = (place / "sdist").iterdir()
        again = build(unpacked, place / "again", "wheel")
        if again.read_bytes() != wheel.read_bytes():
            raise SystemExit(f"{sdist.name} builds another wheel than the tree: compare {wheel.name} of both.")
        print(f"{sdist.name} builds the same {wheel.name}")
        run(sys.executable, "-m", "twine", "check", "--strict", wheel, sdist)
        if not args.no_install:
            for number, distribution in enumerate((wheel, sdist)):
                try_in_empty_environment(distribution, place / f"environment{number}")


if __name__ == "__main__":
    main()

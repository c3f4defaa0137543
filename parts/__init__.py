"""What the scripts are put together from, one noun a file. No part imports a script.

Before any part is imported, this says in one sentence where Python or a library of requirements.txt is
missing, too old or too new. So it is written for older versions of Python too, from 3.8 on, and imports
nothing that may be missing.
"""

import re
import sys
from importlib import metadata
from pathlib import Path

REQUIREMENTS = Path(__file__).resolve().parents[1] / "requirements.txt"
REMEDY = "运行 pip install -r requirements.txt"
# A name, its extras, floor, ceiling, and the one system it is for: x[extra]>=1.2,<2; sys_platform == "linux"
LINE = re.compile(r'^([\w-]+)(?:\[.*\])?>=([\d.]+),<([\d.]+)(?:; sys_platform == "(\w+)")?', re.MULTILINE)


def numbers_of(version):
    """Return the numbers of a version: 2.13.0+cpu -> [2, 13, 0]. Lists of them compare as versions do."""
    return list(map(int, re.findall(r"\d+", version.partition("+")[0])))


def check_installation():
    """Raise SystemExit where something is missing, too old or too new, with all of it in one sentence."""
    # ruff takes it for settled by target-version, which an older Python has not read.
    if sys.version_info < (3, 11):  # noqa: UP036
        current = sys.version.split()[0]
        raise SystemExit(f"错误：需要 Python 3.11 或更新版本（当前 {current}）；请先升级 Python，再{REMEDY}")
    lacking = []
    for name, floor, ceiling, system in LINE.findall(REQUIREMENTS.read_text(encoding="utf-8")):
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            version = ""  # whose numbers are below every floor
        fits = numbers_of(floor) <= numbers_of(version) < numbers_of(ceiling)
        if not fits and system in ("", sys.platform):
            lacking.append(f"{name}>={floor},<{ceiling}（当前 {version}）" if version else name)
    if lacking:
        raise SystemExit(f"错误：需要 {'、'.join(lacking)}；请{REMEDY}")


check_installation()

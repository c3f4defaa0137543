"""What the scripts are put together from, one noun a file. No part imports a script.

Before any part is imported, this says in one sentence where Python or a library of requirements.txt is
missing or too old. So it is written for older versions of Python too, from 3.8 on, and imports nothing that
may be missing.
"""

import re
import sys
from importlib import metadata
from pathlib import Path

REQUIREMENTS = Path(__file__).resolve().parents[1] / "requirements.txt"
REMEDY = "运行 pip install -r requirements.txt"
# A name, its extras, its floor, and the one system that it is for: x[extra]>=1.2,<2; sys_platform == "linux"
LINE = re.compile(r'^([\w-]+)(?:\[.*\])?>=([\d.]+)[^;#\n]*(?:; sys_platform == "(\w+)")?', re.MULTILINE)


def numbers_of(version):
    """2.13.0+cpu -> [2, 13, 0]"""
    return [int(number) for number in re.findall(r"\d+", version.partition("+")[0])]


def check_installation():
    """Raises SystemExit where something is missing or too old."""
    if sys.version_info < (3, 11):  # noqa: UP036
        found = sys.version.split()[0]
        raise SystemExit(f"错误：需要 Python 3.11 或更新的（现在是 {found}）；请先换用它，再{REMEDY}")
    lacking = []
    for name, floor, system in LINE.findall(REQUIREMENTS.read_text(encoding="utf-8")):
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            version = ""
        if system in ("", sys.platform) and numbers_of(version) < numbers_of(floor):
            lacking.append(f"{name} {floor} 或更新的（现在是 {version}）" if version else name)
    if lacking:
        raise SystemExit(f"错误：需要 {'、'.join(lacking)}；请{REMEDY}")


check_installation()

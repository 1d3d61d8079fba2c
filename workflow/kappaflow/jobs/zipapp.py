"""The runner as one file for machines that have nothing but Python."""

from __future__ import annotations

import zipfile
from pathlib import Path

import kappaflow

_PARTS = ("__init__.py", "ledger.py", "progress.py", "jobs/**/*.py")
_MAIN = "import sys\n\nfrom kappaflow.jobs.__main__ import main\n\nsys.exit(main())\n"


def write_runner(path: Path) -> None:
    """Write the runner as an archive that Python executes: ``python3 kappaflow.pyz run FOLDER``.

    The same source gives the same bytes. `zipapp` itself would write the times and modes of the files.
    """
    package = Path(kappaflow.__file__).parent
    files = {
        f"kappaflow/{file.relative_to(package).as_posix()}": file for part in _PARTS for file in package.glob(part)
    }
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as stream:
        stream.write(b"#!/usr/bin/env python3\n")
        with zipfile.ZipFile(stream, "w") as archive:
            _add(archive, "__main__.py", _MAIN.encode())
            for name in sorted(files):
                _add(archive, name, files[name].read_bytes())
    temporary.chmod(0o755)
    temporary.replace(path)


def _add(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    member = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
    member.create_system, member.external_attr = 3, 0o644 << 16
    archive.writestr(member, content)

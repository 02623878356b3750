"""The command line in a process of its own, which says at the end how much memory it took.

A parent cannot learn that from the system: what it held itself when it started the child counts as the
child's (`exec_mmap` in Linux's fs/exec.c).
"""

from __future__ import annotations

import re
import sys
from pathlib import Path


def main() -> None:
    """Run `alignez-gguf` with the arguments of this process."""
    from alignez_gguf.cli import main as command_line

    try:
        command_line()
    finally:
        print(f"peak memory: {peak_bytes()} bytes", file=sys.stderr)


def peak_bytes() -> int:
    """The most memory that this process has had resident; mapped files count as far as they were read."""
    status = Path("/proc/self/status")
    if status.exists():
        match = re.search(r"^VmHWM:\s*(\d+) kB$", status.read_text(encoding="ascii"), re.MULTILINE)
        if match:
            return 1024 * int(match[1])
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


if __name__ == "__main__":
    main()

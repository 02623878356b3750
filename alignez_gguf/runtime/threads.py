"""How many threads to compute with: one for each physical core that this process may use.

Hyper-threads share the vector units that matrix products saturate, so a second one a core only gets in the
way.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

_CPUS = Path("/sys/devices/system/cpu")


def physical_cores() -> int:
    """The number of physical cores; where the system does not tell, of logical ones."""
    if sys.platform == "linux":
        return len({_siblings(cpu) for cpu in os.sched_getaffinity(0)})
    if sys.platform == "darwin":
        # Cores of the fast kind only: a product waits for its slowest thread.
        for key in ("hw.perflevel0.physicalcpu", "hw.physicalcpu"):
            answer = subprocess.run(["sysctl", "-n", key], capture_output=True, text=True, check=False)
            if answer.returncode == 0 and answer.stdout.strip().isdigit():
                return int(answer.stdout)
    return os.cpu_count() or 1


def _siblings(cpu: int) -> str:
    """The logical processors of one core, as the kernel lists them."""
    try:
        return (_CPUS / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text().strip()
    except OSError:
        return str(cpu)

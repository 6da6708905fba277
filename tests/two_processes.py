"""A recipe as a user runs it on two processes of Accelerate."""

import os
import subprocess
import sys
from pathlib import Path

__all__ = ["run_on_two_processes"]


def run_on_two_processes(recipe: str, *overrides: str) -> None:
    launch = [sys.executable, "-m", "accelerate.commands.launch"]
    launch += ["--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    program = Path(sys.executable).with_name("tdq")
    process = subprocess.run(
        [*launch, str(program), "run", recipe, *overrides],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert process.returncode == 0, process.stderr[-3000:]

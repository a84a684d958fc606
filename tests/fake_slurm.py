"""A SLURM of four small programs: jobs run here at once, and a job that is killed is out of memory."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

SBATCH = """
import os, re, subprocess, sys, time
from pathlib import Path
place, script = Path({place!r}), Path(sys.argv[-1]).read_text()
if "--partition=nowhere" in script:
    sys.exit("sbatch: error: invalid partition specified: nowhere")
number = time.time_ns() // 1000 % 10**9
(place / f"{{number}}.sh").write_text(script)
array = re.search(r"--array=0-(\\d+)", script)
for index in range(int(array[1]) + 1) if array else [None]:
    name = str(number) if index is None else f"{{number}}_{{index}}"
    told = dict(JOB_ID=number, NTASKS=1, JOB_NUM_NODES=1, NODEID=0, JOB_NODELIST="here", PROCID=0, LOCALID=0)
    told |= {{}} if index is None else dict(ARRAY_JOB_ID=number, ARRAY_TASK_ID=index)
    run = f"bash {{number}}.sh; [ $? = 0 ] && end=COMPLETED || end=OUT_OF_MEMORY; echo $end > {{name}}"
    (place / name).write_text("RUNNING")
    env = os.environ | {{f"SLURM_{{key}}": str(value) for key, value in told.items()}}
    subprocess.Popen(["bash", "-c", run], cwd=place, env=env, start_new_session=True, stdout=-3, stderr=-3)
print("Submitted batch job", number)
"""
SRUN = """
import os, sys
end = next(index for index, word in enumerate(sys.argv) if "python" in word)
error = sys.argv[sys.argv.index("--error") + 1]
names = dict(A="ARRAY_JOB_ID", a="ARRAY_TASK_ID", j="JOB_ID", t="PROCID")
for letter, name in names.items():
    error = error.replace(f"%{letter}", os.environ.get(f"SLURM_{name}", ""))
os.dup2(os.open(error, os.O_WRONLY | os.O_CREAT), 2)
os.execv(sys.argv[end], sys.argv[end:])
"""
SQUEUE = """
from pathlib import Path
for path in Path({place!r}).iterdir():
    if not path.suffix:
        print(path.name, path.read_text().strip())
"""


def install(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put the programs first on PATH; the returned folder holds the scripts that were submitted, as `NUMBER.sh`."""
    programs, jobs = place / "bin", place / "jobs"
    programs.mkdir(parents=True)
    jobs.mkdir()
    texts = {
        "sbatch": SBATCH.format(place=str(jobs)),
        "srun": SRUN,
        "squeue": SQUEUE.format(place=str(jobs)),
        "scancel": "",
    }
    for name, text in texts.items():
        (programs / name).write_text(f"#!{sys.executable}\n{text}")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    here = str(Path(__file__).parent)  # where nodes find what the tests define
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")])))
    monkeypatch.setattr("chiasm.slurm_queue.POLL", 0.2)
    return jobs

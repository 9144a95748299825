import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

# one thread: the tests' tensors are small, and two threads that wait for each other are slower on a busy machine
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a GPU that PyTorch sees")


def _as_main(name, arguments, cwd, files):
    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY), number)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))
    os.chdir(cwd)
    sys.argv = [f"{name}.py", *arguments]
    try:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()                               # multiprocessing leaves without them


def run_script(name, *arguments, cwd=".", timeout=300):
    """`python name.py arguments`, as a subprocess.CompletedProcess, in a process forked from one that has imported
    PyTorch already: importing it anew takes most of a small run's time."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["train", "bench", "torch._dynamo", "matplotlib.pyplot"])
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, stream) for stream in ("stdout", "stderr")]
        for file in files:
            file.touch()
        process = server.Process(target=_as_main, args=(name, list(map(str, arguments)), str(cwd), files))
        process.start()
        process.join(timeout)
        if process.is_alive():
            process.kill()
            raise subprocess.TimeoutExpired([name, *arguments], timeout)
        return subprocess.CompletedProcess([name, *arguments], process.exitcode, *(f.read_text() for f in files))

import os
import sys
from pathlib import Path

# one thread: the tests' tensors are small, and two threads that wait for each other are slower on a busy machine
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a GPU that PyTorch sees")

import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that wants the network is wrong
if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores between them
    os.environ["OMP_NUM_THREADS"] = "1"

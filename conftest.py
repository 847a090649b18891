"""How the tests run: on all cores at once where the whole suite is asked for, each process with one thread."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    # Two processes with two threads each on two cores would slow each other down tenfold.
    os.environ.update(OMP_NUM_THREADS="1", NUMBA_NUM_THREADS="1")


def pytest_xdist_auto_num_workers(config):
    """One process a core for whole folders; none besides this one for single files, which would only start later."""
    single = all(argument.split("::")[0].endswith(".py") for argument in config.args)
    return 0 if single else os.cpu_count() or 1

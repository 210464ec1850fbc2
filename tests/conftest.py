import os
import signal
import sys

import pytest
import tiers

# A shell that started pytest in the background made it, and all that it starts, deaf to Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # or a trainer without workers would set more


def pytest_configure(config: pytest.Config) -> None:
    """Whatever a test starts imports what the test does: this tree, and not an installed one."""
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    paths = [*map(str, config.getini("pythonpath")), *filter(None, given)]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    # Where it is set, each process that a test starts would compile this tree again.
    sys.dont_write_bytecode = False
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    if not config.getoption("numprocesses", None):  # this process runs tests, not xdist's workers
        config.pluginmanager.import_plugin("running")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say which tests belong into tests/slow.txt; whether they do, depends on the machine."""
    found = (report for reports in terminalreporter.stats.values() for report in reports)
    slow = tiers.unmarked(each for each in found if isinstance(each, pytest.TestReport))
    if slow:
        terminalreporter.section(f"over {tiers.SECONDS} s, and not in tests/slow.txt")
        terminalreporter.write_line("\n".join(slow))

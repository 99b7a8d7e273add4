"""Runs unittest cases; with --gtest_output=json:FILE on the command line it writes a report in GoogleTest's JSON form,
which is what tools/count_tests.py reads."""
import json
import sys
import unittest


def arguments():
    """The command line without GoogleTest's flags."""
    return [a for a in sys.argv[1:] if not a.startswith("--gtest")]


def run(module):
    """All cases of a module; the exit code."""
    result = unittest.TextTestRunner(verbosity=2).run(unittest.defaultTestLoader.loadTestsFromModule(module))
    bad, skipped = len(result.failures) + len(result.errors), len(result.skipped)
    entries = [{"result": "COMPLETED"}] * (result.testsRun - bad - skipped)
    entries += [{"result": "COMPLETED", "failures": [1]}] * bad + [{"result": "SKIPPED"}] * skipped
    for path in [a.split("json:", 1)[1] for a in sys.argv[1:] if a.startswith("--gtest_output=json:")]:
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"testsuites": [{"testsuite": entries}]}, file)
    return 1 if bad else 0

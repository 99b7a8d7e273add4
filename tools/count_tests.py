#!/usr/bin/env python3
"""Prints "passed failed skipped" of a report in GoogleTest's JSON form."""
import json
import sys

with open(sys.argv[1], encoding="utf-8") as file:
    report = json.load(file)
passed = failed = skipped = 0
for suite in report["testsuites"]:
    for test in suite["testsuite"]:
        if test.get("failures"):
            failed += 1
        elif test.get("result") == "SKIPPED":
            skipped += 1
        elif test.get("result") == "COMPLETED":
            passed += 1
if passed + failed + skipped == 0:
    sys.exit("no test ran")
print(passed, failed, skipped)

#!/usr/bin/env python3
"""The folders of the project and what they include: the graph, or what is wrong with it.

  tools/include_graph.py               prints the graph, then every violation
  tools/include_graph.py --check       prints violations only
  tools/include_graph.py --self-test   checks this script on small trees made for it

Exits with 1 if something is wrong.

Folders are floors (DESIGN.md). A file includes files of its own folder and of lower floors; never of a higher one,
and never of another folder on the same floor. Includes are written from src/, so that the floor is visible.
"""

import argparse
import collections
import os
import re
import sys
import tempfile

# A folder of src/, or one beside it. `ops/*` stands for every operator.
FLOORS = {
    "include": 0,  # the C ABI: knows nothing of ours
    "base": 1,
    "simd": 2, "cuda": 2, "comm": 2, "io": 2, "recurrence": 2,
    "text": 3, "ops/*": 3,
    "model": 4,
    "engine": 5, "train": 5, "eval": 5,
    "serve": 6,
    "apps": 7, "python": 7,
    "tests": 8,  # what no single folder owns
}
# Beside the floors: what tests are written with. It may include floors up to this one.
TESTING, TESTING_MAY_INCLUDE = "testing", 2
# Allowed by the floors, but not by the design.
FORBIDDEN = {
    ("engine", "text"): "engine/ maps ids to ids and knows no text",
}

OUTSIDE_SRC = ("include", "apps", "python", "tests")
SUFFIXES = (".h", ".cuh", ".cc", ".cu", ".cpp")
TEST_FILE = re.compile(r"_(test|bench)\.(cc|cu)$")
INCLUDE = re.compile(r'\s*#\s*include\s*(["<])([^">]+)[">]')
COMMENT = re.compile(r"/\*.*?\*/", re.S)

Include = collections.namedtuple("Include", "file line target")  # paths from the project's root


def folder_of(path):
    """src/ops/kda/kda.h -> ops/kda; apps/run.cc -> apps"""
    parts = path.split("/")
    if parts[0] != "src":
        return parts[0]
    return "/".join(parts[1:3]) if parts[1] == "ops" and len(parts) > 3 else parts[1]


def floor_of(folder):
    """None for testing/ and for a folder that the table does not know."""
    return FLOORS.get("ops/*" if folder.startswith("ops/") else folder)


def is_free(path):
    """tests/, testing/, x_test.cc and x_bench.cc may include testing/."""
    return folder_of(path) in (TESTING, "tests") or TEST_FILE.search(path) is not None


def source_files(root):
    for top in ("src",) + OUTSIDE_SRC:
        for directory, subdirectories, names in os.walk(os.path.join(root, top)):
            subdirectories.sort()
            for name in sorted(names):
                if name.endswith(SUFFIXES):
                    yield os.path.relpath(os.path.join(directory, name), root).replace(os.sep, "/")


def includes_of(text):
    """(line, quote or bracket, name) of every #include outside comments."""
    text = COMMENT.sub(lambda comment: "\n" * comment.group().count("\n"), text)
    for number, line in enumerate(text.split("\n"), 1):
        match = INCLUDE.match(line)
        if match:
            yield number, match.group(1), match.group(2)


class Tree:
    """All files, their includes of each other, and every include that leads nowhere or is written wrongly."""

    def __init__(self, root):
        self.files = list(source_files(root))
        self.includes, self.violations = [], []
        known = set(self.files)
        for file in self.files:
            with open(os.path.join(root, file), encoding="utf-8", errors="replace") as source:
                found = list(includes_of(source.read()))
            for line, mark, name in found:
                target = next((p for p in self.candidates(file, name) if p in known), None)
                if mark == "<":
                    if target is not None and not target.startswith(folder_of(file) + "/"):
                        self.wrong(file, line, f"<{name}> is a file of this project: write it in quotes")
                elif target is None:
                    self.wrong(file, line, f'"{name}" is neither under src/ nor under include/'
                               + self.hint(file, name, known))
                else:
                    self.includes.append(Include(file, line, target))

    @staticmethod
    def candidates(file, name):
        paths = [f"src/{name}", f"include/{name}"]
        # Programs have no folder of that kind: theirs may name a file beside them.
        if not file.startswith(("src/", "include/")):
            paths.append(os.path.normpath(os.path.join(os.path.dirname(file), name)).replace(os.sep, "/"))
        return paths

    @staticmethod
    def hint(file, name, known):
        beside = os.path.normpath(os.path.join(os.path.dirname(file), name)).replace(os.sep, "/")
        if beside not in known:
            return ""
        return f': write "{beside.split("/", 1)[1]}"'

    def wrong(self, file, line, why):
        self.violations.append((file, line, why))


def may_include_testing(tree):
    """Test files, and headers that only such files include."""
    users = collections.defaultdict(list)
    for i in tree.includes:
        users[i.target].append(i.file)
    allowed = {file: is_free(file) for file in tree.files}
    changed = True
    while changed:
        changed = False
        for file in tree.files:
            if not allowed[file] and file.endswith((".h", ".cuh")) and users[file] \
                    and all(allowed[user] for user in users[file]):
                allowed[file] = changed = True
    return allowed


def check_floors(tree):
    for folder in sorted({folder_of(file) for file in tree.files}):
        if folder != TESTING and floor_of(folder) is None:
            first = next(file for file in tree.files if folder_of(file) == folder)
            tree.wrong(first, 1, f"{folder}/ has no floor: give it one in the table of tools/include_graph.py")
    allowed = may_include_testing(tree)
    for i in tree.includes:
        why = judge(folder_of(i.file), folder_of(i.target), allowed[i.file])
        if why:
            tree.wrong(i.file, i.line, f"includes {i.target}: {why}")


def judge(here, there, testing_allowed):
    """Why a file of folder `here` may not include one of `there`; None if it may."""
    if here == there:
        return None
    if (here, there) in FORBIDDEN:
        return FORBIDDEN[here, there]
    if there == TESTING:
        return None if testing_allowed else "testing/ is for tests and benchmarks"
    ours, theirs = floor_of(here), floor_of(there)
    if here == TESTING:
        ours = TESTING_MAY_INCLUDE + 1
    if ours is None or theirs is None:
        return None  # reported once for the folder
    if theirs > ours:
        return f"up from floor {ours} ({here}/) to floor {theirs} ({there}/)"
    if theirs == ours:
        below = f"testing/ stands on floors 1 to {TESTING_MAY_INCLUDE}"
        return below if here == TESTING else f"{here}/ and {there}/ share floor {ours} and do not know each other"
    return None


def check_cycles(tree):
    """Files that include each other in a circle. Each circle is named once, at the include that closes it."""
    targets = collections.defaultdict(list)
    for i in tree.includes:
        targets[i.file].append(i)
    done = set()
    for start in tree.files:
        if start in done:
            continue
        path, on_path, stack = [start], {start}, [iter(targets[start])]
        while stack:
            step = next(stack[-1], None)
            if step is None:
                stack.pop()
                done.add(path[-1])
                on_path.discard(path.pop())
            elif step.target in on_path:
                circle = path[path.index(step.target):] + [step.target]
                tree.wrong(step.file, step.line, "closes a circle: " + " -> ".join(circle))
            elif step.target not in done:
                path.append(step.target)
                on_path.add(step.target)
                stack.append(iter(targets[step.target]))


def examine(root):
    tree = Tree(root)
    check_floors(tree)
    check_cycles(tree)
    tree.violations.sort()
    return tree


def graph_lines(tree):
    """One line a folder, the highest floor first: its size and what it includes, tests apart."""
    counts = collections.Counter(folder_of(file) for file in tree.files)
    allowed = may_include_testing(tree)
    product, tests = collections.defaultdict(set), collections.defaultdict(set)
    for i in tree.includes:
        here, there = folder_of(i.file), folder_of(i.target)
        if here != there:
            (tests if allowed[i.file] and here != TESTING else product)[here].add(there)

    def order(folder):
        return -(floor_of(folder) or 0), folder

    width = max(map(len, counts), default=0)
    previous = None
    for folder in sorted(counts, key=order):
        floor = "-" if floor_of(folder) is None else str(floor_of(folder))
        if previous not in (None, floor):
            yield ""
        name = floor if floor != previous else ""
        previous = floor
        arrows = " ".join(sorted(product[folder], key=order)) or "-"
        only_tests = sorted(tests[folder] - product[folder] - {folder}, key=order)
        line = f"  {name:>5}  {folder:<{width}}  {counts[folder]:>5}  {arrows}"
        yield line + (f"   (tests: {' '.join(only_tests)})" if only_tests else "")


def print_graph(tree):
    width = max(map(len, (folder_of(file) for file in tree.files)), default=6)
    print(f"  floor  {'folder':<{width}}  files  includes")
    print("\n".join(graph_lines(tree)))
    print()


def report(tree):
    for file, line, why in tree.violations:
        print(f"{file}:{line}: {why}")
    return 1 if tree.violations else 0


# Self-test: a sound tree, and what each addition to it must be answered with (file:line and words of the reason).
SOUND = {
    "src/base/check.h": "#pragma once\n#include <string>\n",
    "src/simd/vec.h": '#include "base/check.h"\n',
    "src/io/file.h": '#include "base/check.h"\n',
    "src/text/bpe.h": '#include "io/file.h"\n',
    "src/ops/kda/kda.h": '#include "base/check.h"\n',
    "src/ops/kda/kda.cc": '#include "ops/kda/kda.h"\n\n#include "simd/vec.h"\n',
    "src/ops/kda/kda_case.h": '#include "testing/compare.h"\n',  # a header for tests
    "src/ops/kda/kda_test.cc": '#include "ops/kda/kda_case.h"\n#include "testing/compare.h"\n',
    "src/ops/mla/mla.h": '#include "base/check.h"\n',
    "src/testing/compare.h": '#include "base/check.h"\n#include "io/file.h"\n',
    "src/model/forward.cc": '#include "ops/kda/kda.h"\n#include "ops/mla/mla.h"\n',
    "src/model/model.h": "",
    "src/engine/engine.h": '#include "model/model.h"\n',
    "src/train/trainer.h": '#include "model/model.h"\n',
    "include/kda/kda.h": "#include <stdint.h>\n",
    "apps/load.h": '#include "engine/engine.h"\n#include "text/bpe.h"\n',
    "apps/run.cc": '#include "load.h"\n#include "kda/kda.h"\n',
    "tests/whole_test.cc": '#include "testing/compare.h"\n#include "engine/engine.h"\n',
    "src/base/comments.h": '// #include "model/model.h"\n/* #include "model/model.h"\n#include "x.h" */\n',
}
CASES = {
    "an include up": (
        {"src/base/a.h": '\n#  include "simd/vec.h"\n'},
        ["src/base/a.h:2: includes src/simd/vec.h: up from floor 1 (base/) to floor 2 (simd/)"]),
    "an include up from a test": (
        {"src/ops/kda/b_test.cc": '#include "model/model.h"\n'},
        ["src/ops/kda/b_test.cc:1: includes src/model/model.h: up from floor 3 (ops/kda/) to floor 4 (model/)"]),
    "two operators": (
        {"src/ops/kda/b.cc": '#include "ops/mla/mla.h"\n'},
        ["src/ops/kda/b.cc:1: includes src/ops/mla/mla.h: ops/kda/ and ops/mla/ share floor 3"]),
    "io and simd": (
        {"src/io/b.cc": '#include "simd/vec.h"\n'}, ["src/io/b.cc:1: includes src/simd/vec.h: io/ and simd/ share"]),
    "engine and train": (
        {"src/engine/b.cc": '#include "train/trainer.h"\n'},
        ["src/engine/b.cc:1: includes src/train/trainer.h: engine/ and train/ share floor 5"]),
    "engine and text": (
        {"src/engine/b.cc": '// ids\n#include "text/bpe.h"\n'},
        ["src/engine/b.cc:2: includes src/text/bpe.h: engine/ maps ids to ids"]),
    "a header that is not there": (
        {"src/io/b.cc": '#include "io/nowhere.h"\n'}, ['src/io/b.cc:1: "io/nowhere.h" is neither under src/']),
    "a header named from its own folder": (
        {"src/io/b.cc": '#include "file.h"\n'}, ['src/io/b.cc:1: "file.h" is neither', 'write "io/file.h"']),
    "our own header in brackets": (
        {"src/io/b.cc": "#include <base/check.h>\n"}, ["src/io/b.cc:1: <base/check.h> is a file of this project"]),
    "a circle of two": (
        {"src/io/a.h": '#include "io/b.h"\n', "src/io/b.h": '\n\n#include "io/a.h"\n'},
        ["src/io/b.h:3: closes a circle: src/io/a.h -> src/io/b.h -> src/io/a.h"]),
    "a file that includes itself": (
        {"src/io/a.h": '#include "io/a.h"\n'}, ["src/io/a.h:1: closes a circle: src/io/a.h -> src/io/a.h"]),
    "testing in the product": (
        {"src/model/b.cc": '#include "testing/compare.h"\n'},
        ["src/model/b.cc:1: includes src/testing/compare.h: testing/ is for tests"]),
    "testing in a header that the product uses as well": (
        {"src/ops/kda/b.cc": '#include "ops/kda/kda_case.h"\n'},
        ["src/ops/kda/kda_case.h:1: includes src/testing/compare.h: testing/ is for tests"]),
    "testing on a floor too high": (
        {"src/testing/b.h": '#include "text/bpe.h"\n'},
        ["src/testing/b.h:1: includes src/text/bpe.h: testing/ stands on floors 1 to 2"]),
    "the C ABI and our headers": (
        {"include/kda/b.h": '#include "base/check.h"\n'},
        ["include/kda/b.h:1: includes src/base/check.h: up from floor 0"]),
    "a folder without a floor": (
        {"src/attic/b.cc": '#include "base/check.h"\n'}, ["src/attic/b.cc:1: attic/ has no floor"]),
}


def violations_of(files):
    with tempfile.TemporaryDirectory() as root:
        for path, text in files.items():
            os.makedirs(os.path.join(root, os.path.dirname(path)), exist_ok=True)
            with open(os.path.join(root, path), "w", encoding="utf-8") as file:
                file.write(text)
        tree = examine(root)
        graph = "\n".join(graph_lines(tree))
        return [f"{file}:{line}: {why}" for file, line, why in tree.violations], graph


def self_test():
    failures = []
    found, graph = violations_of(SOUND)
    failures += [f"the sound tree: unexpected {line}" for line in found]
    for words in ("4  model", "base   (tests: testing)", "engine text include"):
        if words not in graph:
            failures.append(f"the graph of the sound tree lacks '{words}':\n{graph}")
    for name, (files, expected) in CASES.items():
        found, _ = violations_of({**SOUND, **files})
        for words in expected:
            if not any(words in line for line in found):
                failures.append(f"{name}: expected '{words}', found {found}")
        if len(found) != 1:
            failures.append(f"{name}: expected one violation, found {found}")
    print("\n".join(failures) if failures else f"include graph: {len(CASES) + 1} trees judged as they should be")
    return 1 if failures else 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="print nothing but violations")
    parser.add_argument("--self-test", action="store_true", help="check this script")
    parser.add_argument("--root", default=os.path.dirname(os.path.dirname(os.path.abspath(__file__))),
                        help="the project (default: the one this script lies in)")
    options = parser.parse_args()
    if options.self_test:
        return self_test()
    tree = examine(options.root)
    if not options.check:
        print_graph(tree)
    status = report(tree)
    if not options.check and status == 0:
        print(f"{len(tree.files)} files, {len(tree.includes)} includes: every arrow points down.")
    return status


if __name__ == "__main__":
    sys.exit(main())

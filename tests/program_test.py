#!/usr/bin/env python3
"""The program from outside: what goes to stdout and stderr, exit codes, signals, and its answers on the shipped model.

usage: program_test.py PROGRAM [--gtest_brief=1] [--gtest_output=json:FILE]   (the report is in GoogleTest's form)
"""
import json
import math
import os
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import unittest

import gtest_report

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
DEMO = os.path.join(ROOT, "models", "demo")
GOLDEN = os.path.join(ROOT, "tests", "golden")
PROGRAM = None


def run(*arguments, stdin="", **extra):
    return subprocess.run([PROGRAM, *arguments], input=stdin, capture_output=True, text=True, timeout=300, **extra)


def golden():
    with open(os.path.join(GOLDEN, "demo_golden.json"), encoding="utf-8") as file:
        return json.load(file)


def read_safetensors(path):
    """name -> (shape, list of floats) of the F32 tensors of a file."""
    with open(path, "rb") as file:
        size = struct.unpack("<Q", file.read(8))[0]
        header = json.loads(file.read(size))
        data = file.read()
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            tensors[name] = (entry["shape"], struct.unpack(f"<{(end - begin) // 4}f", data[begin:end]))
    return tensors


def rel_rms(x, reference):
    error = sum((a - b) ** 2 for a, b in zip(x, reference))
    return (error / sum(b * b for b in reference)) ** 0.5


class Run(unittest.TestCase):
    def test_chat_answers_are_the_golden_ones(self):
        # The golden greedy ids end at the stop token, which run does not print.
        for name in ("define_gravity", "what_is_music", "codes"):
            case = golden()[name]
            user = case["prompt_text"].split("<|im_middle|>", 1)[1].split("<|im_end|>", 1)[0]
            result = run("run", "-m", DEMO, "--temp", "0", user)
            self.assertEqual(result.returncode, 0, result.stderr)
            self.assertEqual(result.stdout, case["text"].replace("<|im_end|>", "") + "\n", name)
            self.assertEqual(result.stderr, "")

    def test_raw_continuation_from_stdin(self):
        case = golden()["prose"]
        result = run("run", "-m", DEMO, "--raw", "--temp", "0", "-n", "48", stdin=case["prompt_text"])
        self.assertEqual((result.returncode, result.stderr), (0, ""))
        self.assertEqual(result.stdout, case["text"] + "\n")

    def test_ids_in_ids_out(self):
        case = golden()["one_token"]
        result = run("run", "-m", DEMO, "--ids", " ".join(map(str, case["ids"])), "--print-ids", "--temp", "0", "-n", "48")
        self.assertEqual(result.stdout.split(), [str(i) for i in case["greedy"]])

    def test_without_a_tokenizer_ids_still_work(self):
        case = golden()["one_token"]
        with tempfile.TemporaryDirectory() as folder:
            for name in os.listdir(DEMO):
                if "token" not in name and "tiktoken" not in name:
                    os.symlink(os.path.join(DEMO, name), os.path.join(folder, name))
            self.assertFalse(os.path.exists(os.path.join(folder, "tiktoken.model")))
            arguments = ["run", "-m", folder, "--ids", "7936", "--temp", "0", "-n", "4"]
            result = run(*arguments, "--print-ids")
            self.assertEqual(result.stdout.split(), [str(i) for i in case["greedy"][:4]], result.stderr)
            result = run(*arguments)
            self.assertEqual(result.returncode, 1)
            self.assertIn("no tokenizer", result.stderr)

    def test_seed_repeats_a_draw(self):
        arguments = ["run", "-m", DEMO, "--raw", "--temp", "1", "-n", "16", "--print-ids"]
        first = run(*arguments, "--seed", "7", "Once upon a time")
        again = run(*arguments, "--seed", "7", "Once upon a time")
        other = run(*arguments, "--seed", "8", "Once upon a time")
        self.assertEqual(first.stdout, again.stdout)
        self.assertNotEqual(first.stdout, other.stdout)
        self.assertEqual(len(first.stdout.split()), 16)

    def test_the_answer_does_not_depend_on_threads_or_batch(self):
        prompt = golden()["passkey"]["ids"][:300]
        answers = set()
        for flags in (["-t", "1"], ["-t", "3"], ["-b", "17"], ["-b", "64", "-t", "2"]):
            result = run("run", "-m", DEMO, "--ids", " ".join(map(str, prompt)), "--print-ids", "--temp", "0", "-n", "24", *flags)
            answers.add(result.stdout)
        self.assertEqual(len(answers), 1, answers)

    def test_pinned_threads(self):
        prompt = ["--ids", " ".join(map(str, golden()["prose"]["ids"])), "--print-ids", "--temp", "0", "-n", "8"]
        free, pinned = run("run", "-m", DEMO, *prompt), run("run", "-m", DEMO, "--pin", *prompt)
        self.assertEqual((pinned.stdout, pinned.stderr), (free.stdout, ""))
        one = str(sorted(os.sched_getaffinity(0))[-1])
        refused = run("run", "-m", DEMO, "--pin", "-t", "2", *prompt, preexec_fn=lambda: os.sched_setaffinity(0, {int(one)}))
        self.assertEqual((refused.returncode, refused.stdout), (1, ""))
        self.assertIn("2 threads, found 1", refused.stderr)

        # From outside: while it runs, each thread may use one processor, no two the same.
        processors = sorted(os.sched_getaffinity(0))
        process = subprocess.Popen([PROGRAM, "run", "-m", DEMO, "--pin", "--raw", "--ignore-eos", "-c", "60000", "--temp", "1", "x"],
                                   stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)
        process.stdout.read(20)  # it is talking
        tasks = [int(task) for task in os.listdir(f"/proc/{process.pid}/task")]
        seen = {task: set() for task in tasks}
        for _ in range(200):  # the main thread is free between two tokens
            for task in tasks:
                seen[task].add(tuple(sorted(os.sched_getaffinity(task))))
            time.sleep(0.001)
        process.kill()
        process.wait()
        process.stdout.close()
        self.assertEqual(len(tasks), len(processors))
        self.assertIn((processors[0],), seen.pop(process.pid))
        self.assertEqual(sorted(map(sorted, seen.values())), [[(p,)] for p in processors[1:]])

    def test_model_of_the_hugging_face_cache(self):
        with tempfile.TemporaryDirectory() as hub:
            repository = os.path.join(hub, "models--someone--tiny")
            snapshot = os.path.join(repository, "snapshots", "0123abc")
            os.makedirs(os.path.join(repository, "refs"))
            os.makedirs(os.path.dirname(snapshot))
            os.symlink(DEMO, snapshot)
            with open(os.path.join(repository, "refs", "main"), "w", encoding="utf-8") as file:
                file.write("0123abc")
            environment = dict(os.environ, HF_HUB_CACHE=hub)
            result = run("tokenize", "-m", "someone/tiny", "--count", "Hello", env=environment)
            self.assertEqual(result.returncode, 0, result.stderr)
            result = run("tokenize", "-m", "someone/other", "--count", "Hello", env=environment)
            self.assertEqual(result.returncode, 1)
            self.assertIn("someone/other", result.stderr)


class Sessions(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.path = os.path.join(folder.name, "a.session")
        self.start = ["run", "-m", DEMO, "--temp", "0", "--print-ids"]

    def test_another_process_goes_on_with_the_same_tokens(self):
        prompt = ["--ids", " ".join(map(str, golden()["prose"]["ids"]))]
        whole = run(*self.start, *prompt, "-n", "24").stdout.split()
        self.assertEqual(len(whole), 24)
        for cut in (0, 1, 9):
            first = run(*self.start, *prompt, "-n", str(cut), "--save-session", self.path)
            self.assertEqual((first.returncode, first.stderr), (0, ""))
            rest = run(*self.start, "--session", self.path, "-n", str(24 - cut), "-t", "1", "-c", "4096")
            self.assertEqual(first.stdout.split() + rest.stdout.split(), whole, rest.stderr)
        # Going on leaves the file as it is; saving again moves it forward.
        run(*self.start, "--session", self.path, "-n", "5", "--save-session", self.path)
        rest = run(*self.start, "--session", self.path, "-n", "10")
        self.assertEqual(rest.stdout.split(), whole[14:])

    def test_draws_go_on_with_the_same_seed(self):
        flags = ["run", "-m", DEMO, "--print-ids", "--ignore-eos", "--temp", "1", "--top-p", "0.9", "--repeat-penalty", "1.1",
                 "--frequency-penalty", "0.05"]
        prompt = ["--raw", "Once upon a time"]
        whole = run(*flags, "--seed", "7", *prompt, "-n", "200").stdout.split()
        self.assertEqual(len(whole), 200)
        first = run(*flags, "--seed", "7", *prompt, "-n", "100", "--save-session", self.path)
        self.assertEqual(first.stdout.split(), whole[:100], first.stderr)
        rest = run(*flags, "--seed", "7", "--session", self.path, "-n", "60", "--save-session", self.path)
        self.assertEqual(rest.stdout.split(), whole[100:160], rest.stderr)
        last = run(*flags, "--seed", "7", "--session", self.path, "-n", "40")  # from a file of a file
        self.assertEqual(last.stdout.split(), whole[160:], last.stderr)
        other = run(*flags, "--seed", "8", "--session", self.path, "-n", "40")
        self.assertEqual((other.returncode, len(other.stdout.split())), (0, 40))
        self.assertNotEqual(other.stdout.split(), whole[160:])

    def test_chat_saves_and_loads(self):
        chat = ["chat", "-m", DEMO, "--temp", "0.8", "--seed", "3", "-n", "40"]
        whole = run(*chat, stdin="What does music mean?\nAnd gravity?\n")
        first = run(*chat, stdin=f"/save {self.path}\nWhat does music mean?\n/save {self.path}\n")
        second = run(*chat, stdin=f"Hello\n/load {self.path}\nAnd gravity?\n/save\n/load {self.path}.none\nAnd now?\n")
        self.assertEqual((first.returncode, second.returncode), (0, 0))
        self.assertIn("nothing was said", first.stderr)
        hello = run(*chat, stdin="Hello\n").stdout
        self.assertTrue(second.stdout.startswith(hello))
        again = second.stdout[len(hello):]
        self.assertTrue((first.stdout + again).startswith(whole.stdout), (first.stdout, again, whole.stdout))
        # What failed has changed nothing: the conversation goes on.
        self.assertIn("expected the name of a file", second.stderr)
        self.assertIn(self.path + ".none", second.stderr)
        third = run(*chat, stdin="What does music mean?\nAnd gravity?\nAnd now?\n")
        self.assertEqual(first.stdout + again, third.stdout)
        # run goes on from it too, and chat from a file of run.
        self.assertEqual(run("run", "-m", DEMO, "--session", self.path, "--temp", "0", "-n", "4", "x").returncode, 0)

    def test_a_conversation_goes_on(self):
        say = ["run", "-m", DEMO, "--temp", "0"]
        first = run(*say, "--save-session", self.path, "What does music mean?")
        second = run(*say, "--session", self.path, "And gravity?")
        self.assertEqual((second.returncode, second.stderr), (0, ""))
        chat = run("chat", "-m", DEMO, "--temp", "0", stdin="What does music mean?\nAnd gravity?\n")
        self.assertEqual(first.stdout + second.stdout, chat.stdout)
        self.assertEqual(run(*say, "--session", self.path, "--system", "x", "y").returncode, 1)

    def test_what_is_wrong_with_a_file_is_said(self):
        run(*self.start, "--ids", "1 2 3 4 5", "-n", "0", "--save-session", self.path)
        with open(self.path, "rb") as file:
            good = file.read()
        self.assertEqual([name for name in os.listdir(os.path.dirname(self.path))], ["a.session"])

        def refused(content, message, *flags):
            with open(self.path, "wb") as file:
                file.write(content)
            result = run(*self.start, "--session", self.path, "-n", "1", *flags)
            self.assertEqual((result.returncode, result.stdout), (1, ""), result.stderr)
            self.assertIn(message, result.stderr)
            self.assertIn(self.path, result.stderr)

        refused(good[:-1], "cut")
        refused(good[:100], "cut")
        refused(b"", "not a session file")
        refused(b"x" * 1000, "not a session file")
        refused(good[:8] + b"\x07" + good[9:], "version 7, expected 2")
        refused(good[:8] + b"\x01" + good[9:], "version 1, expected 2")
        refused(good[:1000] + bytes([good[1000] ^ 1]) + good[1001:], "checksum")
        refused(good, "16", "--cache-type", "bf16")
        refused(good, "context", "-c", "4")
        refused(good, "another model", "--hf-compat-router")
        self.assertEqual(run(*self.start, "--session", self.path, "-n", "1").returncode, 0)

    def test_a_session_that_cannot_be_written_is_an_error(self):
        result = run(*self.start, "--ids", "1", "-n", "1", "--save-session", "/no/such/folder/x")
        self.assertEqual(result.returncode, 1)
        self.assertIn("/no/such/folder/x", result.stderr)


class Synth(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = folder.name

    def synth(self, name, *flags):
        path = os.path.join(self.folder, name)
        return path, run("synth", "-o", path, "--like", "demo", *flags)

    def test_a_checkpoint_of_the_shape_of_the_demo(self):
        path, result = self.synth("a")
        self.assertEqual((result.returncode, result.stderr), (0, ""))
        self.assertIn("14527044 parameters", result.stdout)
        out = run("run", "-m", path, "--ids", "1 2 3", "--print-ids", "-n", "3", "--temp", "0", "--ignore-eos")
        self.assertEqual(len(out.stdout.split()), 3, out.stderr)

    def test_the_seed_decides_and_threads_do_not(self):
        content = []
        for i, flags in enumerate((["-t", "1"], ["-t", "3"], ["--seed", "2"])):
            path, _ = self.synth(str(i), *flags)
            with open(os.path.join(path, "model.safetensors"), "rb") as file:
                content.append(file.read())
        self.assertEqual(content[0], content[1])
        self.assertNotEqual(content[0], content[2])

    def test_every_field_by_flag(self):
        path, result = self.synth(
            "a", "--layers", "5", "--hidden-size", "64", "--vocab-size", "500", "--mla-layers", "2,5", "--mla-heads", "3", "--kda-heads", "1",
            "--kda-head-dim", "16", "--experts", "6", "--top-k", "3", "--shared-experts", "2", "--moe-intermediate-size", "24", "--kv-lora-rank", "20",
            "--qk-nope-head-dim", "12", "--qk-rope-head-dim", "4", "--v-head-dim", "10", "--first-k-dense-replace", "2", "--moe-renormalize", "false",
            "--tie-word-embeddings", "true", "--short-conv-kernel-size", "3", "--dtype", "f32", "--shard-size", "0.0002", "--model-max-length", "777",
            "--num-expert-group", "2", "--moe-router-activation-func", "softmax")
        self.assertEqual((result.returncode, result.stderr), (0, ""))
        with open(os.path.join(path, "config.json"), encoding="utf-8") as file:
            config = json.load(file)
        self.assertEqual((config["hidden_size"], config["num_hidden_layers"], config["moe_renormalize"]), (64, 5, False))
        out = run("inspect", "-m", path, "--tensors").stdout
        for line in ("5: 3 KDA, 2 MLA  KMKKM", "3 of 6 of width 24, 2 shared, softmax", "tied", "777 tokens", "model.layers.4.self_attn.kv_b_proj.weight  F32 [66, 20]"):
            self.assertIn(line, out)
        self.assertNotIn("files                 1\n", out)

    def test_the_tokenizer_of_another_checkpoint(self):
        path, result = self.synth("a", "--tokenizer-from", DEMO)
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertEqual(run("tokenize", "-m", path, "--count", "Hello").returncode, 0)
        _, result = self.synth("b", "--tokenizer-from", DEMO, "--vocab-size", "100")
        self.assertEqual(result.returncode, 1)
        self.assertFalse(os.path.exists(os.path.join(self.folder, "b")))

    def test_what_cannot_be_is_refused(self):
        for flags, message in ((["--top-k", "9"], "num_experts_per_token"), (["--layers", "0"], "num_hidden_layers"), (["--mla-layers", "9"], "mla-layers")):
            path, result = self.synth("a", *flags)
            self.assertEqual((result.returncode, result.stdout), (1, ""))
            self.assertIn(message, result.stderr)
            self.assertFalse(os.path.exists(path))
        path, _ = self.synth("b")
        _, again = self.synth("b")
        self.assertEqual(again.returncode, 1)
        self.assertIn("empty", again.stderr)

    def test_ctrl_c_leaves_nothing(self):
        path = os.path.join(self.folder, "a")
        process = subprocess.Popen([PROGRAM, "synth", "-o", path, "--like", "48b", "--layers", "4", "--experts", "64"], stderr=subprocess.PIPE)
        while not (os.path.isdir(path) and os.listdir(path)) and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        self.assertEqual(process.wait(timeout=60), 1)
        self.assertIn(b"interrupted", process.stderr.read())
        process.stderr.close()
        self.assertEqual(os.listdir(path), [])


class Verify(unittest.TestCase):
    def test_the_demo_keeps_every_promise(self):
        for flags in ([], ["--cache-type", "bf16", "-t", "3"]):
            result = run("verify", "-m", DEMO, "-n", "100", "--steps", "3", *flags)
            self.assertEqual((result.returncode, result.stderr), (0, ""), result.stdout)
            verdicts = result.stdout.split("\n")[1:-1]
            self.assertEqual([v.split("  ")[0] for v in verdicts], ["ok"] * 5)
            for promise in ("warm = cold", "chunked = whole", "batched = alone", "saved = kept", "threads = one"):
                self.assertIn(promise, result.stdout)

    def test_a_promise_that_is_not_kept_is_exit_code_1(self):
        result = run("verify", "-m", DEMO, "-n", "100", "--steps", "3", "--tolerance", "1e-12")
        self.assertEqual(result.returncode, 1)
        self.assertEqual(result.stdout.count("FAIL"), 1)


class Bench(unittest.TestCase):
    """What the tables say, not how fast anything is."""

    def test_a_row_for_every_test(self):
        result = run("bench", "-m", DEMO, "-p", "16,40", "-n", "3", "-d", "0,20", "-t", "1,2", "--pg", "8,2", "-r", "2")
        self.assertEqual((result.returncode, result.stderr), (0, ""))
        rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in result.stdout.split("\n") if line.startswith("|")]
        self.assertEqual(rows[0], ["model", "size", "params", "backend", "threads", "test", "t/s", "% roofline"])
        tests = ["pp16", "pp40", "tg3", "pp8+tg2"]
        self.assertEqual([row[5] for row in rows[2:]], (tests + [t + " @ d20" for t in tests]) * 2)
        self.assertEqual([row[4] for row in rows[2:]], ["1"] * 8 + ["2"] * 8)
        self.assertTrue(all(" \u00b1 " in row[6] for row in rows[2:]))
        self.assertIn("roofline of 2 threads", result.stdout)

    def test_json_and_csv_say_the_same(self):
        flags = ["-m", DEMO, "-p", "16", "-n", "2", "-r", "3", "--np", "2", "--isa", "generic"]
        rows = json.loads(run("bench", *flags, "-o", "json").stdout)
        self.assertEqual([row["test"] for row in rows], ["pp16 x 2", "tg2 x 2"])
        for row in rows:
            self.assertEqual(len(row["samples_ts"]), 3)
            self.assertAlmostEqual(row["avg_ts"], sum(row["samples_ts"]) / 3, delta=1e-6 * row["avg_ts"])
            self.assertEqual((row["size"], row["params"], row["backend"]), (29057296, 14527044, "CPU generic"))
            self.assertGreater(row["roofline_percent"], 0)
        table = run("bench", *flags, "-o", "csv").stdout.split("\n")
        self.assertEqual(table[0].split(","), list(rows[0]))
        self.assertEqual(len(table), 4)

    def test_operators(self):
        rows = json.loads(run("bench", "ops", "-m", DEMO, "--seconds", "0", "-o", "json").stdout)
        for name in ("linear kda.q_proj", "kda_prefill", "kda_decode", "mla_prefill", "mla_decode", "moe_experts", "short_conv"):
            self.assertIn(name, [row["operator"] for row in rows])
        for row in rows:
            self.assertGreater(row["median us"], 0)
            self.assertGreater(row["GB/s"], 0)
        only = json.loads(run("bench", "ops", "-m", DEMO, "--seconds", "0", "-o", "json", "--only", "short_conv").stdout)
        self.assertEqual({row["operator"] for row in only}, {"short_conv"})
        for precision, said in (("exact", ", 1 thread"), ("bf16", " bf16, 1 thread")):
            table = run("bench", "ops", "-m", DEMO, "--seconds", "0", "--only", "short_conv", "-t", "1", "--precision", precision).stdout
            self.assertRegex(table, r"CPU [a-z0-9_]+" + said)
        self.assertEqual(run("bench", "ops", "-m", DEMO, "--only", "nothing of that name", "-o", "json").stdout, "[]\n")

    def test_wrong_numbers_are_refused(self):
        for flags, code in ((["-p", "0", "-n", "0"], 1), (["--pg", "5"], 1), (["--isa", "mmx"], 1), (["-p", "x"], 2), (["-r", "0"], 2), (["-o", "xml"], 2)):
            self.assertEqual(run("bench", "-m", DEMO, *flags).returncode, code, flags)
        self.assertEqual(run("bench", "-p", "5").returncode, 2)
        self.assertEqual(run("bench", "ops").returncode, 2)


class Eval(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = folder.name

    def nll_of(self, ids):
        """-log p of every token but the first, from the logits command."""
        path = os.path.join(self.folder, "logits.safetensors")
        run("logits", "-m", DEMO, "--ids", " ".join(map(str, ids)), "-o", path)
        rows = read_safetensors(path)["logits"][1]
        nll = []
        for t, token in enumerate(ids[1:]):
            row = rows[t * 8192:(t + 1) * 8192]
            largest = max(row)
            nll.append(largest + math.log(sum(math.exp(x - largest) for x in row)) - row[token])
        return nll

    def test_perplexity_is_that_of_the_logits(self):
        ids = golden()["prose_65"]["ids"][:41]
        path = os.path.join(self.folder, "ids.txt")
        with open(path, "w", encoding="utf-8") as file:
            file.write(" ".join(map(str, ids)))
        first, second, third = self.nll_of(ids[:20]), self.nll_of(ids[8:28]), self.nll_of(ids[16:36])
        last = self.nll_of(ids[24:])
        windows = first + second[11:] + third[11:] + last[11:]
        for flags, expected in ((["-c", "64"], self.nll_of(ids)), (["-c", "20", "--stride", "8"], windows), (["-c", "20", "--stride", "8", "-b", "3"], windows)):
            result = run("eval", "ppl", "-m", DEMO, path, "--ids", "-o", "json", *flags)
            self.assertEqual((result.returncode, result.stderr), (0, ""))
            row = json.loads(result.stdout)[0]
            self.assertEqual(row["tokens"], 40)
            mean = sum(expected) / 40
            self.assertAlmostEqual(row["nll"], mean, places=4)
            self.assertAlmostEqual(row["perplexity"], math.exp(mean), delta=1e-3 * math.exp(mean))
            error = (sum((x - mean) ** 2 for x in expected) / 39 / 40) ** 0.5
            self.assertAlmostEqual(row["standard error"], math.exp(mean) * error, delta=1e-3 * math.exp(mean) * error)

    def test_perplexity_of_a_text(self):
        path = os.path.join(self.folder, "text.txt")
        with open(path, "w", encoding="utf-8") as file:
            file.write(golden()["prose"]["prompt_text"])
        row = json.loads(run("eval", "ppl", "-m", DEMO, "-f", path, "-o", "json").stdout)[0]
        bits = row["nll"] * row["tokens"] / math.log(2)
        self.assertLess(row["bits per byte"], 8)
        self.assertGreater(bits / row["bits per byte"], 0.9 * os.path.getsize(path) - 12)
        for flags, code in ((["-c", "20", "--stride", "20"], 1), (["--ids"], 1), (["-c", "1"], 2)):
            self.assertEqual(run("eval", "ppl", "-m", DEMO, path, *flags).returncode, code)
        self.assertEqual(run("eval", "ppl", "-m", DEMO, "/no/such/file").returncode, 1)

    def test_needles_stand_where_they_should(self):
        result = run("eval", "needle", "-m", DEMO, "-l", "100,200", "--depths", "0,100", "-r", "2", "-n", "8", "-v", "-o", "json")
        self.assertEqual(result.returncode, 0, result.stderr)
        rows = json.loads(result.stdout)
        self.assertEqual([row["context"] for row in rows], [100, 200])
        trials = re.findall(r"^(\d+) tokens, key (\d{5}) at (0|100) %: \"(.*)\"$", result.stderr, re.M)
        self.assertEqual(len(trials), 8)
        self.assertEqual(len({key for _, key, _, _ in trials}), 8)
        for i, (tokens, key, _, answer) in enumerate(trials):
            length = 100 if i < 4 else 200
            self.assertLessEqual(int(tokens), length)
            self.assertGreater(int(tokens), length - 40)  # no sentence more would fit
        self.assertEqual(sum(row["found"] for row in rows), sum(key in answer for _, key, _, answer in trials))
        again = run("eval", "needle", "-m", DEMO, "-l", "100,200", "--depths", "0,100", "-r", "2", "-n", "8", "-v", "-o", "json")
        self.assertEqual((again.stdout, again.stderr), (result.stdout, result.stderr))
        self.assertEqual(run("eval", "needle", "-m", DEMO, "-l", "20").returncode, 1)  # not even the question

    def test_claims_of_the_paper(self):
        result = run("eval", "claims", "-o", "json")
        self.assertEqual((result.returncode, result.stderr), (0, ""))
        rows = json.loads(result.stdout)
        self.assertEqual({row["id"] for row in rows}, {"R1", "R2", "R3", "R9", "R18"})
        self.assertEqual({row["verdict"] for row in rows}, {"ok"})

    def test_usage(self):
        for arguments in (["eval"], ["eval", "ppl", "x"], ["eval", "needle"], ["eval", "nonsense"], ["eval", "claims", "-t", "0"]):
            self.assertEqual(run(*arguments).returncode, 2, arguments)


class Errors(unittest.TestCase):
    def test_usage_errors_exit_with_2(self):
        for arguments in ([], ["nonsense"], ["run"], ["run", "-m", DEMO, "--no-such-flag", "x"], ["run", "-m", DEMO, "-t", "x", "y"],
                          ["logits", "-m", DEMO, "--ids", "1"], ["run", "-m", DEMO, "--cache-type", "f16", "x"]):
            result = run(*arguments)
            self.assertEqual(result.returncode, 2, arguments)
            self.assertEqual(result.stdout, "", arguments)
            self.assertNotEqual(result.stderr, "", arguments)

    def test_runtime_errors_exit_with_1_and_say_why(self):
        cases = [
            (["run", "-m", "/no/such/place", "x"], "/no/such/place"),
            (["run", "-m", DEMO, "--ids", "1 2 x"], "expected integers"),
            (["run", "-m", DEMO, "--ids", "8192"], "8192"),
            (["run", "-m", DEMO, "--ids", "-1"], "-1"),
            (["run", "-m", DEMO, "--temp", "-1", "x"], "temperature"),
            (["run", "-m", DEMO, "--top-p", "nan", "x"], "top_p"),
            (["run", "-m", DEMO, "-c", "4", "a prompt that is longer than four tokens"], "context"),
            (["run", "-m", DEMO, ""], None),
            (["detokenize", "-m", DEMO, "999999"], "999999"),
            (["logits", "-m", DEMO, "--ids", "1 2", "-o", "/no/such/folder/x.safetensors"], "/no/such/folder"),
        ]
        for arguments, message in cases:
            result = run(*arguments)
            if message is None:
                self.assertIn(result.returncode, (0, 1), arguments)
                continue
            self.assertEqual(result.returncode, 1, (arguments, result.stderr))
            self.assertIn(message, result.stderr)
            self.assertEqual(result.stdout, "")

    def test_broken_checkpoints_are_refused(self):
        with tempfile.TemporaryDirectory() as folder:
            model = os.path.join(folder, "model")
            shutil.copytree(DEMO, model)
            shard = os.path.join(model, "model-00002-of-00003.safetensors")
            os.truncate(shard, os.path.getsize(shard) - 1000)
            result = run("run", "-m", model, "--raw", "x")
            self.assertEqual(result.returncode, 1)
            self.assertIn("model-00002-of-00003.safetensors", result.stderr)
            os.remove(shard)
            result = run("inspect", "-m", model)
            self.assertEqual(result.returncode, 1)
            self.assertIn("model-00002-of-00003.safetensors", result.stderr)

    def test_closed_stdout_is_an_orderly_end(self):
        reader, writer = os.pipe()
        os.close(reader)
        process = subprocess.run([PROGRAM, "run", "-m", DEMO, "--raw", "-n", "5", "x"], stdout=writer, stderr=subprocess.PIPE,
                                 text=True, timeout=300)
        os.close(writer)
        self.assertEqual(process.returncode, 1)
        self.assertIn("standard output", process.stderr)

    def test_signals_end_it_in_order(self):
        for number in (signal.SIGINT, signal.SIGTERM):
            process = subprocess.Popen([PROGRAM, "run", "-m", DEMO, "--raw", "--ignore-eos", "-c", "60000", "--temp", "1", "x"],
                                       stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL)
            process.stdout.read(20)  # it is talking
            process.send_signal(number)
            process.stdout.read()
            self.assertEqual(process.wait(timeout=60), 0)
            process.stdout.close()
            process.stderr.close()


class Tokens(unittest.TestCase):
    def test_round_trip(self):
        text = "It is a truth, \u00e9t\u00e9 \u4e2d\u6587 <|im_end|>!\n"
        ids = run("tokenize", "-m", DEMO, stdin=text).stdout
        self.assertEqual(run("detokenize", "-m", DEMO, stdin=ids).stdout, text + "\n")
        self.assertNotIn("7938", ids.split())
        self.assertIn("7938", run("tokenize", "-m", DEMO, "--parse-special", stdin=text).stdout.split())
        self.assertEqual(run("tokenize", "-m", DEMO, "--count", stdin=text).stdout, f"{len(ids.split())}\n")


class Inspect(unittest.TestCase):
    def test_numbers_of_the_demo(self):
        out = run("inspect", "-m", DEMO, "--tensors").stdout
        self.assertIn("14527044", out)
        self.assertIn("8: 6 KDA, 2 MLA  KKKMKKKM", out)
        self.assertRegex(out, r"a pass +[0-9.]+ MB  \(512 tokens at a time, [0-9]+ threads?\)")
        self.assertIn("model.layers.7.self_attn.kv_b_proj.weight  BF16 [512, 512]", out)


class Logits(unittest.TestCase):
    def test_file_matches_the_golden_one(self):
        case = golden()["prose_65"]
        reference = read_safetensors(os.path.join(GOLDEN, "demo_golden.safetensors"))
        with tempfile.TemporaryDirectory() as folder:
            path, ids = os.path.join(folder, "out.safetensors"), os.path.join(folder, "ids.txt")
            with open(ids, "w", encoding="utf-8") as file:
                file.write("\n".join(map(str, case["ids"])))
            result = run("logits", "-m", DEMO, "--ids-file", ids, "--hidden", "-o", path, "-b", "30")
            self.assertEqual((result.returncode, result.stdout), (0, ""), result.stderr)
            ours = read_safetensors(path)
        self.assertEqual(sorted(ours), sorted(["logits"] + [f"hidden.{i}" for i in range(9)]))
        shape, values = ours["logits"]
        self.assertEqual(shape, [65, 8192])
        kept = [v for row in case["positions"] for v in values[row * 8192:(row + 1) * 8192]]
        self.assertLess(rel_rms(kept, reference["prose_65.logits"][1]), 2e-5)
        for i in range(9):
            self.assertLess(rel_rms(ours[f"hidden.{i}"][1], reference[f"prose_65.hidden.{i}"][1]), 2e-5, i)


class Chat(unittest.TestCase):
    def test_plain_input(self):
        case = golden()["what_is_music"]
        lines = "/help\nWhat does music mean?\n/reset\n\"\"\"What does music\n mean?\"\"\"\n/nonsense\nWhat does music \\\nmean?\n/quit\nnot read\n"
        result = run("chat", "-m", DEMO, "--temp", "0", stdin=lines)
        self.assertEqual(result.returncode, 0, result.stderr)
        answers = result.stdout.split("\n")
        self.assertEqual(answers[0], case["text"].replace("<|im_end|>", ""))
        self.assertGreaterEqual(len(answers), 3)
        self.assertIn("/system TEXT", result.stderr)
        self.assertIn("/nonsense", result.stderr)

    def test_terminal_ctrl_c_stops_the_answer_only(self):
        try:
            pid, terminal = pty.fork()
        except OSError as error:  # a bare chroot has no /dev/pts
            self.skipTest(f"no pseudo-terminal here: {error}")
        if pid == 0:
            os.environ["HOME"] = os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp()
            os.environ["TERM"] = "xterm"
            os.execv(PROGRAM, [PROGRAM, "chat", "-m", DEMO, "--temp", "1", "--seed", "1", "--ignore-eos"])
        seen = b""

        def wait_for(text, seconds=60):
            nonlocal seen
            end = time.time() + seconds
            while text not in seen:
                self.assertLess(time.time(), end, seen)
                if select.select([terminal], [], [], 1)[0]:
                    seen += os.read(terminal, 65536)
            seen = seen[seen.index(text) + len(text):]

        wait_for(b"> ")
        os.write(terminal, "Tell me everything, \u00e9l\u00e8ve \u2026 please.\r".encode())
        wait_for("\u00e9l\u00e8ve \u2026 please.".encode())
        time.sleep(0.5)  # it never stops by itself (--ignore-eos)
        os.write(terminal, b"\x03")
        wait_for(b"(stopped)")
        wait_for(b"> ")
        os.write(terminal, b"\x03")  # at the prompt: a hint
        wait_for(b"Ctrl-D")
        wait_for(b"> ")
        os.write(terminal, b"/quit\r")
        end = time.time() + 30
        while True:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                break
            self.assertLess(time.time(), end)
            time.sleep(0.05)
        os.close(terminal)
        self.assertEqual(os.waitstatus_to_exitcode(status), 0)


def main():
    global PROGRAM
    PROGRAM = os.path.abspath(gtest_report.arguments()[0])
    return gtest_report.run(sys.modules[__name__])


if __name__ == "__main__":
    sys.exit(main())

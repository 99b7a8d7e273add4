#!/usr/bin/env python3
"""libkda from outside: golden vectors and mistakes through the shared library (ctypes), what it exports, and the installed
package used from C in the three ways that C programs find libraries.

usage: libkda_test.py BUILD_FOLDER [--gtest_brief=1] [--gtest_output=json:FILE]   (the report is in GoogleTest's form)
Needs Python's standard library, cc, c++, cmake and pkg-config.
"""
import array
import ctypes
import json
import math
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
import unittest

import gtest_report

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
GOLDEN = os.path.join(ROOT, "tests", "golden", "kda_golden")
HEADER = os.path.join(ROOT, "include", "kda", "kda.h")
EXAMPLE = os.path.join(ROOT, "examples", "kda_prefill.c")
BUILD = None  # the build folder
KDA = None  # the library, loaded

# ---- include/kda/kda.h in ctypes ----

OK, REFUSED, NO_MEMORY, INTERNAL = range(4)
CPU, CUDA = range(2)
F32, BF16, I32, I64 = range(4)
LOG_DECAY, SOFTPLUS, BOUNDED = range(3)
VALUE, SIGMOID, SIGMOID2 = range(3)


class Tensor(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("dtype", ctypes.c_int32), ("rank", ctypes.c_int32),
                ("shape", ctypes.c_int64 * 4), ("stride", ctypes.c_int64 * 4)]


def read_header():
    with open(HEADER, encoding="utf-8") as file:
        return file.read()


def fields_of_args():
    """kda_args as the header declares it, so that minor versions need no change here."""
    types = {"uint32_t": ctypes.c_uint32, "int32_t": ctypes.c_int32, "uint64_t": ctypes.c_uint64, "float": ctypes.c_float,
             "void*": ctypes.c_void_p, "kda_tensor": Tensor}
    body = re.search(r"typedef struct kda_args \{(.*?)\} kda_args;", re.sub(r"/\*.*?\*/", "", read_header(), flags=re.S), re.S).group(1)
    fields = []
    for declaration in body.split(";")[:-1]:
        kind, names = declaration.strip().split(None, 1)
        fields += [(name.strip(), types[kind]) for name in names.split(",")]
    return fields


class Args(ctypes.Structure):
    _fields_ = fields_of_args()


# Where the structs of earlier versions end: before `workspace`, then with 1.0.
OLDEST, SIZE_1_0 = Args.workspace.offset, Args.workspace_bytes.offset + 8
MAJOR, MINOR = (int(re.search(rf"#define KDA_ABI_{part} (\d+)", read_header()).group(1)) for part in ("MAJOR", "MINOR"))


def load():
    library = ctypes.CDLL(os.path.join(BUILD, "libkda.so"))
    library.kda_abi_version.restype = ctypes.c_uint32
    library.kda_last_error.restype = ctypes.c_char_p
    library.kda_args_init.argtypes, library.kda_args_init.restype = [ctypes.c_void_p, ctypes.c_size_t], None
    for name in ("kda_prefill", "kda_decode"):
        getattr(library, name).argtypes = [ctypes.c_void_p]
    library.kda_workspace_bytes.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    return library


def last_error():
    return KDA.kda_last_error().decode()


def contiguous(shape):
    strides, step = [], 1
    for size in reversed(shape):
        strides.insert(0, step)
        step *= size
    return strides


def view(values, shape, stride=None, offset=0):
    """A tensor over an array ('f': f32, 'H': bf16, 'i': i32, 'q': i64), which has to stay alive; offset in elements."""
    address, _ = values.buffer_info()
    t = Tensor(address + offset * values.itemsize, {"f": F32, "H": BF16, "i": I32, "q": I64}[values.typecode], len(shape))
    stride = contiguous(shape) if stride is None else stride
    last = offset + sum((size - 1) * step for size, step in zip(shape, stride))
    assert 0 in shape or last < len(values), "the test's own mistake"
    for i, size in enumerate(shape):
        t.shape[i], t.stride[i] = size, stride[i]
    return t


def floats(count, value):
    return array.array("f", [value]) * count


def ints(*values):
    return array.array("i", values)


def rel_rms(x, reference):
    assert len(x) == len(reference)
    return math.sqrt(math.fsum((a - b) ** 2 for a, b in zip(x, reference)) / math.fsum(b * b for b in reference))


def read_safetensors(path):
    """name -> array of the F32 tensors of a file."""
    with open(path, "rb") as file:
        size = struct.unpack("<Q", file.read(8))[0]
        header = json.loads(file.read(size))
        data = file.read()
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__":
            assert entry["dtype"] == "F32"
            begin, end = entry["data_offsets"]
            tensors[name] = array.array("f", data[begin:end])
    return tensors


class Problem:
    """A golden case as a call: sequences one after the other, the state of sequence b in slot b + 1 of a pool that has a slot
    more on either side."""

    tensors, cases = None, None

    @classmethod
    def names(cls):
        if cls.cases is None:
            cls.tensors = read_safetensors(GOLDEN + ".safetensors")
            with open(GOLDEN + ".json", encoding="utf-8") as file:
                cls.cases = json.load(file)
        return list(cls.cases)

    def __init__(self, name):
        self.names()
        case = self.cases[name]
        self.B, self.T, self.H, self.K, self.V = (case[key] for key in ("B", "T_", "H", "K", "Vd"))
        self.lower_bound, self.two = case["lb"], case.get("two", False)
        get = lambda field: self.tensors[f"{name}.{field}"]
        self.q, self.k, self.v, self.z, self.beta = (get(field) for field in ("q", "k", "v", "z", "beta_logit"))
        self.A_log, self.dt_bias = get("A_log"), get("dt_bias")
        self.expected_o, self.expected_S = get("o"), get("S")
        self.out = floats(len(self.expected_o), math.nan)
        self.slot_size = self.H * self.K * self.V
        self.garbage = floats(self.slot_size, 1234.5)
        self.pool = self.garbage + get("S0") + self.garbage
        self.cu = ints(*(b * self.T for b in range(self.B + 1)))
        self.slot = ints(*range(1, self.B + 1))

    def args(self):
        """Of all tokens at once."""
        a = Args()
        KDA.kda_args_init(ctypes.byref(a), ctypes.sizeof(a))
        rows = self.B * self.T
        a.q, a.k = view(self.q, [rows, self.H, self.K]), view(self.k, [rows, self.H, self.K])
        a.v, a.g = view(self.v, [rows, self.H, self.V]), view(self.z, [rows, self.H, self.K])
        a.beta, a.out = view(self.beta, [rows, self.H]), view(self.out, [rows, self.H, self.V])
        a.cu_seqlens, a.slot = view(self.cu, [self.B + 1]), view(self.slot, [self.B])
        a.state = view(self.pool, [self.B + 2, self.H, self.K, self.V])
        a.A_log, a.dt_bias = view(self.A_log, [self.H]), view(self.dt_bias, [self.H, self.K])
        if self.lower_bound is not None:
            a.gate, a.lower_bound = BOUNDED, self.lower_bound
        if self.two:
            a.beta_kind = SIGMOID2
        a.problem = self  # whose memory it points to
        return a

    def step_args(self, t, cu):
        """Of token t of every sequence: rows that lie T tokens apart."""
        a = self.args()
        for name, last in (("q", self.K), ("k", self.K), ("v", self.V), ("g", self.K), ("out", self.V)):
            source = self.z if name == "g" else getattr(self, name)
            row = self.H * last
            setattr(a, name, view(source, [self.B, self.H, last], [self.T * row, last, 1], t * row))
        a.beta = view(self.beta, [self.B, self.H], [self.T * self.H, 1], t * self.H)
        a.cu_seqlens = view(cu, [self.B + 1])
        return a

    def states(self):
        return self.pool[self.slot_size:-self.slot_size]

    def errors(self):
        return rel_rms(self.out, self.expected_o), rel_rms(self.states(), self.expected_S)

    def others_are_untouched(self):
        return self.pool[:self.slot_size] == self.garbage and self.pool[-self.slot_size:] == self.garbage


class Test(unittest.TestCase):
    def done(self, status):
        self.assertEqual(status, OK, last_error())


class Golden(Test):
    """The file holds results of a recurrence in f64."""

    # Of the chunkwise form in f32: sums in another order, and a triangular solve that may lose a digit where keys are nearly
    # collinear. Measured 3.1e-7 with AVX-512; other instruction sets and chunk lengths may round otherwise. Where beta may pass
    # 1 the library computes in f64.
    PREFILL = 5e-6
    # Of the recurrence in f32: what independent implementations reach on the same vectors. Measured 3.3e-7.
    DECODE = 1.4e-6

    def check(self, problem, tolerance, name):
        for what, error in zip(("o", "S"), problem.errors()):
            self.assertLessEqual(error, tolerance, (name, what))
        self.assertTrue(problem.others_are_untouched(), name)

    def test_prefill(self):
        worst = 0
        for name in Problem.names():
            bits = set()
            for threads in (0, 2):
                problem = Problem(name)
                args = problem.args()
                args.threads = threads
                self.done(KDA.kda_prefill(ctypes.byref(args)))
                self.check(problem, self.PREFILL, name)
                worst = max(worst, *problem.errors())
                bits.add(problem.out.tobytes() + problem.pool.tobytes())
            self.assertEqual(len(bits), 1, name + ": threads change bits")
        print(f"worst error {worst:.2e}, allowed {self.PREFILL:.1e} ...", end=" ", file=sys.stderr)

    def test_decode(self):
        for name in Problem.names():
            problem = Problem(name)
            self.done(KDA.kda_decode(ctypes.byref(problem.args())))
            self.check(problem, self.DECODE, name)

    def test_decode_token_by_token(self):
        worst = 0
        for name in Problem.names():
            problem = Problem(name)
            cu = ints(*range(problem.B + 1))
            for t in range(problem.T):
                self.done(KDA.kda_decode(ctypes.byref(problem.step_args(t, cu))))
            self.check(problem, self.DECODE, name)
            worst = max(worst, *problem.errors())
        print(f"worst error {worst:.2e}, allowed {self.DECODE:.1e} ...", end=" ", file=sys.stderr)

    def test_prefill_of_one_token_is_a_step(self):
        name = "bounded_t1_d128"
        problem = Problem(name)
        self.assertEqual(problem.T, 1)
        self.done(KDA.kda_prefill(ctypes.byref(problem.args())))
        self.check(problem, self.DECODE, name)

    def test_all_cases_were_there(self):
        self.assertEqual(len(Problem.names()), 7)
        self.assertTrue(any(Problem(name).two for name in Problem.names()))


class Layouts(Test):
    """The fields that the golden cases leave at their defaults."""

    NAME = "softplus_t37_d64"  # two sequences

    def test_state_v_first(self):
        problem = Problem(self.NAME)
        P, H, K, V = problem.B + 2, problem.H, problem.K, problem.V

        def transposed(pool, a, b):
            return array.array("f", (pool[h * a * b + i * b + j] for h in range(P * H) for j in range(b) for i in range(a)))

        turned = transposed(problem.pool, K, V)
        args = problem.args()
        args.state, args.state_v_first = view(turned, [P, H, V, K]), 1
        self.done(KDA.kda_prefill(ctypes.byref(args)))
        problem.pool = transposed(turned, V, K)
        for error in problem.errors():
            self.assertLessEqual(error, Golden.PREFILL)

    def test_states_go_elsewhere_or_nowhere(self):
        problem = Problem(self.NAME)
        slot_out = ints(3, -1)
        args = problem.args()
        args.slot_out = view(slot_out, [2])
        before = problem.states()
        self.done(KDA.kda_prefill(ctypes.byref(args)))
        self.assertEqual(problem.states(), before)
        size = problem.slot_size
        self.assertEqual(problem.pool[:size], problem.garbage)
        self.assertLessEqual(rel_rms(problem.pool[-size:], problem.expected_S[:size]), Golden.PREFILL)

    def test_checkpoints_are_states_of_prefixes(self):
        problem, prefix = Problem(self.NAME), Problem(self.NAME)
        row, slot = ints(32), ints(3)
        args = problem.args()
        args.checkpoint_row, args.checkpoint_slot = view(row, [1]), view(slot, [1])
        self.done(KDA.kda_prefill(ctypes.byref(args)))
        # The first 32 tokens of sequence 0 alone.
        args, cu, one = prefix.args(), ints(0, 32), ints(1)
        for name in ("q", "k", "v", "g", "beta", "out"):
            t = getattr(args, name)
            t.shape[0] = 32
        args.cu_seqlens, args.slot = view(cu, [2]), view(one, [1])
        self.done(KDA.kda_prefill(ctypes.byref(args)))
        size = problem.slot_size
        self.assertLessEqual(rel_rms(problem.pool[-size:], prefix.pool[size:2 * size]), Golden.PREFILL)

    def test_bf16_rows_and_wide_offsets(self):
        """bf16 is read as what it says: the same bits as the same numbers in f32; cu_seqlens may be i64."""
        results = []
        for narrow in (False, True):
            problem = Problem(self.NAME)
            args = problem.args()
            alive = []
            for field, source in (("q", problem.q), ("k", problem.k), ("v", problem.v), ("g", problem.z)):
                bits = array.array("I", source.tobytes())
                upper = array.array("H", (b >> 16 for b in bits))
                wide = array.array("f", array.array("I", (b & 0xffff0000 for b in bits)).tobytes())
                alive.append(upper if narrow else wide)
                shape = list(getattr(args, field).shape[:3])
                setattr(args, field, view(alive[-1], shape))
            if narrow:
                alive.append(array.array("q", problem.cu))
                args.cu_seqlens = view(alive[-1], [3])
            self.done(KDA.kda_decode(ctypes.byref(args)))
            results.append(problem.out.tobytes() + problem.pool.tobytes())
        self.assertEqual(results[0], results[1])

    def test_ready_gates_and_strengths(self):
        problem = Problem(self.NAME)
        args = problem.args()
        tensors = Problem.tensors
        args.gate, args.beta_kind = LOG_DECAY, VALUE
        args.g = view(tensors[self.NAME + ".g"], list(args.g.shape[:3]))
        args.beta = view(tensors[self.NAME + ".beta"], list(args.beta.shape[:2]))
        args.A_log = args.dt_bias = Tensor()
        self.done(KDA.kda_prefill(ctypes.byref(args)))
        for error in problem.errors():
            self.assertLessEqual(error, Golden.PREFILL)

    def test_nothing_to_do(self):
        """Sequences without tokens keep their states; a call without sequences is one."""
        problem = Problem(self.NAME)
        before = problem.pool[:]
        args, cu = problem.args(), ints(0, 0, 0)
        for name in ("q", "k", "v", "g", "beta", "out"):
            t = getattr(args, name)
            t.shape[0], t.data = 0, None
        args.cu_seqlens = view(cu, [3])
        for call in (KDA.kda_prefill, KDA.kda_decode):
            self.done(call(ctypes.byref(args)))
            self.assertEqual(problem.pool, before)

    def test_workspace_of_the_cpu_is_nothing(self):
        args, bytes_needed = Problem(self.NAME).args(), ctypes.c_uint64(7)
        self.done(KDA.kda_workspace_bytes(ctypes.byref(args), ctypes.byref(bytes_needed)))
        self.assertEqual(bytes_needed.value, 0)


class Versions(Test):
    def test_the_library_is_of_this_header(self):
        self.assertEqual(KDA.kda_abi_version(), MAJOR << 16 | MINOR)

    def test_the_struct_above_is_that_of_the_compiler(self):
        source = '#include <stdio.h>\n#include "kda/kda.h"\nint main(void) { printf("%zu %zu", sizeof(kda_args), sizeof(kda_tensor));\n'
        for name, _ in Args._fields_:
            source += f'  printf(" %zu", offsetof(kda_args, {name}));\n'
        with tempfile.TemporaryDirectory() as folder:
            program = os.path.join(folder, "sizes")
            with open(program + ".c", "w", encoding="utf-8") as file:
                file.write(source + "  return 0; }\n")
            subprocess.run(["cc", "-I", os.path.join(ROOT, "include"), program + ".c", "-o", program], check=True)
            found = list(map(int, subprocess.run([program], capture_output=True, check=True).stdout.split()))
        expected = [ctypes.sizeof(Args), ctypes.sizeof(Tensor)] + [getattr(Args, name).offset for name, _ in Args._fields_]
        self.assertEqual(found, expected)

    def test_the_header_is_plain_c_and_cpp(self):
        for compiler, language in ((["cc", "-std=c99"], "c"), (["c++", "-std=c++98", "-Wno-long-long"], "c++")):
            result = subprocess.run([*compiler, "-x", language, "-pedantic", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", "-"],
                                    input=f'#include "{HEADER}"\n', capture_output=True, text=True)
            self.assertEqual(result.returncode, 0, result.stderr)

    def test_sizes(self):
        newest, oldest = ctypes.sizeof(Args), OLDEST
        self.assertEqual((oldest, SIZE_1_0), (1168, 1184))  # no field has moved since
        for size in (oldest, SIZE_1_0, newest):
            problem = Problem("bounded_t1_d128")
            args = problem.args()
            args.struct_size = size
            self.done(KDA.kda_decode(ctypes.byref(args)))
        for size in (0, 8, oldest - 1, newest + 1, newest + 64, 2 ** 32 - 1):
            problem = Problem("bounded_t1_d128")
            big = (ctypes.c_char * (newest + 64))()
            ctypes.memmove(big, ctypes.byref(problem.args()), newest)
            Args.from_buffer(big).struct_size = size
            self.assertEqual(KDA.kda_decode(big), REFUSED)
            self.assertIn(f"struct_size: expected {oldest} to {newest}, found {size}", last_error())
            self.assertIn("kda_args_init", last_error())
            self.assertTrue(all(math.isnan(x) for x in problem.out))

    def test_init_writes_what_it_was_given(self):
        newest = ctypes.sizeof(Args)
        for size in (OLDEST, SIZE_1_0, newest, newest + 40):
            memory = (ctypes.c_ubyte * (newest + 64))(*([0xaa] * (newest + 64)))
            KDA.kda_args_init(memory, size)
            content = bytes(memory)
            self.assertEqual(content[size:], b"\xaa" * (newest + 64 - size))
            self.assertEqual(content[newest:size], b"\0" * max(0, size - newest))  # fields of the future are absent
            args = Args.from_buffer_copy(memory)
            self.assertEqual((args.struct_size, args.device, args.gate, args.beta_kind, args.l2norm), (size, CPU, SOFTPLUS, SIGMOID, 1))
            self.assertEqual((args.threads, args.state_v_first, args.scale, args.lower_bound), (0, 0, 0, -5))


class Mistakes(Test):
    """Each is answered with a code and words, and nothing is written."""

    def refused(self, change, message, call=None):
        problem = Problem("softplus_t37_d64")
        args = problem.args()
        alive = change(args)  # memory that the call looks at
        before = problem.pool[:]
        for function in [call] if call else [KDA.kda_prefill, KDA.kda_decode]:
            self.assertEqual(function(ctypes.byref(args)), REFUSED, message)
            self.assertIn(message, last_error())
        self.assertTrue(all(math.isnan(x) for x in problem.out))
        self.assertEqual(problem.pool, before)
        del alive

    def test_null(self):
        for call in (KDA.kda_prefill, KDA.kda_decode):
            self.assertEqual(call(None), REFUSED)
            self.assertEqual(last_error(), "kda args: expected a struct, found NULL")
        args = Problem("bounded_t1_d128").args()
        self.assertEqual(KDA.kda_workspace_bytes(ctypes.byref(args), None), REFUSED)
        self.assertIn("NULL", last_error())
        self.assertEqual(KDA.kda_workspace_bytes(None, ctypes.byref(ctypes.c_uint64())), REFUSED)
        for name in ("q", "k", "v", "g", "beta", "out", "cu_seqlens", "slot"):
            self.refused(lambda a, name=name: setattr(getattr(a, name), "data", None), f"kda {name}: expected a tensor, found none")
            self.refused(lambda a, name=name: setattr(a, name, Tensor()), f"kda {name}:")
        self.refused(lambda a: setattr(a.state, "data", None), "slot")  # no pool: no slot is below its size

    def test_shapes(self):
        def shape(name, axis, size):
            def change(args):
                getattr(args, name).shape[axis] = size
            return change
        self.refused(shape("k", 2, 63), "kda k: expected shape [74, 2, 64], found [74, 2, 63]")
        self.refused(shape("v", 0, 73), "kda v: expected shape [74, 2, 64], found [73, 2, 64]")
        self.refused(shape("g", 1, 3), "kda g: expected shape [74, 2, 64]")
        self.refused(shape("beta", 1, 1), "kda beta: expected shape [74, 2]")
        self.refused(shape("state", 3, 32), "kda state:")
        self.refused(shape("A_log", 0, 3), "kda gate.A_log:")
        self.refused(shape("dt_bias", 1, 3), "kda gate.dt_bias:")
        self.refused(shape("slot", 0, 1), "kda slot:")
        self.refused(shape("q", 0, -1), "kda q.shape[0]: expected at least 0, found -1")
        self.refused(lambda a: setattr(a.q, "rank", 5), "kda q.rank: expected 1 to 4, found 5")
        self.refused(lambda a: setattr(a.q, "rank", -1), "kda q.rank: expected 1 to 4, found -1")
        self.refused(lambda a: setattr(a.q, "rank", 2), "kda q:")

    def test_types(self):
        for dtype, message in ((I32, "kda q"), (9, "kda q.dtype: expected a kda_dtype, found 9"), (-1, "kda q.dtype")):
            self.refused(lambda a: setattr(a.q, "dtype", dtype), message)
        self.refused(lambda a: setattr(a.slot, "dtype", F32), "kda slot")
        self.refused(lambda a: setattr(a.state, "dtype", BF16), "kda state")  # a pool in bf16 is for CUDA

    def test_strides_and_alignment(self):
        def stride(args):
            args.q.stride[2] = 2
        self.refused(stride, "kda q: expected a contiguous innermost dimension, found a stride of 2")

        def shift(name, by):
            def change(args):
                getattr(args, name).data += by
            return change
        self.refused(shift("v", 1), "kda v.data: expected an address aligned to 4 bytes, found one that is 1 past it")
        self.refused(shift("state", 2), "kda state.data: expected an address aligned to 4 bytes")
        self.refused(shift("cu_seqlens", 3), "kda cu_seqlens.data: expected an address aligned to 4 bytes")

    def test_choices(self):
        def value(name, x):
            return lambda a: setattr(a, name, x)
        self.refused(value("device", 2), "kda device: expected KDA_CPU or KDA_CUDA, found 2")
        self.refused(value("gate", 3), "kda gate: expected 0 to 2, found 3")
        self.refused(value("beta_kind", -1), "kda beta_kind: expected 0 to 2, found -1")
        self.refused(value("threads", 1025), "kda threads: expected 0 to 1024, found 1025")
        self.refused(value("scale", math.inf), "kda scale: expected a finite number")
        self.refused(value("l2_eps", -1), "kda l2_eps: expected a number of at least 0")

        def bound(args):
            args.gate, args.lower_bound = BOUNDED, 1
        self.refused(bound, "kda gate.lower_bound: expected a number below 0")

    def test_a_device_that_this_build_lacks(self):
        with open(os.path.join(BUILD, "CMakeCache.txt"), encoding="utf-8") as file:
            if re.search("^KL_CUDA:BOOL=(ON|1|TRUE)", file.read(), re.M):
                self.skipTest("this build has CUDA kernels")
        self.refused(lambda a: setattr(a, "device", CUDA), "no CUDA kernels")

    def test_indices(self):
        def numbers(field, *values):
            def change(args):
                memory = ints(*values)
                setattr(args, field, view(memory, [len(values)]))
                return memory
            return change
        self.refused(numbers("cu_seqlens", 0, 37, 73), "kda cu_seqlens[2]: expected the 74 rows of q, found 73")
        self.refused(numbers("cu_seqlens", 1, 37, 74), "kda cu_seqlens[0]: expected 0, found 1")
        self.refused(numbers("cu_seqlens", 0, 80, 74), "kda cu_seqlens")
        self.refused(numbers("slot", 1, 4), "expected a slot below 4")
        self.refused(numbers("slot", 2, 2), "slot 2 that sequence 0 writes too")
        self.refused(numbers("checkpoint_row", 16), "expected both or none")

    def test_every_thread_has_its_own_message(self):
        self.assertEqual(KDA.kda_prefill(None), REFUSED)
        mine, theirs = last_error(), []

        def other():
            theirs.append(last_error())  # nothing yet, and not null
            args = Problem("bounded_t1_d128").args()
            args.device = 5
            KDA.kda_prefill(ctypes.byref(args))
            theirs.append(last_error())

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        self.assertEqual(theirs, ["", "kda device: expected KDA_CPU or KDA_CUDA, found 5"])
        self.assertEqual(last_error(), mine)

    def test_calls_from_several_threads(self):
        alone = Problem("bounded_t65_d128")
        self.done(KDA.kda_prefill(ctypes.byref(alone.args())))
        problems = [Problem("bounded_t65_d128") for _ in range(6)]

        def call(i):
            args = problems[i].args()
            args.threads = i % 3
            self.assertEqual(KDA.kda_prefill(ctypes.byref(args)), OK)

        threads = [threading.Thread(target=call, args=(i,)) for i in range(len(problems))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for problem in problems:
            self.assertEqual((problem.out, problem.pool), (alone.out, alone.pool))


def output_of(*command, **extra):
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, **extra)
    if result.returncode != 0:
        raise AssertionError(f"{' '.join(command)}: {result.returncode}\n{result.stdout}{result.stderr}")
    return result.stdout


class Binary(Test):
    def test_exports_are_the_functions_of_the_header(self):
        declared = re.findall(r"^KDA_API [^;(]*?(\w+)\(", read_header(), re.M)
        self.assertGreaterEqual(len(declared), 6)
        lines = output_of("nm", "-D", "--defined-only", os.path.join(BUILD, "libkda.so")).splitlines()
        exported = [line.split()[-1] for line in lines if line.split()[-2] != "A"]  # A: the name of the version itself
        self.assertEqual(sorted(name.split("@@")[0] for name in exported), sorted(declared))
        for name in exported:
            self.assertRegex(name, rf"@@KDA_{MAJOR}(\.\d+)?$")

    def test_what_it_needs(self):
        dynamic = output_of("readelf", "-d", os.path.join(BUILD, "libkda.so"))
        self.assertEqual(re.findall(r"\(SONAME\).*\[(.*)\]", dynamic), [f"libkda.so.{MAJOR}"])
        for library in re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic):
            self.assertRegex(library, r"^(libstdc\+\+|libm|libgcc_s|libc|libpthread|libdl|librt|ld-linux[-\w]*)\.so")

    def test_the_example_of_the_build(self):
        self.assertIn("they agree\n", output_of(os.path.join(BUILD, "kda_prefill_example")))


class Package(Test):
    """Installed, moved, and used from C: the build's own answer is the expected one."""

    @classmethod
    def setUpClass(cls):
        cls.folder = tempfile.mkdtemp()
        cls.addClassCleanup(shutil.rmtree, cls.folder)
        first = os.path.join(cls.folder, "first")
        output_of("cmake", "--install", BUILD, "--component", "libkda", "--prefix", first)
        cls.prefix = os.path.join(cls.folder, "moved")
        os.rename(first, cls.prefix)
        found = {os.path.relpath(os.path.join(path, file), cls.prefix) for path, _, files in os.walk(cls.prefix) for file in files}
        cls.files = found
        pc = [file for file in found if file.endswith(".pc")]
        cls.lib = os.path.join(cls.prefix, os.path.dirname(os.path.dirname(pc[0])))
        cls.expected = output_of(os.path.join(BUILD, "kda_prefill_example"))
        # Nothing of the user's own set-up: what is found is what was installed.
        cls.environment = {key: value for key, value in os.environ.items()
                           if not key.startswith(("PKG_CONFIG", "CMAKE", "kda_")) and key not in ("LD_LIBRARY_PATH", "CFLAGS", "LDFLAGS")}
        cls.environment["PKG_CONFIG_PATH"] = os.path.join(cls.lib, "pkgconfig")

    def pkg_config(self, *flags):
        return output_of("pkg-config", *flags, "kda", env=self.environment).split()

    def compile(self, name, *flags):
        program = os.path.join(self.folder, name)
        output_of("cc", "-std=c99", "-pedantic", "-Wall", "-Wextra", "-Werror", EXAMPLE, "-o", program, *flags, env=self.environment)
        return program

    def test_files(self):
        lib = os.path.relpath(self.lib, self.prefix)
        expected = ["include/kda/kda.h"] + [os.path.join(lib, name) for name in (
            "libkda.so", f"libkda.so.{MAJOR}", f"libkda.so.{MAJOR}.{MINOR}", "libkda.a", "pkgconfig/kda.pc", "cmake/kda/kdaConfig.cmake",
            "cmake/kda/kdaConfigVersion.cmake")]
        self.assertEqual(sorted(self.files), sorted(expected))
        for name in self.files:  # nothing knows where it was built or first installed
            if name.endswith((".pc", ".cmake")):
                with open(os.path.join(self.prefix, name), encoding="utf-8") as file:
                    text = file.read()
                self.assertNotIn(ROOT, text, name)
                self.assertNotIn(os.path.join(self.folder, "first"), text, name)
        self.assertEqual(self.pkg_config("--modversion"), [f"{MAJOR}.{MINOR}"])

    def test_pkg_config_shared(self):
        program = self.compile("shared", *self.pkg_config("--cflags", "--libs"), "-lm")
        self.assertIn(f"libkda.so.{MAJOR}", output_of("readelf", "-d", program))
        environment = dict(self.environment, LD_LIBRARY_PATH=self.lib)
        self.assertEqual(output_of(program, env=environment), self.expected)

    def test_pkg_config_static(self):
        program = self.compile("static", "-static", *self.pkg_config("--cflags", "--static", "--libs"))
        self.assertNotIn("NEEDED", output_of("readelf", "-d", program))
        self.assertEqual(output_of(program, env=self.environment), self.expected)
        # Only libkda from the archive, the C and C++ libraries shared.
        libs = ["-l:libkda.a" if flag == "-lkda" else flag for flag in self.pkg_config("--cflags", "--static", "--libs")]
        program = self.compile("mixed", *libs)
        self.assertNotIn("libkda", output_of("readelf", "-d", program))
        self.assertEqual(output_of(program, env=self.environment), self.expected)

    def test_cmake(self):
        build = os.path.join(self.folder, "cmake")
        flags = ["-G", "Ninja"] if shutil.which("ninja") else []
        output_of("cmake", "-S", os.path.join(ROOT, "examples"), "-B", build, "-DCMAKE_PREFIX_PATH=" + self.prefix, *flags, env=self.environment)
        output_of("cmake", "--build", build, env=self.environment)
        for name in ("kda_prefill", "kda_prefill_static"):
            self.assertEqual(output_of(os.path.join(build, name), env=self.environment), self.expected)
        self.assertIn(f"libkda.so.{MAJOR}", output_of("readelf", "-d", os.path.join(build, "kda_prefill")))
        self.assertNotIn("libkda", output_of("readelf", "-d", os.path.join(build, "kda_prefill_static")))

    def test_what_the_page_says_works(self):
        with open(os.path.join(ROOT, "docs", "libkda.md"), encoding="utf-8") as file:
            text = file.read()
        (c,), (python,) = re.findall(r"```c\n(.*?)```", text, re.S), re.findall(r"```python\n(.*?)```", text, re.S)
        source = os.path.join(self.folder, "page.c")
        with open(source, "w", encoding="utf-8") as file:
            file.write("#include <stdio.h>\n" + c)
        output_of("cc", "-std=c99", "-pedantic", "-Wall", "-Wextra", "-Werror", "-c", source, "-o", source + ".o",
                  *self.pkg_config("--cflags"), env=self.environment)
        out = output_of(sys.executable, "-c", python, env=dict(self.environment, LD_LIBRARY_PATH=self.lib))
        values = re.findall(r"-?\d\.\d+(?:e-\d+)?", out)
        self.assertEqual(len(values), 4, out)
        self.assertTrue(any(float(value) != 0 for value in values), out)

    def test_cmake_refuses_another_major_version(self):
        source = os.path.join(self.folder, "project")
        os.mkdir(source)
        with open(os.path.join(source, "CMakeLists.txt"), "w", encoding="utf-8") as file:
            file.write("cmake_minimum_required(VERSION 3.18)\nproject(x LANGUAGES C)\n" + f"find_package(kda {MAJOR + 1}.0 REQUIRED)\n")
        result = subprocess.run(["cmake", "-S", source, "-B", source + "/b", "-DCMAKE_PREFIX_PATH=" + self.prefix], capture_output=True,
                                text=True, env=self.environment)
        self.assertNotEqual(result.returncode, 0)
        self.assertIn(f"version: {MAJOR}.{MINOR}", result.stderr)


def main():
    global BUILD, KDA
    BUILD = os.path.abspath(gtest_report.arguments()[0])
    KDA = load()
    return gtest_report.run(sys.modules[__name__])


if __name__ == "__main__":
    sys.exit(main())

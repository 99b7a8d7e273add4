#!/usr/bin/env python3
"""Times KDA of this project beside public implementations, on one GPU, in one run.

  tools/bench_peers.py [--lib build/cuda/libkda.so] [--rows A,B,C] [--fla A,B,C | --no-fla] [--quick] [--budget SECONDS]

Rows are chosen by their names or parts of them ("B1 T8192 H32", "pack", "decode"); --fla says in which of them fla
runs, for its kernels take a minute to compile.

Needs Python with torch and Triton. What is not installed is left out, and the table says why. Ours runs through
libkda (ctypes on torch's memory). Every figure is the median of CUDA-graph replays over rotating inputs that together
exceed the L2 cache; a graph that cannot be captured is timed by events around plain calls and marked with *.

Peers: chunk_kda and fused_recurrent_kda of fla (Triton); kimi_delta_attention of the cuDNN frontend, pinned to the plan
kda_hopper_cuda, with a bf16 gate (its own conversion pass included) and with an f32 gate; flash_kda. Triton kernels are
autotuned over all their configurations for 8 and for 32 heads, as their own cache does not tell other numbers apart
either (FLA_CACHE_MODE=fuzzy), and several processes compile ahead; with a budget fla's softplus gate runs with 32 heads
only, and --quick leaves fla out with other numbers than 32 and 96.

On the first shape o is compared with the recurrence in f64 over its first tokens (rel-RMS), and each peer with ours
over all of it. Ours FAILED where it is too far from f64; a peer that disagrees is reported.
"""
import argparse
import ctypes
import math
import multiprocessing
import os
import pathlib
import statistics
import sys
import time

os.environ.setdefault("FLA_FLASH_KDA", "0")  # fla would hand over to flash_kda where that is installed

D = 128
PACK = [1300, 547, 2048, 963, 271, 3063]
LOWER_BOUND = -5.0
TOLERANCE = 1e-2  # of ours beside f64; rounding o to bf16 alone is 1.7e-3
AGREES = 2e-2     # of two implementations that round to bf16 inside
REFERENCE_TOKENS, REFERENCE_HEADS = 2048, 2


def prefill_shapes():
    shapes = [("B1 T8192 H32", [8192], 32), ("B1 T8192 H96", [8192], 96), ("B1 T1024 H32", [1024], 32),
              ("B1 T65536 H32", [65536], 32), ("pack of 6 H96", PACK, 96), ("B1 T65536 H8", [65536], 8),
              ("B1 T8192 H64", [8192], 64)]
    for T, H, N in [(2048, 12, 1), (2048, 16, 1), (4096, 8, 1), (4096, 12, 1), (8192, 12, 4), (8192, 16, 1),
                    (1024, 4, 1), (3072, 10, 1), (8192, 24, 1), (16384, 16, 8)]:
        shapes.append((f"T{T} H{H} N{N}", [T // N] * N, H))
    shapes.append(("B8 T1024 H32", [1024] * 8, 32))  # last: another batch size makes Triton compile again
    return shapes


DECODE = [("decode B1 H32", 1, 32), ("decode B64 H32", 64, 32), ("decode B256 H32", 256, 32)]
QUICK_HEADS = (32, 96)  # of fla's rows in --quick
TUNED_HEADS, TUNED_TOKENS = (8, 32), 8192  # where fla's autotuners choose; elsewhere the nearest choice is taken


# ---- libkda: include/kda/kda.h, version 1 ----

class KdaTensor(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("dtype", ctypes.c_int32), ("rank", ctypes.c_int32),
                ("shape", ctypes.c_int64 * 4), ("stride", ctypes.c_int64 * 4)]


class KdaArgs(ctypes.Structure):
    _fields_ = ([("struct_size", ctypes.c_uint32), ("device", ctypes.c_int32), ("stream", ctypes.c_void_p)] +
                [(n, ctypes.c_int32) for n in ("threads", "gate", "beta_kind", "state_v_first", "l2norm")] +
                [(n, ctypes.c_float) for n in ("l2_eps", "scale", "lower_bound")] +
                [(n, KdaTensor) for n in ("q", "k", "v", "g", "beta", "cu_seqlens", "out", "A_log", "dt_bias", "state",
                                          "slot", "slot_out", "checkpoint_row", "checkpoint_slot")] +
                [("workspace", ctypes.c_void_p), ("workspace_bytes", ctypes.c_uint64)])


CUDA, SOFTPLUS, BOUNDED = 1, 1, 2


class Library:
    def __init__(self, path):
        self.lib = ctypes.CDLL(str(path))
        self.lib.kda_last_error.restype = ctypes.c_char_p
        self.lib.kda_args_init.argtypes = [ctypes.POINTER(KdaArgs), ctypes.c_size_t]
        self.lib.kda_workspace_bytes.argtypes = [ctypes.POINTER(KdaArgs), ctypes.POINTER(ctypes.c_uint64)]
        self.lib.kda_args_init.restype = None
        for f in (self.lib.kda_prefill, self.lib.kda_decode):
            f.argtypes = [ctypes.POINTER(KdaArgs)]

    def check(self, status):
        if status != 0:
            raise RuntimeError(self.lib.kda_last_error().decode())

    def args(self, x, gate):
        """What is constant over the calls with the inputs x; `slot` says where states come from and go to."""
        a = KdaArgs()
        self.lib.kda_args_init(ctypes.byref(a), ctypes.sizeof(a))
        a.device, a.gate, a.lower_bound = CUDA, BOUNDED if gate == "bounded" else SOFTPLUS, LOWER_BOUND
        for name in ("q", "k", "v", "g", "beta", "cu_seqlens", "out", "A_log", "dt_bias", "state", "slot"):
            setattr(a, name, view(getattr(x, name)))
        return a

    def prefill(self, x, gate):
        a = self.args(x, gate)
        need = ctypes.c_uint64()
        self.check(self.lib.kda_workspace_bytes(ctypes.byref(a), ctypes.byref(need)))
        import torch
        if x.workspace is None or x.workspace.numel() < need.value:
            x.workspace = torch.empty(max(need.value, 256), dtype=torch.uint8, device="cuda")
        a.workspace, a.workspace_bytes = x.workspace.data_ptr(), x.workspace.numel()
        a.stream = torch.cuda.current_stream().cuda_stream
        self.check(self.lib.kda_prefill(ctypes.byref(a)))

    def decode(self, x, gate):
        import torch
        a = self.args(x, gate)
        a.stream = torch.cuda.current_stream().cuda_stream
        self.check(self.lib.kda_decode(ctypes.byref(a)))


def view(t):
    import torch
    types = {torch.float32: 0, torch.bfloat16: 1, torch.int32: 2, torch.int64: 3}
    c = KdaTensor(data=t.data_ptr(), dtype=types[t.dtype], rank=t.dim())
    for d in range(t.dim()):
        c.shape[d], c.stride[d] = t.shape[d], t.stride(d)
    return c


# ---- Inputs ----

class Inputs:
    """One set of tensors, packed [T, H, D]."""

    def __init__(self, lengths, H, seed, with_state=True):
        import torch
        torch.manual_seed(seed)
        T, N = sum(lengths), len(lengths)
        self.lengths, self.H, self.T, self.N = lengths, H, T, N
        rows = lambda *shape: torch.randn(*shape, device="cuda", dtype=torch.bfloat16)
        self.q, self.k, self.v, self.g = (rows(T, H, D) for _ in range(4))
        self.beta = rows(T, H)
        self.out = torch.full((T, H, D), float("nan"), device="cuda", dtype=torch.bfloat16)
        self.A_log = torch.rand(H, device="cuda").mul(1.5).add(0.5).log()
        self.dt_bias = torch.randn(H, D, device="cuda") * 0.5
        self.h0 = torch.randn(N, H, D, D, device="cuda") * 0.5 if with_state else None
        self.state = self.h0.clone() if with_state else None
        self.slot = torch.arange(N, device="cuda", dtype=torch.int32)
        self.workspace = None
        self.made = {}  # the same in another type or layout, as a peer wants it
        self.cu_seqlens = cu_seqlens(lengths)

    def once(self, name, make):
        if name not in self.made:
            self.made[name] = make()
        return self.made[name]

    def h0_v_first(self):
        return self.once("h0_v_first", lambda: self.h0.transpose(2, 3).contiguous())

    def bytes(self):
        return 10 * self.T * self.H * D + 8 * self.N * self.H * D * D


_cu = {}


def cu_seqlens(lengths, dtype="int64"):
    """The same tensor for the same lengths: fla keeps what it derives from one."""
    import torch
    key = (tuple(lengths), dtype)
    if key not in _cu:
        ends = [0]
        for n in lengths:
            ends.append(ends[-1] + n)
        _cu[key] = torch.tensor(ends, device="cuda", dtype=getattr(torch, dtype))
    return _cu[key]


# ---- Peers: each a function of (inputs, gate) that returns o, in any shape ----

def fla_prefill(x, gate):
    from fla.ops.kda import chunk_kda
    uniform = len(set(x.lengths)) == 1
    B = x.N if uniform else 1
    four = lambda t: t.view(B, -1, *t.shape[1:])
    more = {"safe_gate": True, "lower_bound": LOWER_BOUND} if gate == "bounded" else {}
    o, _ = chunk_kda(four(x.q), four(x.k), four(x.v), four(x.g), four(x.beta), initial_state=x.h0,
                     output_final_state=True, use_qk_l2norm_in_kernel=True, use_gate_in_kernel=True,
                     use_beta_sigmoid_in_kernel=True, A_log=x.A_log, dt_bias=x.dt_bias.view(-1),
                     cu_seqlens=None if uniform else x.cu_seqlens, **more)
    return o


def fla_decode(x, gate):
    from fla.ops.kda import fused_recurrent_kda
    four = lambda t: t.view(x.N, 1, *t.shape[1:])
    more = {"lower_bound": LOWER_BOUND} if gate == "bounded" else {}
    o, _ = fused_recurrent_kda(four(x.q), four(x.k), four(x.v), four(x.g), four(x.beta), A_log=x.A_log,
                               dt_bias=x.dt_bias.view(-1), initial_state=x.h0, output_final_state=True,
                               use_qk_l2norm_in_kernel=True, use_gate_in_kernel=True,
                               use_beta_sigmoid_in_kernel=True, **more)
    return o


def cudnn_prefill(f32_gate):
    def call(x, gate):
        if gate != "bounded":
            raise NotImplementedError("has no softplus gate")
        from cudnn.linear_attention import kimi_delta_attention
        g, beta = x.g, x.beta
        if f32_gate:
            g, beta = x.once("g32", x.g.float), x.once("beta32", x.beta.float)
        result = kimi_delta_attention(x.q, x.k, x.v, g, beta, cu_seqlens(x.lengths, "int32"),
                                      initial_state=x.h0_v_first(), output_final_state=True,  # [N, H, V, K]
                                      use_qk_l2norm_in_kernel=True, use_beta_sigmoid_in_kernel=True, safe_gate=True,
                                      gate_lower_bound=LOWER_BOUND, a_log=x.A_log, dt_bias=x.dt_bias,
                                      plan_name="kda_hopper_cuda")
        return result[0] if isinstance(result, tuple) else result
    return call


def flash_kda_prefill(x, gate):
    import flash_kda
    if gate != "bounded":
        raise NotImplementedError("has no softplus gate")
    o = x.once("flash_out", lambda: x.out.clone().unsqueeze(0))
    start = x.h0_v_first()
    final = x.once("flash_final", start.clone)
    one = lambda t: t.unsqueeze(0)
    flash_kda.fwd(one(x.q), one(x.k), one(x.v), one(x.g), one(x.beta), 1 / math.sqrt(D), o, x.A_log, x.dt_bias,
                  LOWER_BOUND, initial_state=start, final_state=final, cu_seqlens=x.cu_seqlens)
    return o


def fla_gated_delta_rule(x, gate):
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    one = lambda t: t.unsqueeze(0)
    log_decay = x.once("log_decay", lambda: -x.g[:, :, 0].float().sigmoid() * 0.2)
    beta = x.once("strength", x.beta.sigmoid)
    o, _ = chunk_gated_delta_rule(one(x.q), one(x.k), one(x.v), one(log_decay), one(beta), initial_state=x.h0,
                                  output_final_state=True, use_qk_l2norm_in_kernel=True)
    return o


def fla_dplr(x, gate):
    from fla.ops.generalized_delta_rule import chunk_dplr_delta_rule
    one = lambda t: t.unsqueeze(0)
    a, b = x.once("a", lambda: x.k * 0.06), x.once("b", lambda: x.q * 0.06)
    log_decays = x.once("log_decays", lambda: -x.g.float().sigmoid() * 0.2)
    o, _ = chunk_dplr_delta_rule(one(x.q), one(x.k), one(x.v), one(a), one(b), one(log_decays), initial_state=x.h0,
                                 output_final_state=True)
    return o


# ---- What all of them compute ----

def reference(x, gate):
    """o of the first tokens and heads of the first sequence, by the recurrence in f64."""
    import torch
    T, H = min(REFERENCE_TOKENS, x.lengths[0]), min(REFERENCE_HEADS, x.H)
    q, k, v, g, beta = (t[:T, :H].double() for t in (x.q, x.k, x.v, x.g, x.beta))
    normed = lambda t: t / (t.square().sum(-1, keepdim=True) + 1e-6).sqrt()
    q, k, beta = (normed(q) / math.sqrt(D)).unsqueeze(-1), normed(k).unsqueeze(-1), beta.sigmoid().unsqueeze(-1)
    rate, z = x.A_log[:H].double().exp().view(1, H, 1), g + x.dt_bias[:H].double()
    log_decay = LOWER_BOUND * (rate * z).sigmoid() if gate == "bounded" else -rate * torch.nn.functional.softplus(z)
    decay = log_decay.exp().unsqueeze(-1)
    S, o = x.h0[0, :H].double(), []
    for q_t, k_t, v_t, beta_t, decay_t in zip(*(t.unbind(0) for t in (q, k, v, beta, decay))):
        S = S * decay_t
        S = torch.addcmul(S, k_t, (beta_t * (v_t - (S * k_t).sum(1))).unsqueeze(1))
        o.append((S * q_t).sum(1))
    return torch.stack(o)


# ---- Times ----

REPLAYED_MS = 30  # of one measurement, about


def measure(call, sets, gate):
    """Milliseconds of one call, and whether a graph was replayed."""
    import torch
    for x in sets:  # all of them: what is made once per set is made here
        call(x, gate)
    torch.cuda.synchronize()
    event = lambda: torch.cuda.Event(enable_timing=True)
    graph = None
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for x in sets:
                call(x, gate)
    except Exception as reason:  # a call that looks at device values cannot be captured
        print(f"  (not captured: {first_line(reason)})", file=sys.stderr)
        graph = None
        torch.cuda.synchronize()

    def once():
        begin, end = event(), event()
        begin.record()
        if graph is not None:
            graph.replay()
        else:
            for x in sets:
                call(x, gate)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)
    once()  # brings the graph to the GPU
    count = max(3, min(15, math.ceil(REPLAYED_MS / max(once(), 1e-3))))
    return statistics.median(once() for _ in range(count)) / len(sets), graph is not None


def first_line(reason):
    text = f"{type(reason).__name__}: {reason}".strip().splitlines()
    return text[0][:150] if text else "unknown"


def number(cell):
    """A cell's milliseconds, None where there are words."""
    try:
        return float(cell.rstrip("*"))
    except ValueError:
        return None


def rel_rms(x, y):
    x, y = x.reshape(-1).double(), y.reshape(-1).double()
    return float(((x - y).square().sum() / y.square().sum()).sqrt())


# ---- Triton's configurations: chosen at some numbers of heads, compiled by several processes ahead ----

def shorten_benchmarks():
    """Triton times each configuration for 125 ms; a tenth of that picks as well at these lengths."""
    import triton.testing
    original = triton.testing.do_bench

    def do_bench(fn, warmup=25, rep=100, **more):
        return original(fn, warmup=4, rep=12, **more)
    triton.testing.do_bench = do_bench


def tuned_heads(H):
    return min(TUNED_HEADS, key=lambda tuned: abs(math.log(tuned / H)))


def patch_autotuner(before=None, after=None):
    """before(autotuner) and after(autotuner, kernel's name) around each call of an autotuned kernel."""
    from triton.runtime import autotuner
    original = autotuner.Autotuner.run

    def run(self, *arguments, **more):
        if before:
            before(self)
        result = original(self, *arguments, **more)
        if after:
            after(self, self.base_fn.__name__)
        return result
    autotuner.Autotuner.run = run


class Tuned:
    """Each kernel's configuration at each of TUNED_HEADS; `heads` says whose are taken."""

    def __init__(self):
        self.chosen, self.heads = {}, 0

    def prefill(self, x, gate):
        self.heads = tuned_heads(x.H)
        return fla_prefill(x, gate)

    def note(self, autotuner, name):
        self.chosen[name, self.heads] = autotuner.best_config

    def apply(self, autotuner):
        config = self.chosen.get((autotuner.base_fn.__name__, self.heads))
        if config is not None:
            autotuner.configs = [config]


def compile_configurations(index, count, jobs, done):
    """Every count-th configuration of each kernel into Triton's cache on disk."""
    import torch
    import triton.testing

    def once(fn, quantiles=None, **more):
        fn()
        torch.cuda.synchronize()
        return [1.0] * len(quantiles) if quantiles else 1.0
    triton.testing.do_bench = once
    whole = {}

    def share(autotuner):
        configs = whole.setdefault(id(autotuner), autotuner.configs)
        autotuner.configs = configs[index::count] or [configs[index % len(configs)]]
    patch_autotuner(before=share)
    for n, (lengths, H, gate) in enumerate(jobs):
        fla_prefill(Inputs(lengths, H, 1), gate)
        torch.cuda.synchronize()
        done[n] = 1


def choose_configurations(jobs, to):
    """Lets the autotuners choose; their choices go into the pipe `to`."""
    import torch
    shorten_benchmarks()
    tuned = Tuned()
    patch_autotuner(after=tuned.note)
    for lengths, H, gate in jobs:
        tuned.prefill(Inputs(lengths, H, 1), gate)
    torch.cuda.synchronize()
    to.send(tuned.chosen)


def compile_rows(index, count, tuned, jobs, done):
    """Every count-th job in the chosen configurations, into Triton's cache."""
    import torch
    patch_autotuner(before=tuned.apply)
    for n in range(index, len(jobs), count):
        lengths, H, gate = jobs[n]
        tuned.prefill(Inputs(lengths, H, 1), gate)
        torch.cuda.synchronize()
        done[n] = 1
        torch.cuda.empty_cache()


def in_processes(count, seconds, work, *arguments):
    """work(index, count, *arguments) in forked processes, for torch is imported and the GPU not yet touched."""
    import torch
    context = multiprocessing.get_context("fork")

    def guarded(index):
        try:
            with torch.no_grad():
                work(index, count, *arguments)
        except Exception as reason:
            print(f"  ({work.__name__}, process {index}: {first_line(reason)})", file=sys.stderr)
        os._exit(0)
    workers = [context.Process(target=guarded, args=(i,)) for i in range(count)]
    for w in workers:
        w.start()
    end = time.monotonic() + seconds
    for w in workers:
        w.join(max(0.1, end - time.monotonic()))
    for w in workers:
        if w.is_alive():
            w.terminate()
            w.join()


def compile_ahead(rows, seconds, configurations_only):
    """rows: [(lengths, heads, gate)]. What the autotuners chose, and of the rows those that are compiled."""
    started = time.monotonic()
    left = lambda: seconds - (time.monotonic() - started)
    context = multiprocessing.get_context("fork")
    count = max(1, min(14, len(os.sched_getaffinity(0))))
    jobs = sorted({(tuned_heads(H), gate) for _, H, gate in rows})
    jobs = [([TUNED_TOKENS], H, gate) for H, gate in jobs]
    in_processes(count, left(), compile_configurations, jobs, context.Array("i", len(jobs)))
    print(f"  configurations compiled after {seconds - left():.0f} s", file=sys.stderr)
    tuned, done = Tuned(), context.Array("i", len(rows))
    if configurations_only:
        return tuned, set()
    here, there = context.Pipe()
    in_processes(1, left(), lambda index, count: choose_configurations(jobs, there))
    if not here.poll():
        return tuned, set()
    tuned.chosen = here.recv()
    print(f"  chosen after {seconds - left():.0f} s", file=sys.stderr)
    in_processes(min(count, len(rows)), left(), compile_rows, tuned, rows, done)
    return tuned, {(tuple(lengths), H, gate) for (lengths, H, gate), finished in zip(rows, done) if finished}


# ---- The table ----

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lib", default=str(pathlib.Path(__file__).parent.parent / "build/cuda/libkda.so"))
    parser.add_argument("--quick", action="store_true", help="one number of heads after another left out for fla")
    parser.add_argument("--budget", type=float, default=None, help="seconds after which remaining rows are skipped")
    parser.add_argument("--rows", default="", help="only these rows, comma separated: names or parts of names")
    parser.add_argument("--fla", default="", help="fla only in these rows")
    parser.add_argument("--no-fla", action="store_true", help="without fla")
    parser.add_argument("--compile", action="store_true", help="only fill Triton's cache, which a later call finds")
    options = parser.parse_args()
    names = [n for n, _, _ in prefill_shapes() + DECODE]

    def chosen(words, row):
        """No words choose every row; a row's whole name does not choose those that it is a part of."""
        words = [w.strip() for w in words.split(",") if w.strip()]
        return not words or any(w == row if w in names else w in row for w in words)
    with_fla = lambda row: not options.no_fla and chosen(options.fla, row)
    started = time.monotonic()
    budget = options.budget or (95 if options.quick else 1e9)
    left = lambda: budget - (time.monotonic() - started)

    import importlib.util
    import torch
    installed = lambda name: importlib.util.find_spec(name) is not None
    have_fla, reasons = installed("fla") and not options.no_fla, {}
    tuned, compiled, hurried = Tuned(), set(), options.quick or options.budget is not None
    fla_gates = lambda H: ("bounded", "softplus") if H == 32 or not hurried else ("bounded",)
    fla_rows = [(lengths, H, gate) for n, lengths, H in prefill_shapes() if chosen(options.rows, n) and with_fla(n) and
                (H in QUICK_HEADS or not options.quick) for gate in fla_gates(H)]
    if have_fla and fla_rows:
        ahead = time.monotonic()
        try:
            tuned, compiled = compile_ahead(fla_rows, 0.55 * budget if hurried else 900, options.compile)
        except Exception as reason:
            print(f"(compiling ahead: {first_line(reason)})", file=sys.stderr)
        print(f"compiled ahead for {time.monotonic() - ahead:.0f} s", file=sys.stderr)
    if options.compile:
        return 0
    if have_fla:
        try:
            shorten_benchmarks()
            patch_autotuner(before=tuned.apply)
        except Exception as reason:
            print(f"(triton: {first_line(reason)})", file=sys.stderr)

    peers = {}
    try:
        library = Library(options.lib)
        peers["ours"] = library.prefill
    except Exception as reason:
        library = None
        reasons["ours"] = first_line(reason)
    peers["cudnn g bf16"], peers["cudnn g f32"] = cudnn_prefill(False), cudnn_prefill(True)
    peers["fla"], peers["flash_kda"] = tuned.prefill, flash_kda_prefill
    for name, module in (("fla", "fla"), ("cudnn g bf16", "cudnn"), ("cudnn g f32", "cudnn"), ("flash_kda", "flash_kda")):
        if not installed(module):
            reasons[name] = "not installed"
    if options.no_fla:
        reasons["fla"] = "left out by --no-fla"
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    lines, notes, checks, spent = [], [], [], {}

    def cell(*arguments):
        begun = time.monotonic()
        text = fill(*arguments)
        spent[arguments[0]] = spent.get(arguments[0], 0) + time.monotonic() - begun
        return text

    def fill(name, call, sets, gate, row, H):
        if name in reasons:
            return "-"
        if left() <= 0:
            return "budget"
        if name == "fla" and not with_fla(row):
            return "-"
        if options.quick and name == "fla" and (H not in QUICK_HEADS or row.startswith("pack")):
            return "quick"
        if name == "fla" and hurried and not row.startswith("decode"):
            if gate not in fla_gates(H):
                return "-"
            if (tuple(sets[0].lengths), H, gate) not in compiled:
                return "compiling"  # it would take what is left of the budget
        try:
            with torch.no_grad():
                ms, graph = measure(call, sets, gate)
            return f"{ms:.4f}{'' if graph else '*'}"
        except Exception as reason:
            note = f"{name}, {gate}, from {row} on: {first_line(reason)}"
            if not any(n.startswith(f"{name}, {gate},") for n in notes):
                notes.append(note)
            torch.cuda.synchronize()
            return "-"

    def check(row, x, gate, calls):
        """o of ours and the peers beside f64, and of the peers beside ours."""
        if library is None:
            return
        begun = time.monotonic()
        with torch.no_grad():
            right = reference(x, gate)
            part = lambda o: rel_rms(o.reshape(x.T, x.H, D)[:right.shape[0], :right.shape[1]], right)
            x.state.copy_(x.h0)
            library.prefill(x, gate) if not row.startswith("decode") else library.decode(x, gate)
            torch.cuda.synchronize()
            ours = x.out.clone()
            error = part(ours)
            checks.append(f"{row}, {gate}: ours is {error:.2e} from f64 over {right.shape[0]} tokens of "
                          f"{right.shape[1]} heads, {'ok' if error <= TOLERANCE else 'FAILED'}")
            for name, call in calls.items():
                if name == "ours" or name in reasons or left() <= 0 or (name == "fla" and not with_fla(row)):
                    continue
                if (hurried and name == "fla" and not row.startswith("decode") and
                        (tuple(x.lengths), x.H, gate) not in compiled):
                    checks.append(f"{row}, {gate}: fla was not compiled in time")
                    continue
                try:
                    o = call(x, gate)
                    apart = rel_rms(o, ours)
                    checks.append(f"{row}, {gate}: {name} is {part(o):.2e} from f64 there, {apart:.2e} from ours over "
                                  f"all tokens{'' if apart <= AGREES else ', DISAGREES'}")
                except Exception as reason:
                    checks.append(f"{row}, {gate}: {name} did not run: {first_line(reason)}")
        spent["checks"] = spent.get("checks", 0) + time.monotonic() - begun

    columns = list(peers)
    first = True
    for row, lengths, H in prefill_shapes():
        if not chosen(options.rows, row):
            continue
        if left() <= 0:
            lines.append((row, ["budget"] * len(columns)))
            continue
        probe = Inputs(lengths, H, 1)
        count = min(24, max(2, math.ceil(2.5 * l2 / probe.bytes())))
        sets = [probe] + [Inputs(lengths, H, 2 + i) for i in range(count - 1)]
        for gate in (["bounded", "softplus"] if H in QUICK_HEADS or not options.quick else ["bounded"]):
            if first:
                check(row, probe, gate, peers)
            if gate == "softplus":
                first = False
            cells = [cell(n, peers[n], sets, gate, row, H) for n in columns]
            lines.append((f"{row} {gate}", cells))
            print(lines[-1][0], *cells, file=sys.stderr, flush=True)
        del sets, probe
        torch.cuda.empty_cache()

    decode_peers = {"ours": library.decode if library else None, "fla": fla_decode}
    first = True
    for row, B, H in DECODE:
        if not chosen(options.rows, row):
            continue
        if left() <= 0:
            lines.append((row, ["budget"] * len(columns)))
            continue
        probe = Inputs([1] * B, H, 1)
        count = min(24, max(2, math.ceil(2.5 * l2 / probe.bytes())))
        sets = [probe] + [Inputs([1] * B, H, 2 + i) for i in range(count - 1)]
        if first:
            check(row, probe, "softplus", decode_peers)
        first = False
        cells = [cell(n, decode_peers.get(n), sets, "softplus", row, H) if n in decode_peers else "-" for n in columns]
        lines.append((f"{row} softplus", cells))
        print(lines[-1][0], *cells, file=sys.stderr, flush=True)
        del sets, probe
        torch.cuda.empty_cache()

    relatives = []
    if have_fla and not options.quick and not options.fla and not options.rows:
        for row, T, H in (("T4096 H16", 4096, 16), ("T8192 H16", 8192, 16)):
            sets = [Inputs([T], H, i) for i in range(3)]
            names = {"chunk_kda": fla_prefill, "gated delta rule": fla_gated_delta_rule, "DPLR": fla_dplr}
            found = {n: cell(f"fla {n}", c, sets, "softplus", row, H) for n, c in names.items()}
            relatives.append(f"fla {row}: " + ", ".join(f"{n} {v}" for n, v in found.items()))

    import platform
    print(f"\n{torch.cuda.get_device_name(0)}, torch {torch.__version__}, Python {platform.python_version()}, "
          f"{time.monotonic() - started:.0f} s in all; ms, bf16 rows, f32 states in and out, D {D}")
    width = max([len(n) for n, _ in lines] + [8])
    print(" " * width, *(f"{c:>13}" for c in columns), "ours / best peer")
    for name, cells in lines:
        times = {c: number(text) for c, text in zip(columns, cells)}
        ours, best = times.pop("ours", None), min((t for t in times.values() if t), default=None)
        ratio = f"{ours / best:16.2f}" if ours and best else f"{'-':>16}"
        print(f"{name:<{width}}", *(f"{c:>13}" for c in cells), ratio)
    for line in relatives + checks:
        print(line)
    for name, reason in reasons.items():
        print(f"- {name}: {reason}")
    for note in notes:
        print(f"- {note}")
    print("seconds: " + ", ".join(f"{name} {seconds:.1f}" for name, seconds in spent.items()))
    print("budget: left out for lack of time; compiling: fla's kernels were not ready in time; quick: left out by "
          "--quick; *: without a CUDA graph")
    return 1 if any("FAILED" in c for c in checks) else 0


if __name__ == "__main__":
    sys.exit(main())
